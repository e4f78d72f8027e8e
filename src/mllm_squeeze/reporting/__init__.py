"""What a method did: tokens, FLOPs, times, pictures."""
