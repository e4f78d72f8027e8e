"""What happens inside the vision encoder."""
