"""The fidelity figures agree with a second implementation, and the measurement finds what it should."""

import json
import time

import numpy as np
import pytest
import torch

from pipeline.check import fidelity
from pipeline.check.fidelity import compare, concatenate, distributions, read_distributions, write_distributions
from pipeline.check.reference import Answer, read_reference
from pipeline.run.openvino import OpenvinoLogits
from pipeline.run.source_model import Torch
from tests.helpers import ROOT

VOCABULARY = 40
ANSWERS = [
    Answer(question="", prompt_ids=[1, 2, 3], ids=[4, 5, 6, 7], text="", stopped=False),
    Answer(question="", prompt_ids=[9], ids=[8, 0], text="", stopped=True),
]


class Table:
    """A runtime whose logits at a position depend on the tokens up to there, by a seeded table."""

    def __init__(self, seed):
        self._table = np.random.default_rng(seed).normal(scale=3, size=(VOCABULARY, VOCABULARY)).astype(np.float32)

    def logits(self, ids, *, last):
        return np.cumsum(self._table[ids], axis=0)[-last:]


def greedy(runtime, prompt, length):
    """The greedy continuation of `prompt`, token by token."""
    ids = list(prompt)
    for _ in range(length):
        ids.append(int(runtime.logits(ids, last=1)[0].argmax()))
    return ids[len(prompt) :]


def quiet(line):
    """Ignore a line of progress."""


def independent(source, variant, answers):
    """The same figures computed by torch, over the whole vocabulary at once."""
    p, q, tokens = [], [], []
    for answer in answers:
        ids = answer.prompt_ids + answer.ids
        rows = slice(len(answer.prompt_ids) - 1, len(ids) - 1)
        for into, runtime in ((p, source), (q, variant)):
            logits = torch.tensor(runtime.logits(ids, last=len(ids))[rows], dtype=torch.float64)
            into.append(torch.log_softmax(logits, dim=-1))
        tokens += answer.ids
    p, q, tokens = torch.cat(p), torch.cat(q), torch.tensor(tokens)
    kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(dim=1)
    perplexities = [torch.nn.functional.nll_loss(x, tokens).exp().item() for x in (q, p)]
    return {
        "kl_mean": kl.mean().item(),
        "kl_p99": kl.quantile(0.99).item(),
        "kl_max": kl.max().item(),
        "top1_agreement": (p.argmax(1) == q.argmax(1)).double().mean().item(),
        "perplexity": perplexities[0],
        "perplexity_source": perplexities[1],
        "perplexity_ratio": perplexities[0] / perplexities[1],
    }


def kept(source, answers):
    """The stored part of the source's distributions at each token of `answers`."""
    return concatenate([distributions(source.logits(a.prompt_ids + a.ids[:-1], last=len(a.ids))) for a in answers])


@pytest.fixture
def answers():
    """Greedy answers of the source, as the measure assumes."""
    source = Table(0)
    return [answer.model_copy(update={"ids": greedy(source, answer.prompt_ids, 12)}) for answer in ANSWERS]


def test_a_second_implementation_agrees(answers):
    """With no tail, all figures are those that torch computes over the whole vocabulary."""
    source, variant = Table(0), Table(1)
    reference = kept(source, answers)
    assert (reference.ids.shape, reference.ids.dtype) == ((24, VOCABULARY - 1), np.int32)
    assert (reference.log_probs.shape, reference.log_probs.dtype) == ((24, VOCABULARY), np.float32)
    metrics = compare(variant, answers, reference).metrics()
    assert metrics.pop("common_prefix_tokens") >= 0
    assert metrics == pytest.approx(independent(source, variant, answers), rel=1e-4)


def test_answers_that_are_not_the_most_probable(answers):
    """At a near tie the answer's token may be the second: its own probability is taken."""
    source = Table(0)
    second = []
    for answer in answers:
        best = np.argsort(source.logits(answer.prompt_ids + answer.ids[:-1], last=1)[0])
        ids = [*answer.ids[:-1], int(best[-2])]
        second.append(answer.model_copy(update={"ids": ids}))
    metrics = compare(Table(1), second, kept(source, second)).metrics()
    expected = independent(source, Table(1), second)
    assert metrics["perplexity_source"] == pytest.approx(expected["perplexity_source"], rel=1e-4)


def test_the_tail_makes_a_lower_bound(answers, monkeypatch):
    """With few tokens kept, KL divergence is below that over the whole vocabulary; the other figures stay the same."""
    monkeypatch.setattr(fidelity, "TOP", 4)
    source, variant = Table(0), Table(1)
    reference = kept(source, answers)
    tail = np.exp(reference.log_probs[:, -1]).mean()
    metrics = compare(variant, answers, reference).metrics()
    whole = independent(source, variant, answers)
    assert reference.log_probs.shape == (24, 5)
    assert np.exp(reference.log_probs.astype(float)).sum(axis=1) == pytest.approx(np.ones(24), abs=1e-6)
    assert 0 < tail < 0.5
    assert 0.5 * whole["kl_mean"] < metrics["kl_mean"] < whole["kl_mean"]
    for name in ("top1_agreement", "perplexity", "perplexity_source"):
        assert metrics[name] == pytest.approx(whole[name], rel=1e-4)


def test_the_tail_counts_as_one_outcome(monkeypatch):
    """Of four tokens two are kept: the KL divergence is that of three outcomes, calculated by hand."""
    monkeypatch.setattr(fidelity, "TOP", 2)
    source = distributions(np.log(np.array([[0.2, 0.4, 0.1, 0.3]], np.float32)))
    assert source.ids.tolist() == [[1, 3]]
    assert np.exp(source.log_probs) == pytest.approx(np.array([[0.4, 0.3, 0.3]]), rel=1e-6)
    by_hand = 0.4 * np.log(0.4 / 0.25) + 0.3 * np.log(0.3 / 0.25) + 0.3 * np.log(0.3 / 0.5)
    assert fidelity.divergence(np.zeros((1, 4), np.float32), source) == pytest.approx([by_hand], rel=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite(answers, value):
    """Each logit that is NaN or infinite is counted, so that no figure hides it."""
    reference, variant = kept(Table(0), answers), Table(1)
    variant._table[answers[0].ids[-2], 5] = value
    logits = [variant.logits(answer.prompt_ids + answer.ids[:-1], last=len(answer.ids)) for answer in answers]
    expected = sum(int((~np.isfinite(rows)).sum()) for rows in logits)
    assert expected > 0
    with np.errstate(all="ignore"):
        assert compare(variant, answers, reference).non_finite == expected


def test_the_source_against_itself(answers):
    """Compared with itself, the source has no divergence, agrees everywhere and shares its whole answers."""
    reference = kept(Table(0), answers)
    comparison = compare(Table(0), answers, reference)
    metrics = comparison.metrics()
    assert metrics["kl_max"] == pytest.approx(0, abs=1e-6)
    assert (metrics["top1_agreement"], metrics["perplexity_ratio"], metrics["common_prefix_tokens"]) == (1, 1, 12)
    assert comparison.preferred == [None, None]


def test_common_prefix_is_that_of_greedy_decoding(answers):
    """Teacher forcing shows where the variant's own greedy answer leaves the source's, and with which token."""
    variant = Table(0)
    variant._table += np.random.default_rng(2).normal(scale=0.3, size=variant._table.shape)
    reference = kept(Table(0), answers)
    comparison = compare(variant, answers, reference)
    for answer, prefix, preferred in zip(answers, comparison.prefixes, comparison.preferred, strict=True):
        own = greedy(variant, answer.prompt_ids, 12)
        assert own[:prefix] == answer.ids[:prefix]
        assert preferred == (own[prefix] if prefix < 12 else None)
    assert min(comparison.prefixes) < 12


def test_distributions_are_stored_as_they_are(answers, tmp_path, monkeypatch):
    """Distributions are read as they were written, and the file's bytes do not depend on the time."""
    reference = kept(Table(0), answers)
    write_distributions(tmp_path / "reference.safetensors", reference)
    monkeypatch.setattr(time, "time", lambda: 2e9)
    write_distributions(tmp_path / "later.safetensors", reference)
    assert (tmp_path / "later.safetensors").read_bytes() == (tmp_path / "reference.safetensors").read_bytes()
    read = read_distributions(tmp_path / "reference.safetensors")
    assert (read.ids == reference.ids).all()
    assert (read.log_probs == reference.log_probs).all()


@pytest.fixture(scope="module")
def source(smol_phi3):
    """The source model of smol-phi3."""
    return Torch(smol_phi3 / "source")


@pytest.mark.slow
def test_the_figures_of_smol_phi3(smol_phi3, source):
    """On real answers a second implementation in torch confirms the INT4 IR's figures, and the kept tokens suffice."""
    answers = read_reference(smol_phi3 / "reference.json").continuations[:32:16]
    variant = OpenvinoLogits(smol_phi3 / "openvino-int4", device="CPU")
    reference = kept(source, answers)
    tail = np.exp(reference.log_probs[:, -1]).mean()
    metrics = compare(variant, answers, reference).metrics()
    whole = independent(source, variant, answers)
    assert tail < 0.02
    assert 0.98 * whole["kl_mean"] < metrics["kl_mean"] <= whole["kl_mean"] * 1.0001
    assert {k: metrics[k] for k in ("top1_agreement", "perplexity")} == pytest.approx(
        {k: whole[k] for k in ("top1_agreement", "perplexity")}, rel=1e-3
    )


@pytest.mark.slow
def test_what_the_stage_kept_is_what_teacher_forcing_gives(smol_phi3, source):
    """The distributions recorded while the source reads all answers equal those of reading one answer alone."""
    answers = read_reference(smol_phi3 / "reference.json").continuations
    stored = read_distributions(smol_phi3 / "reference.safetensors")
    last = kept(source, answers[-1:])
    end = sum(len(answer.ids) for answer in answers)  # the rows after these belong to the ends of long prompts
    rows = slice(end - len(last.ids), end)
    np.testing.assert_allclose(stored.log_probs[rows], last.log_probs, atol=1e-3)
    assert [answer.ids for answer in answers[-1:]] == [[int(i) for i in stored.ids[rows, 0]]]


@pytest.mark.slow
def test_fp16_is_the_source(smol_phi3):
    """The FP16 IR shows no relevant difference from the source, so the measurement adds no error of its own."""
    metrics = json.loads((smol_phi3 / "metrics/openvino-fp16.json").read_bytes())
    assert metrics["kl_max"] < 1e-3
    assert metrics["top1_agreement"] > 0.999


@pytest.mark.slow
def test_the_default_int4_loses_half_of_the_plain_recipe(smol_phi3):
    """The default openvino-int4 has less than half the plain recipe's KL divergence at the same size (±1 %)."""
    plain = json.loads((ROOT / "bench/fidelity.json").read_bytes())["openvino-int4"]["plain (the tutorial's)"]
    metrics = json.loads((smol_phi3 / "metrics/openvino-int4.json").read_bytes())
    size = (smol_phi3 / "openvino-int4/openvino_model.bin").stat().st_size / 1e6
    assert metrics["kl_mean"] < plain["kl_mean"] / 2
    assert size == pytest.approx(plain["size_mb"], rel=0.01)
