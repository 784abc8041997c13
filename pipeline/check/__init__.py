"""Compare variants with their source model."""
