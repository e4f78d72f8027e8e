"""Parts that say what becomes of the tokens that were not picked."""
