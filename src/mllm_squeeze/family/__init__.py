"""Which model is this: structure found by looking, and a short table of what looking cannot tell."""
