"""The excerpt of the reference that a release carries, so that a user's device can be compared with the source model.

It has the questions with the source's answers, and for some of the reference prompts the source's distributions.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

from pipeline.check.fidelity import SMALLEST_TAIL, Distributions
from pipeline.check.reference import Answer, Expected, Reference
from pipeline.common.checkpoint import read_json
from pipeline.common.errors import PipelineError

EXCERPT = "reference.json"
# Enough to tell a device that computes wrongly, in a few hundred kilobytes.
PER_CATEGORY, TOKENS, TOP, DECIMALS = 2, 32, 32, 4
MAX_BYTES = 10**7

Ids = Annotated[list[int], Field(min_length=1)]
LogProbs = list[Annotated[FiniteFloat, Field(le=0)]]


class Passage(BaseModel):
    """The first TOKENS tokens of the source's answer to a reference prompt, with its distribution at each of them.

    `top` has, for each token of `ids`, the source's most probable tokens, best first. `log_probs` has their natural
    log-probabilities and, last, that of all other tokens together.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    category: str
    prompt_ids: Ids
    ids: Ids
    top: list[Ids]
    log_probs: list[LogProbs]


class Excerpt(Expected):
    """The content of reference.json in a release, checked as something that may come from a hostile registry."""

    passages: list[Passage] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits(self) -> "Excerpt":
        if not self.answers or not all(answer.prompt_ids and answer.ids for answer in self.answers):
            raise ValueError("it has no questions, or one without an answer")
        width = len(self.passages[0].top[0]) if self.passages[0].top else 0
        for passage in self.passages:
            if not len(passage.ids) == len(passage.top) == len(passage.log_probs):
                raise ValueError("a passage has not one distribution per token")
            if {*map(len, passage.top)} != {width} or {*map(len, passage.log_probs)} != {width + 1}:
                raise ValueError("the distributions differ in their numbers of tokens")
        return self

    def ids(self) -> set[int]:
        """Return all token ids that are given to a model, or looked for in its logits."""
        texts: list[Answer | Passage] = [*self.answers, *self.passages]
        rows = [ids for passage in self.passages for ids in passage.top]
        return {token for ids in [*(t.prompt_ids for t in texts), *(t.ids for t in texts), *rows] for token in ids}

    def passages_up_to(self, longest_prompt: int | None) -> tuple[list[Answer], Distributions]:
        """Return the passages as `pipeline.check.fidelity.compare` takes them, without those whose prompt has more than
        `longest_prompt` tokens.

        Raises PipelineError when none is left.
        """
        chosen = [p for p in self.passages if not longest_prompt or len(p.prompt_ids) <= longest_prompt]
        if not chosen:
            raise PipelineError(f"all prompts of {EXCERPT} have more than {longest_prompt} tokens: none fits the NPU.")
        answers = [
            Answer(question="", prompt_ids=passage.prompt_ids, ids=passage.ids, text="", stopped=False)
            for passage in chosen
        ]
        ids = np.array([row for passage in chosen for row in passage.top], dtype=np.int32)
        log_probs = np.array([row for passage in chosen for row in passage.log_probs], dtype=np.float32)
        return answers, Distributions(ids, log_probs)


def make_excerpt(reference: Reference, source: Distributions) -> Excerpt:
    """Return the excerpt of `reference` and of the `source` model's distributions along its continuations.

    It has the first PER_CATEGORY prompts of each category.
    """
    passages: list[Passage] = []
    start = 0
    for answer in reference.continuations:
        rows = slice(start, start + min(len(answer.ids), TOKENS))
        start += len(answer.ids)
        if sum(passage.category == answer.category for passage in passages) < PER_CATEGORY:
            top, log_probs = source.ids[rows, :TOP], source.log_probs[rows].astype(np.float64)
            tail = np.log(np.maximum(np.exp(log_probs[:, TOP:]).sum(axis=1, keepdims=True), SMALLEST_TAIL))
            kept = np.minimum(np.concatenate([log_probs[:, :TOP], tail], axis=1), 0)
            passages.append(
                Passage(
                    category=answer.category,
                    prompt_ids=answer.prompt_ids,
                    ids=answer.ids[:TOKENS],
                    top=top.tolist(),
                    log_probs=kept.round(DECIMALS).tolist(),
                )
            )
    return Excerpt(**reference.model_dump(include=set(Expected.model_fields)), passages=passages)


def read_excerpt(directory: Path) -> Excerpt:
    """Return the excerpt in the release in `directory`.

    Raises PipelineError when there is none, or when it is not one of this model.
    """
    path = directory / EXCERPT
    if not path.is_file():
        raise PipelineError(f"{path} is missing: this version was published without it; pull a newer one.")
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"it has more than {MAX_BYTES / 1e6:.0f} MB")
        found = Excerpt.model_validate_json(path.read_bytes(), strict=True)
        vocabulary, ids = read_json(directory / "config.json").get("vocab_size"), found.ids()
        if not isinstance(vocabulary, int) or min(ids) < 0 or max(ids) >= vocabulary:
            raise ValueError("it has tokens outside the vocabulary of config.json")
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))[:100]
        raise PipelineError(f"{path} is refused ({where}: {first['msg'].removeprefix('Value error, ')}).") from error
    except ValueError as error:
        raise PipelineError(f"{path} is refused ({error}).") from error
    return found
