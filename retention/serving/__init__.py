"""Many conversations on one model, each over a cache of its own that is bounded in bytes."""
