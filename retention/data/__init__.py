"""Examples, and how they become model inputs."""
