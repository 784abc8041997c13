"""DirectML: check which graphs it can run, and run a model on it."""
