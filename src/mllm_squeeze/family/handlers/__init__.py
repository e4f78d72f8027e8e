"""One file per capability that some families need, never one per model."""
