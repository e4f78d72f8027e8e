"""What goes on while decoding."""
