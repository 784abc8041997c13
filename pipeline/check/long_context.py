"""Check a variant at every length that it claims: compare it with the source on prompts beyond each limit.

Each prompt is the beginning of one text, made of the reference prompts. The application's pipeline answers the first
half of the shortest prompt and then one prompt after the other, as in a chat that goes on. The tokens that it then
generates must be those that the variant's own logits prefer, and these logits must be near the source's at the prompt's
last tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.check.fidelity import Distributions, divergence
from pipeline.check.reference import LongContext
from pipeline.common.context import ORIGINAL
from pipeline.common.errors import refusal
from pipeline.common.params import Variant
from pipeline.common.progress import Bar
from pipeline.run.interface import Runtime, Scorer
from pipeline.run.prompts import load_prompts

PROBED_TO_THE_END = 4096  # a longer context is probed at the largest of LADDER, and where its attention changes
LADDER = (256, 512, 1024, 2048)
BEYOND = 64  # tokens by which a prompt exceeds a limit
ROWS, ANSWER = 8, 8  # tokens compared at a prompt's end; tokens generated after it


Said = dict[int, list[int] | str]  # by the prompt's length: the ids generated, or the runtime's error


@dataclass(frozen=True)
class Found:
    """What a variant did with one prompt; `error` is the runtime's message when it failed."""

    length: int  # of the prompt, in tokens
    kl_mean: float = 0.0  # from the source's distributions, over the last ROWS tokens
    departure: float = 0.0  # largest lead, in nats, of another token's logit over that of the one it generated
    error: str = ""


def lengths(limits: dict[str, int]) -> list[int]:
    """Return the ascending lengths in tokens of the prompts for a model with `limits` (pipeline/common/context.py)."""
    longest = limits["max_position_embeddings"]
    wanted = {
        *LADDER,
        *_beyond(limits),
    }
    if longest <= PROBED_TO_THE_END:
        wanted.add(longest - ANSWER)
    return sorted(length for length in wanted if length <= longest - ANSWER)


def make_prompts(encode: Callable[[str], list[int]], limits: dict[str, int]) -> LongContext:
    """Return the prompts for a model with `limits` and the tokenizer `encode`."""
    text = "\n\n".join(message["content"] for prompt in load_prompts("reference") for message in prompt.messages)
    ids, found = encode(text), lengths(limits)
    ids *= -(-found[-1] // len(ids))
    return LongContext(ids=ids[: found[-1]], lengths=found)


def choose(limits: dict[str, int], *, most: int) -> list[int]:
    """Return the lengths at which a variant that takes prompts of at most `most` tokens is probed, ascending.

    They are the longest that it takes, and those just beyond a limit of its model.
    """
    fitting = [length for length in lengths(limits) if length <= most]
    return [length for length in fitting if length in {*fitting[-1:], *_beyond(limits)}]


def longest_prompt(context: dict[str, int], variant: Variant) -> int:
    """Return how many tokens a prompt of `variant` may have, with `context` from its manifest."""
    if variant.npu:
        return variant.npu.max_prompt_len
    return context.get("faithful_tokens", context["max_position_embeddings"])


def tokens_read(chosen: Sequence[int]) -> int:
    """Return how many tokens `answer` and `compare` read together for prompts of the `chosen` lengths, about."""
    return sum(chosen[:1]) // 2 + 2 * sum(chosen)


def _beyond(limits: dict[str, int]) -> set[int]:
    return {limits[name] + BEYOND for name in ("sliding_window", ORIGINAL) if name in limits}


def answer(runtime: Runtime, prompts: LongContext, chosen: Sequence[int]) -> Said:
    """Return what `runtime` answers to each prompt of the `chosen` lengths, ascending, or its error.

    The shortest one's first half is answered before it, so that every prompt is a later turn of a chat.

    Raises MemoryError when memory ran out.
    """
    said: Said = {}
    for length in Bar(chosen, desc="answering long prompts"):
        try:
            if length == chosen[0]:
                runtime.generate(prompts.ids[: length // 2], max_new_tokens=ANSWER)
            said[length] = runtime.generate(prompts.ids[:length], max_new_tokens=ANSWER).ids
        except RuntimeError as error:
            said[length] = refusal(error)
    return said


def compare(scorer: Scorer, prompts: LongContext, said: Said, source: Distributions) -> list[Found]:
    """Return, for each prompt, how far the logits of `scorer`, the variant, are from `source` and from what was `said`.

    The last rows of `source` are ROWS for the end of each prompt.

    Raises MemoryError when memory ran out.
    """
    found = []
    for length, ids in Bar(said.items(), desc="comparing long prompts"):
        if isinstance(ids, str):
            found.append(Found(length, error=ids))
            continue
        try:
            logits = scorer.logits(prompts.ids[:length] + ids[:-1], last=ROWS + len(ids) - 1)
        except RuntimeError as error:
            found.append(Found(length, error=refusal(error)))
            continue
        start = len(source.ids) - ROWS * (len(prompts.lengths) - prompts.lengths.index(length))
        rows = Distributions(source.ids[start : start + ROWS], source.log_probs[start : start + ROWS])
        own = logits[ROWS - 1 :]
        departure = (own.max(axis=1) - own[np.arange(len(ids)), ids]).max()
        kl = divergence(logits[:ROWS], rows).mean()
        found.append(Found(length, kl_mean=float(f"{kl:.3g}"), departure=float(f"{departure:.3g}")))
    return found
