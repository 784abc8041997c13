"""The long prompts that a variant gets, and what the check says of its answers."""

import numpy as np
import pytest

from pipeline.check.checks import NEAR_TIE, check_long_context
from pipeline.check.fidelity import distributions
from pipeline.check.long_context import ROWS, Found, answer, choose, compare, lengths, tokens_read
from pipeline.check.reference import LongContext
from pipeline.run.interface import Generation
from tests.check.long_models import GATES


def test_lengths():
    """A short context is probed to its end, a long one to 2,048 tokens, and both beyond a window or LongRoPE limit."""
    assert lengths({"max_position_embeddings": 8192}) == [256, 512, 1024, 2048]
    window = {"max_position_embeddings": 4096, "sliding_window": 2047}
    assert lengths(window) == [256, 512, 1024, 2048, 2111, 4088]
    longrope = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
    assert lengths(longrope) == [256, 512, 1024, 2048, 4160]


@pytest.mark.parametrize(
    ("most", "expected"), [(4096, [2111, 4088]), (2047, [1024]), (256, [256]), (1024, [1024]), (255, [])]
)
def test_choose(most, expected):
    """A variant gets the longest prompt that it takes, and the one just beyond the window if it takes that."""
    window = {"max_position_embeddings": 4096, "sliding_window": 2047}
    assert choose(window, most=most) == expected


@pytest.mark.parametrize(("chosen", "tokens"), [([], 0), ([1024], 512 + 2048), ([2111, 4088], 1055 + 2 * 6199)])
def test_tokens_read(chosen, tokens):
    """The runtime and the scorer read every prompt, and the runtime the first one's first half before."""
    assert tokens_read(chosen) == tokens


def test_check():
    """Failures are an error, and a distance from the source or a departure from the model's own logits that is larger
    than its limit."""
    found = [
        Found(256, kl_mean=GATES.kl_p99, departure=NEAR_TIE),
        Found(512, kl_mean=0.06),
        Found(1024, departure=0.3),
        Found(2048, kl_mean=float("nan")),
        Found(2111, error="static cache too small"),
    ]
    assert list(map(str, check_long_context(found, limits=GATES))) == [
        "check 'long-context' failed: expected \"kl_mean at most 0.05 after 512 tokens\", got 0.06",
        "check 'long-context' failed: expected \"after 1,024 tokens, in a second turn, the tokens that its logits "
        'prefer by at most 0.25", got 0.3',
        "check 'long-context' failed: expected \"kl_mean at most 0.05 after 2,048 tokens\", got NaN",
        'check \'long-context\' failed: expected "an answer after 2,111 tokens", got "static cache too small"',
    ]


class Failing:
    """A runtime and a scorer that answer prompts of fewer than 512 tokens, and raise an error for longer ones."""

    def __init__(self, error):
        self._error = error

    def generate(self, ids, *, max_new_tokens):
        if len(ids) >= 512:
            raise RuntimeError(self._error)
        return Generation(ids=[7], stopped=False, time_to_first_token=0.1, time_per_token=0.1)

    def logits(self, ids, *, last):
        if len(ids) >= 512:
            raise RuntimeError(self._error)
        return np.zeros((last, 8))


PROMPTS = LongContext(ids=[1] * 512, lengths=[256, 512])
ENDS = distributions(np.zeros((2 * ROWS, 8), np.float32))


def test_an_error_of_the_runtime():
    """A prompt that the runtime or the scorer refuses is found with the reason; what comes before is compared."""
    failing = Failing("one\n two")
    said = answer(failing, PROMPTS, [256, 512])
    assert said == {256: [7], 512: "one two"}
    for given in (said, {256: [7], 512: [7]}):
        found = compare(failing, PROMPTS, given, ENDS)
        assert [(prompt.length, prompt.error) for prompt in found] == [(256, ""), (512, "one two")]


def test_lack_of_memory():
    """Lack of memory is no fault of the variant, and ends the check."""
    failing = Failing("std::bad_alloc")
    with pytest.raises(MemoryError):
        answer(failing, PROMPTS, [256, 512])
    with pytest.raises(MemoryError):
        compare(failing, PROMPTS, {512: [7]}, ENDS)
