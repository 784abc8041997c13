"""Each check finds the fault that it is named for, and passes correct artifacts."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.check import checks
from pipeline.check.checks import Failure
from pipeline.check.fidelity import Comparison
from pipeline.check.reference import Answer, Chat, LongContext, Reference, Text
from pipeline.common.matrices import Matrix
from pipeline.common.params import Limits, OpenvinoInt4, Validate

PARAMS = Validate(
    prompts=["What is the capital of France?"],
    max_new_tokens=32,
    min_recall=0.5,
    size_tolerance=0.03,
    openvino_device="CPU",
)


def answer(text, *, ids=(5, 6, 1), stopped=True):
    """An answer to the capital of France."""
    return Answer(question=PARAMS.prompts[0], prompt_ids=[3, 4], ids=list(ids), text=text, stopped=stopped)


REFERENCE = Reference(
    texts=[Text(text="1é", ids=[7, 8], decoded="1é")],
    chats=[Chat(messages=[{"role": "user", "content": "Hi"}], rendered="<user>Hi")],
    eos_token_ids=[1, 2],
    answers=[answer("The capital of France is Paris.")],
    near_ties=[],
    continuations=[],
    long_context=LongContext(ids=[], lengths=[]),
    residual_peak=23_700,
)


class Fake:
    """A runtime whose every reply can be set."""

    name = device = "fake"

    def __init__(self, **replies):
        self._replies = {
            "encode": [7, 8],
            "decode": "1é",
            "render_chat": "<user>Hi",
            "eos_token_ids": [1, 2],
        } | replies

    def __getattr__(self, name):
        return lambda *arguments, **options: self._replies[name]


@pytest.mark.parametrize(
    ("check", "replies", "failure"),
    [
        (checks.check_tokenizer, {"encode": [7]}, Failure("tokenizer", {"text": "1é", "ids": [7, 8]}, [7])),
        (checks.check_tokenizer, {"decode": "1?"}, Failure("tokenizer", {"ids": [7, 8], "decoded": "1é"}, "1?")),
        (checks.check_chat_template, {"render_chat": "Hi"}, Failure("chat-template", "<user>Hi", "Hi")),
        (checks.check_eos, {"eos_token_ids": [1]}, Failure("eos", [1, 2], [1])),
    ],
)
def test_runtime_checks(check, replies, failure):
    """Tokenizer, chat template and eos ids are each compared with the source's."""
    assert list(check(Fake(), REFERENCE)) == []
    assert list(check(Fake(**replies), REFERENCE)) == [failure]


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (answer("It is Paris, of course."), None),
        (answer("The capital of France is Lyon."), "answer"),
        (answer(" \n"), "empty"),
        (answer("Paris Paris Paris", ids=[5] * 24), "loop"),
        (answer("Paris and so on", stopped=False), "stop"),
    ],
)
def test_answers(given, name):
    """Wrong, empty, looping and endless answers are told apart, and other words for the same fact are accepted."""
    assert [failure.check for failure in checks.check_answers([given], REFERENCE, params=PARAMS)] == (
        [name] if name else []
    )


@pytest.mark.parametrize(
    ("ids", "loop"),
    [([], False), (list(range(100)), False), ([9, *[1, 2, 3] * 8], True), ([4] * 23, False), ([4] * 24, True)],
)
def test_is_loop(ids, loop):
    """An answer is a loop if it ends with at least four repeats that make up at least 24 tokens."""
    assert checks.is_loop(ids) is loop


def test_a_failure_shows_expected_and_actual():
    """The message names the check and both values."""
    assert str(Failure("eos", [1], [2])) == "check 'eos' failed: expected [1], got [2]"


COMPARISON = Comparison(
    kl=np.array([0.1, 0.3]),
    agrees=np.array([True, False]),
    source_log_probs=np.log([0.5, 0.5]),
    variant_log_probs=np.log([0.25, 0.25]),
    prefixes=[1],
    preferred=[7],
    non_finite=0,
)
LIMITS = Limits(kl_mean=0.2, kl_p99=0.3, top1_agreement=0.5, perplexity_ratio=2)


@pytest.mark.parametrize(
    ("limits", "failures"),
    [
        ({}, []),
        ({"kl_mean": 0.19}, [Failure("fidelity", "kl_mean at most 0.19", 0.2)]),
        ({"top1_agreement": 0.51}, [Failure("fidelity", "top1_agreement at least 0.51", 0.5)]),
        (
            {"kl_p99": 0.2, "perplexity_ratio": 1.9},
            [
                Failure("fidelity", "kl_p99 at most 0.2", 0.298),
                Failure("fidelity", "perplexity_ratio at most 1.9", 2.0),
            ],
        ),
    ],
)
def test_fidelity(limits, failures):
    """Each figure beyond its limit is a failure that names the metric, its limit and its value."""
    assert list(checks.check_fidelity(COMPARISON, limits=LIMITS.model_copy(update=limits))) == failures


def test_logits_that_are_not_finite():
    """NaN and infinity are reported before any figure is computed from them."""
    failures = checks.check_fidelity(replace(COMPARISON, non_finite=2), limits=LIMITS)
    assert list(failures) == [Failure("finite", "finite logits", "2 logits that are not")]


@pytest.mark.parametrize(
    ("devices", "directml", "scale", "peak", "failure"),
    [
        (["GPU"], True, 8, 23_700, None),
        (["GPU"], True, 1, 23_700, ("a residual stream of at most 6142 for DirectML's RMS norms in float16", 23_700)),
        (["GPU"], True, 4, 24_600, ("a residual stream of at most 6142 for DirectML's RMS norms in float16", 6150)),
        (["CPU", "GPU"], False, 1, 65_504, None),
        (["CPU", "GPU"], False, 1, 65_600, ("a residual stream of at most 65504 for float16 on a GPU", 65_600)),
        (["NPU"], False, 1, 65_600, None),
    ],
)
def test_float16_range(devices, directml, scale, peak, failure):
    """A residual stream beyond float16's range fails with the limit, and a division of the stream is considered."""
    failures = checks.check_float16_range(
        peak, devices=devices, directml=directml, hidden_size=576, residual_scale=scale
    )
    assert list(failures) == ([Failure("float16-range", *failure)] if failure else [])


def test_size():
    """A size within the tolerance passes; any other fails, with both sizes in megabytes."""
    assert list(checks.check_size(102_000_000, 100e6, tolerance=0.03)) == []
    assert list(checks.check_size(104_000_000, 100e6, tolerance=0.03)) == [Failure("size", "100.0 MB ±3%", "104.0 MB")]


RECIPE = OpenvinoInt4(stage="quantize_openvino", limits=LIMITS, symmetric=True, group_size=128, ratio=0.5)
SOURCE = [Matrix("embed", "embedding", 8, 128), Matrix("a", "layer", 8, 128), Matrix("b", "layer", 8, 128)]
INT8 = {"bits": 8, "symmetric": False}
INT4 = {"bits": 4, "group_size": 128}


@pytest.mark.parametrize(
    ("built", "expected", "failure"),
    [
        ([INT8, INT8, INT4], [INT8, INT8, INT4], None),
        ([INT8, INT8, INT4 | {"group_size": 64}], [INT8, INT8, INT4], ("int4-sym-g128 for b", "int4-sym-g64")),
        ([INT8, INT4, INT4], [INT8, INT4, INT4], ("INT4 ratio 0.5 (-0.500)", 1.0)),
        ([INT8, INT8], [INT8, INT8], ({"weights": {"embedding": 1024, "head": 0, "layer": 2048}},)),
    ],
)
def test_recipe(built, expected, failure):
    """Another group size, another ratio and a lost matrix are found."""

    def forms(changes):
        return [Matrix(**SOURCE[i].__dict__ | change) for i, change in enumerate(changes)]

    failures = list(checks.check_recipe(forms(built), forms(expected), source=SOURCE, recipe=RECIPE))
    assert [f.check for f in failures] == (["recipe"] if failure else [])
    if failure:
        assert (failures[0].expected, failures[0].actual)[: len(failure)] == failure


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("Paris, a large city", 1.0),
        ("A large city", 2 / 3),
        ("Paris", 1 / 3),
        ("The capital of France", 0.0),
    ],
)
def test_recall(text, share):
    """The recall is the share of the source's words that are new to the question and in the answer, too."""
    source = answer("The capital of France is Paris, large city. It has two million people.")
    source = source.model_copy(update={"question": "What is the capital of France?"})
    assert checks.recall(answer(text), source) == pytest.approx(share)


def test_one_slip_among_several_answers():
    """One wrong answer of four passes, since fidelity judges it; two are a failure, which shows the worst answer."""
    source = REFERENCE.answers[0]
    reference = REFERENCE.model_copy(update={"answers": [source] * 4})
    wrong = source.model_copy(update={"text": "no idea"})
    params = PARAMS.model_copy(update={"min_recall": 0.6})
    assert list(checks.check_answers([wrong, source, source, source], reference, params=params)) == []
    failures = list(checks.check_answers([source, wrong, wrong, source], reference, params=params))
    assert [(failure.check, failure.actual) for failure in failures] == [("answer", "no idea")]
