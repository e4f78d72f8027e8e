"""Parts that say how many tokens each group keeps."""
