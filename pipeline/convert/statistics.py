"""The files of the stage calibrate: H = X'X for every matrix, the sum of the outer products of its inputs.

H is symmetric, so a file holds only half of it. The stage's result does not depend on how the solver uses it, so this
is a module of its own: a change of the solver does not run the stage again.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict

SUMMARY = "summary.json"
HEAD = "lm_head"


class Summary(BaseModel):
    """The token ids of the chats with their answers, and the largest diagonal element of each H by matrix name."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    answers: list[list[int]]
    largest: dict[str, float]


def fold(symmetric: Any) -> Any:
    """Return the upper triangle of `symmetric`, of shape (n, n) with n even, as a matrix of shape (n / 2, n + 1).

    The triangle's first n / 2 rows move one column to the right. Its other rows become columns and fill the places that
    are then free at the lower left.
    """
    half = len(symmetric) // 2
    folded = symmetric.new_zeros(half, 2 * half + 1)
    folded[:, 1:] = symmetric[:half].triu()
    folded[:, :half] += symmetric[half:, half:].tril()
    return folded


def unfold(folded: Any) -> Any:
    """Return the symmetric matrix of shape (n, n) from which `fold` made `folded`."""
    half = len(folded)
    full = folded.new_zeros(2 * half, 2 * half)
    full[:half] = folded[:, 1:].triu()
    full[half:, half:] = folded[:, :half].tril().T
    return full.add_(full.triu(1).T)
