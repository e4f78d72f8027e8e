"""Does a recipe fit a model, and where exactly does each step act."""
