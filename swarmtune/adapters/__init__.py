"""Door 1: an adapter becomes named leaf tensors, each for its block."""
