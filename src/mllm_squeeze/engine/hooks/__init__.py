"""What hangs on the model."""
