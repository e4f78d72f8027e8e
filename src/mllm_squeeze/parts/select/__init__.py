"""Parts that pick tokens."""
