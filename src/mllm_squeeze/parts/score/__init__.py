"""Parts that give each token a number."""
