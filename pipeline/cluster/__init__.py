"""Builds on a Dask cluster: each cell of dvc.yaml is one task, and workers share results through the DVC remote."""
