"""Publish artifacts to registries, and pull them."""
