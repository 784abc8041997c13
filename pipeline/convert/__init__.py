"""Convert and quantize a checkpoint."""
