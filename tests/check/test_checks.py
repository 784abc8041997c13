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
    texts=[
        Text(text="1é", ids=[7, 8], decoded="1é"),
        Text(text="x", ids=[9], decoded="x y"),
        Text(text="<user>Hi", ids=[3, 9], decoded="Hi. "),
    ],
    chats=[Chat(messages=[{"role": "user", "content": "Hi"}], rendered="<user>Hi")],
    eos_token_ids=[1, 2],
    answers=[answer("The capital of France is Paris.")],
    near_ties=[],
    continuations=[],
    long_context=LongContext(ids=[], lengths=[]),
    residual_peak=23_700,
)


class Fake:
    """A runtime that replies as the source does, but for what `changes` say of an argument."""

    name = device = "fake"

    def __init__(self, changes=()):
        self._replies = {"1é": [7, 8], "x": [9], "[7, 8]": "1é", "[9]": "x y", "Hi": "<user>Hi", "eos": [1, 2]}
        self._replies |= {"<user>Hi": [3, 9], "[3, 9]": "Hi. "}
        self._replies |= dict(changes)

    def encode(self, text):
        return self._replies[text]

    def decode(self, ids):
        return self._replies[str(ids)]

    def render_chat(self, messages):
        return self._replies[messages[0]["content"]]

    def eos_token_ids(self):
        return self._replies["eos"]


@pytest.mark.parametrize(
    ("check", "changes", "failure"),
    [
        (checks.check_tokenizer, {"1é": [7]}, Failure("tokenizer", {"text": "1é", "ids": [7, 8]}, [7])),
        (checks.check_tokenizer, {"x": [7]}, Failure("tokenizer", {"text": "x", "ids": [9]}, [7])),
        (checks.check_tokenizer, {"[7, 8]": "1?"}, Failure("tokenizer", {"ids": [7, 8], "decoded": "1é"}, "1?")),
        (checks.check_tokenizer, {"[9]": "xy"}, Failure("tokenizer", {"ids": [9], "decoded": "x y"}, "xy")),
        (checks.check_tokenizer, {"[3, 9]": "<Hi."}, Failure("tokenizer", {"ids": [3, 9], "decoded": "Hi. "}, "<Hi.")),
        (checks.check_chat_template, {"Hi": "Hi"}, Failure("chat-template", "<user>Hi", "Hi")),
        (checks.check_eos, {"eos": [1]}, Failure("eos", [1, 2], [1])),
    ],
)
def test_runtime_checks(check, changes, failure):
    """Tokenizer, chat template and eos ids are each compared with the source's."""
    assert list(check(Fake(), REFERENCE)) == []
    assert list(check(Fake(changes), REFERENCE)) == [failure]


@pytest.mark.parametrize("changes", [{"[9]": "  x y"}, {"[3, 9]": "Hi."}], ids=["at the beginning", "in a chat"])
def test_spaces_that_mark_words(changes):
    """A space may be there or not at the beginning of a text, and between the special tokens of a chat."""
    assert list(checks.check_tokenizer(Fake(changes), REFERENCE)) == []


RIGHT = "The capital of France is Paris."


@pytest.mark.parametrize(
    ("given", "failure"),
    [
        (answer("It is Paris, of course."), None),
        (answer("It is Lyon."), ("answer", {"question": PARAMS.prompts[0], "answer": RIGHT}, "It is Lyon.")),
        (answer(" \n"), ("empty", RIGHT, " \n")),
        (answer("Paris Paris Paris", ids=[5] * 24), ("loop", RIGHT, "Paris Paris Paris")),
        (answer("Paris and", stopped=False), ("stop", f"an end within 32 tokens, as: {RIGHT}", "Paris and")),
    ],
)
def test_answers(given, failure):
    """Wrong, empty, looping and endless answers are told apart, and other words for the same fact are accepted."""
    assert list(checks.check_answers([given], REFERENCE, params=PARAMS)) == ([Failure(*failure)] if failure else [])


def test_an_answer_that_may_be_long():
    """Where the source itself needs more than half of the tokens, an answer without an end is no failure."""
    longer = REFERENCE.model_copy(update={"answers": [answer(RIGHT, ids=range(17))]})
    assert list(checks.check_answers([answer("Paris and", stopped=False)], longer, params=PARAMS)) == []


def test_the_first_answer_alone():
    """A runtime that answers only the first question is compared with the source's first answer."""
    other = answer("Water is wet.")
    reference = REFERENCE.model_copy(update={"answers": [REFERENCE.answers[0], other]})
    assert list(checks.check_first_answer(answer("Paris."), reference, params=PARAMS)) == []
    (failure,) = checks.check_first_answer(other, reference, params=PARAMS)
    assert (failure.check, failure.actual) == ("answer", "Water is wet.")


@pytest.mark.parametrize(
    ("ids", "loop"),
    [
        ([], False),
        (list(range(100)), False),
        ([9, *[1, 2, 3] * 8], True),
        ([4] * 23, False),
        ([4] * 24, True),
        ([4] * 24 + [5], False),
        ([5, 5] + [4] * 22, False),
        ([1, 2, 3, 4, 5, 6] * 4, True),
        ([1, 2, 3, 4, 5, 6, 7] * 3, False),
    ],
)
def test_is_loop(ids, loop):
    """An answer is a loop if it ends with at least four repeats that make up at least 24 tokens."""
    assert checks.is_loop(ids) is loop


def test_a_failure_shows_expected_and_actual():
    """The message names the check and both values, each cut at 300 characters of JSON."""
    assert str(Failure("eos", [1], [2])) == "check 'eos' failed: expected [1], got [2]"
    long = str(Failure("empty", "é" * 400, ""))
    assert long == f'check \'empty\' failed: expected "{"é" * 299}, got ""'


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
    """A size up to the tolerance passes; any other fails, with both sizes in megabytes."""
    assert list(checks.check_size(125, 100.0, tolerance=0.25)) == []
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
        (
            [INT8, INT8],
            [INT8, INT8],
            (
                {"weights": {"embedding": 1024, "head": 0, "layer": 2048}},
                {"weights": {"embedding": 1024, "head": 0, "layer": 1024}},
            ),
        ),
    ],
)
def test_recipe(built, expected, failure):
    """Another group size, another ratio and a lost matrix are found."""
    failures = list(checks.check_recipe(forms(built), forms(expected), source=SOURCE, recipe=RECIPE))
    assert failures == ([Failure("recipe", *failure)] if failure else [])


def forms(changes):
    """Return the matrices of SOURCE, each with changes."""
    return [Matrix(**vars(SOURCE[i]) | change) for i, change in enumerate(changes)]


@pytest.mark.parametrize(("ratio", "fails"), [(0.5, False), (0.499, True), (0.999, False), (1.0, False)])
def test_the_ratio(ratio, fails):
    """INT4's share may be below the ratio by up to the largest layer, and never above it."""
    built = forms([INT8, INT8, INT4])
    source = [replace(SOURCE[0], rows=800), *SOURCE[1:]]  # a large embedding does not count
    built = [replace(built[0], rows=800), *built[1:]]
    recipe = RECIPE.model_copy(update={"ratio": ratio})
    assert bool(list(checks.check_recipe(built, built, source=source, recipe=recipe))) is fails


def test_the_share_is_told_in_four_digits():
    """A share that is no short number is rounded."""
    source = [replace(matrix, role="layer") for matrix in SOURCE]
    built = [replace(source[0], **INT4), replace(source[1], **INT4), replace(source[2], **INT8)]
    recipe = RECIPE.model_copy(update={"ratio": 0.25})
    expected = [Failure("recipe", "INT4 ratio 0.25 (-0.333)", 0.6667)]
    assert list(checks.check_recipe(built, built, source=source, recipe=recipe)) == expected


def test_lists_of_different_lengths():
    """A missing answer or matrix is never passed over."""
    with pytest.raises(ValueError, match="argument 2 is"):
        list(checks.check_answers([], REFERENCE, params=PARAMS))
    with pytest.raises(ValueError, match="argument 2 is"):
        list(checks.check_recipe(forms([INT8]), forms([INT8, INT8]), source=SOURCE, recipe=RECIPE))


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
    assert checks.recall(answer(text), source) == pytest.approx(share)
    nothing_new = answer("The capital of France!")
    assert checks.recall(answer(text), nothing_new) == 1


def test_one_slip_among_several_answers():
    """One wrong answer of four passes, since fidelity judges it; two are a failure, which shows the worst answer, when
    together the answers have less than `min_recall` of the words."""
    source = REFERENCE.answers[0]
    reference = REFERENCE.model_copy(update={"answers": [source] * 4})
    wrong = source.model_copy(update={"text": "no idea"})
    params = PARAMS.model_copy(update={"min_recall": 0.6})
    assert list(checks.check_answers([wrong, source, source, source], reference, params=params)) == []
    half = [source, wrong, wrong, source]
    assert list(checks.check_answers(half, reference, params=PARAMS)) == []
    failures = list(checks.check_answers(half, reference, params=params))
    assert [(failure.check, failure.actual) for failure in failures] == [("answer", "no idea")]
