"""What a rule may read, taken from queries and keys without an attention map."""
