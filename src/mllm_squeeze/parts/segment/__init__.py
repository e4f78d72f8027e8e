"""Parts that put tokens into groups."""
