"""Compile NPU variants to blobs."""
