"""How far a variant's next-token distributions are from the source model's, at each token of the source's own answers.

The answers are the source's greedy ones, and both models read exactly the same ids before each position ("teacher
forcing"), so every figure compares two distributions over the same vocabulary in the same context.

The source's distributions are kept as the log-probabilities of its TOP most probable tokens and of all others together.
Over these TOP + 1 outcomes the KL divergence is never larger than over the whole vocabulary (the log sum inequality:
Cover and Thomas, Elements of Information Theory, theorem 2.7.1). It is smaller only by the part that comes from
differences *within* the tail.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.check.reference import Answer
from pipeline.common.progress import Bar
from pipeline.run.interface import Scorer

TOP = 512
SMALLEST_TAIL = 1e-12
SIGNIFICANT, DECIMALS = 5, 6  # digits of the figures: further ones depend on the kernels that a CPU uses
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Distributions:
    """The source's next-token distributions, one row per token of its answers, in their order.

    In reference.safetensors the rows for the ends of the long prompts follow (pipeline/check/long_context.py).

    `ids` (rows, TOP) holds the most probable tokens, best first. `log_probs` (rows, TOP + 1) holds their natural
    log-probabilities and, in the last column, that of all other tokens together.
    """

    ids: npt.NDArray[np.int32]
    log_probs: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Comparison:
    """A variant compared with the source at every token of the source's answers; log-probabilities are in nats."""

    kl: Floats  # KL divergence from the source's distribution to the variant's, per token
    agrees: npt.NDArray[np.bool_]  # whether both find the same token most probable
    source_log_probs: Floats  # of the answers' tokens
    variant_log_probs: Floats
    prefixes: list[int]  # per answer, how many of its first tokens the variant generates as well
    preferred: list[int | None]  # per answer, the first token that the variant generates differently, or None
    non_finite: int  # logits that are NaN or infinite

    def metrics(self) -> dict[str, float]:
        """Return the figures for the metrics file, rounded to the digits on which CPUs agree.

        `kl_mean`, `kl_p99` and `kl_max`: KL divergence D(source || variant) = sum of p (log p - log q), in nats
        (Kullback and Leibler, 1951). `top1_agreement`: share of tokens at which both prefer the same one.
        `perplexity` and `perplexity_source`: exp of minus the mean log-probability of the answers' tokens under
        variant and source (Jelinek et al., 1977); `perplexity_ratio` is the first divided by the second.
        `common_prefix_tokens`: mean number of tokens for which both greedy answers are the same from their beginning.
        """
        perplexity, source = (
            float(np.exp(-log_probs.mean())) for log_probs in (self.variant_log_probs, self.source_log_probs)
        )
        figures = {
            "kl_mean": self.kl.mean(),
            "kl_p99": np.percentile(self.kl, 99),
            "kl_max": self.kl.max(),
            "top1_agreement": self.agrees.mean(),
            "perplexity": perplexity,
            "perplexity_source": source,
            "perplexity_ratio": perplexity / source,
            "common_prefix_tokens": np.mean(self.prefixes),
        }
        return {name: round(float(f"{value:.{SIGNIFICANT}g}"), DECIMALS) for name, value in figures.items()}


def distributions(logits: Any) -> Distributions:
    """Return the distributions to keep from the source's `logits`, shape (rows, vocabulary)."""
    import torch

    top = torch.topk(torch.from_numpy(logits), min(TOP, logits.shape[1] - 1)).indices.numpy().astype(np.int32)
    return Distributions(top, _with_tail(_log_probs(logits, top)).astype(np.float32))


def divergence(logits: Any, source: Distributions) -> Floats:
    """Return the KL divergence in nats from each row of `source` to the same row of `logits` (rows, vocabulary)."""
    return _divergence(_log_probs(logits, source.ids), source.log_probs)


def concatenate(parts: Sequence[Distributions]) -> Distributions:
    """Return the rows of `parts`, one after the other."""
    return Distributions(
        np.concatenate([part.ids for part in parts]), np.concatenate([part.log_probs for part in parts])
    )


def compare(scorer: Scorer, answers: Sequence[Answer], source: Distributions) -> Comparison:
    """Return how a variant compares with the source, whose distributions are `source`, at each token of `answers`.

    `scorer` returns the variant's logits.

    Greedy decoding takes the most probable token, so the variant's own greedy answer is the same as the source's up to
    the first position at which, under teacher forcing, the variant finds another token most probable.
    """
    kl, agrees, source_log_probs, variant_log_probs = [], [], [], []
    prefixes: list[int] = []
    preferred: list[int | None] = []
    non_finite = start = 0
    for answer, logits in zip(answers, _teacher_forced(scorer, answers), strict=True):
        rows = slice(start, start + len(answer.ids))
        ids, p = source.ids[rows], source.log_probs[rows]
        start = rows.stop
        non_finite += int((~np.isfinite(logits)).sum())
        tokens = np.array(answer.ids)
        q = _log_probs(logits, np.concatenate([ids, tokens[:, None]], axis=1))
        kl.append(_divergence(q[:, :-1], p))
        top = logits.argmax(axis=1)
        agrees.append(top == ids[:, 0])
        variant_log_probs.append(q[:, -1])
        position = (ids == tokens[:, None]).argmax(axis=1)  # greedy tokens are among the most probable
        source_log_probs.append(p[np.arange(len(tokens)), position].astype(np.float64))
        departures = np.flatnonzero(top != tokens)
        prefixes.append(int(departures[0]) if departures.size else len(tokens))
        preferred.append(int(top[departures[0]]) if departures.size else None)
    return Comparison(
        kl=np.concatenate(kl),
        agrees=np.concatenate(agrees),
        source_log_probs=np.concatenate(source_log_probs),
        variant_log_probs=np.concatenate(variant_log_probs),
        prefixes=prefixes,
        preferred=preferred,
        non_finite=non_finite,
    )


def write_distributions(path: Path, distributions: Distributions) -> None:
    """Write `distributions` to the safetensors file `path`."""
    from safetensors.numpy import save_file

    temporary = path.with_name(f".{path.name}.partial")
    save_file(vars(distributions), temporary)
    temporary.replace(path)


def read_distributions(path: Path) -> Distributions:
    """Return what `write_distributions` wrote to `path`."""
    from safetensors.numpy import load_file

    return Distributions(**load_file(path))


def _teacher_forced(scorer: Scorer, answers: Sequence[Answer]) -> Iterator[Any]:
    # The logits that predict an answer's tokens: those at the prompt's last position and at all tokens but the last.
    for answer in Bar(answers, desc="comparing answers"):
        yield scorer.logits(answer.prompt_ids + answer.ids[:-1], last=len(answer.ids))


def _divergence(log_probs: Floats, source: npt.NDArray[np.float32]) -> Floats:
    # The KL divergence of each row, given the variant's log-probabilities of the TOP tokens, and the source's with the
    # tail.
    p = source.astype(np.float64)
    kl: Floats = (np.exp(p) * (p - _with_tail(log_probs))).sum(axis=1)
    return kl


def _log_probs(logits: Any, ids: npt.NDArray[np.integer[Any]]) -> Floats:
    # The log-probabilities of `ids` (rows, n), by log-softmax.
    # The largest logit is subtracted first, so that no exponential overflows.
    logits = logits.astype(np.float64)
    largest = logits.max(axis=1, keepdims=True)
    normalizer = largest + np.log(np.exp(logits - largest).sum(axis=1, keepdims=True))
    result: Floats = np.take_along_axis(logits, ids, axis=1) - normalizer
    return result


def _with_tail(log_probs: Floats) -> Floats:
    # Append a column for all other outcomes together; SMALLEST_TAIL replaces a tail that float64 cannot tell from 0.
    tail = np.log(np.maximum(1 - np.exp(log_probs).sum(axis=1, keepdims=True), SMALLEST_TAIL))
    return np.concatenate([log_probs, tail], axis=1)
