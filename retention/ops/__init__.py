"""Pure tensor functions: every fast path has a naive twin in the same file."""
