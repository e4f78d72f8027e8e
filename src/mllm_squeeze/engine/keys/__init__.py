"""What is left of pictures that are keys to somebody else."""
