"""The inputs of an IR that optimum-intel exported."""

from typing import Any


def model_inputs(ids: list[int], *, start: int = 0) -> dict[str, Any]:
    """Return the inputs for one sequence from position `start` on; the model's state holds the part before it.

    The arrays have shape (1, len(ids) - start), except `attention_mask`, (1, len(ids)), and `beam_idx`, (1,).
    """
    import numpy as np

    tokens = np.array([ids], dtype=np.int64)
    return {
        "input_ids": tokens[:, start:],
        "attention_mask": np.ones_like(tokens),
        "position_ids": np.arange(start, len(ids), dtype=np.int64)[None],
        "beam_idx": np.zeros(1, dtype=np.int32),
    }
