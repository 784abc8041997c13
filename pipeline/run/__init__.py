"""Load models in their runtimes."""
