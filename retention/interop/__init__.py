"""Gates of others as ours, and ours for others: files and tensors, never a foreign package."""
