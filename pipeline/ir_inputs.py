"""The inputs of an IR that optimum-intel exported."""

from typing import Any


def model_inputs(ids: list[int]) -> dict[str, Any]:
    """Return the inputs for one sequence from its start, as arrays of shape (1, len(ids)); `beam_idx` is (1,)."""
    import numpy as np

    tokens = np.array([ids], dtype=np.int64)
    return {
        "input_ids": tokens,
        "attention_mask": np.ones_like(tokens),
        "position_ids": np.arange(len(ids), dtype=np.int64)[None],
        "beam_idx": np.zeros(1, dtype=np.int32),
    }
