"""The protocols of a loaded model: a Runtime generates and tokenizes, a Scorer returns logits.

An artifact is judged in float32 on the CPU, whatever the runtime's defaults are, so that the verdict is the same on
every machine. What an application will see is measured with the runtime's defaults.
"""

from dataclasses import dataclass
from typing import Any, Literal, Protocol

Message = dict[str, str]
Precision = Literal["f32", "default"]


@dataclass(frozen=True)
class Generation:
    """Greedily generated token ids, without the prompt; times in seconds."""

    ids: list[int]
    stopped: bool  # by an eos token, not by the limit
    time_to_first_token: float
    time_per_token: float  # of the tokens after the first


class Runtime(Protocol):
    """What the checks need of a loaded model."""

    name: str
    device: str

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, with no special tokens added."""

    def decode(self, ids: list[int]) -> str:
        """Return the text of `ids` without special tokens."""

    def render_chat(self, messages: list[Message]) -> str:
        """Return `messages` in the chat template, ready for the assistant's turn."""

    def eos_token_ids(self) -> list[int]:
        """Return the ids that end generation, sorted."""

    def generate(self, ids: list[int], *, max_new_tokens: int) -> Generation:
        """Return the greedy continuation of `ids`, of at most `max_new_tokens` tokens."""


class Scorer(Protocol):
    """What a comparison needs of a loaded model."""

    def logits(self, ids: list[int], *, last: int) -> Any:
        """Return the float32 logits at the last `last` positions of `ids`, shape (last, vocabulary)."""
