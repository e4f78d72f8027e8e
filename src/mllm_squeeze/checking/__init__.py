"""Can this model, and this release of transformers, be trusted? Asked at apply, and by `check`."""
