"""The excerpt of the reference says what the source says, in a few hundred kilobytes, and a hostile one is refused."""

import json

import numpy as np
import pytest

from pipeline.check.excerpt import EXCERPT, MAX_BYTES, PER_CATEGORY, TOKENS, TOP, make_excerpt, read_excerpt
from pipeline.check.fidelity import Distributions, compare, distributions
from pipeline.check.reference import Continuation
from pipeline.common.errors import PipelineError
from tests.release_project import REFERENCE

VOCABULARY = 200_064  # that of Phi-4-mini, the largest of the catalogue
CATEGORIES = ("facts", "facts", "code", "facts", "code", "long")
ANSWER = {"text": "", "stopped": False}


class Table:
    """A model whose logits depend on the last token, by a seeded table."""

    def __init__(self, seed, vocabulary=500):
        self._table = np.random.default_rng(seed).normal(scale=3, size=(vocabulary, vocabulary)).astype(np.float32)

    def logits(self, ids, *, last):
        return self._table[ids][-last:]


@pytest.fixture
def made():
    """The reference and the distributions of a model, of which an excerpt is made."""
    source, answers, rows = Table(0), [], []
    for number, category in enumerate(CATEGORIES):
        prompt, ids = [*range(3, 8 + 400 * (category == "long")), number], [number]
        for _ in range(40):
            ids.append(int(source.logits(ids, last=1)[0].argmax()))
        answers.append(Continuation(category=category, question=f"{number}?", prompt_ids=prompt, ids=ids[1:], **ANSWER))
        rows.append(distributions(source.logits(ids[:-1], last=40)))
    whole = Distributions(*(np.concatenate([getattr(row, name) for row in rows]) for name in ("ids", "log_probs")))
    return REFERENCE.model_copy(update={"continuations": answers}), whole


@pytest.fixture
def folder(tmp_path, made):
    """A folder with an excerpt and a config.json."""
    (tmp_path / EXCERPT).write_text(make_excerpt(*made).model_dump_json())
    (tmp_path / "config.json").write_text('{"vocab_size": 500}')
    return tmp_path


def test_two_prompts_of_each_category(folder, made):
    """The excerpt has the first two prompts of each category and the first tokens of their answers, with the questions;
    the same reference gives the same bytes."""
    reference, _ = made
    found = read_excerpt(folder)
    chosen = [reference.continuations[number] for number in (0, 1, 2, 4, 5)]
    assert [passage.category for passage in found.passages] == [answer.category for answer in chosen]
    assert [passage.prompt_ids for passage in found.passages] == [answer.prompt_ids for answer in chosen]
    assert [passage.ids for passage in found.passages] == [answer.ids[:TOKENS] for answer in chosen]
    assert (found.answers, found.eos_token_ids) == (reference.answers, reference.eos_token_ids)
    assert make_excerpt(*made).model_dump_json() == (folder / EXCERPT).read_text()


def test_the_figures_are_nearly_those_of_all_tokens_kept(folder, made):
    """A model that differs a little has nearly the divergence that it has from the source's distributions themselves,
    at most a quarter less for the coarser tail, and the same top-1 agreement; the source itself has none."""

    class Near(Table):
        def logits(self, ids, *, last):
            return super().logits(ids, last=last) + Table(1).logits(ids, last=last) / 5

    _, whole = made
    answers, kept = read_excerpt(folder).passages_up_to(None)
    rows = np.concatenate([np.arange(40 * number, 40 * number + TOKENS) for number in (0, 1, 2, 4, 5)])
    full = Distributions(whole.ids[rows], whole.log_probs[rows])
    assert (kept.ids.shape, kept.log_probs.shape) == ((160, TOP), (160, TOP + 1))
    np.testing.assert_allclose(np.exp(kept.log_probs.astype(float)).sum(axis=1), 1, atol=1e-3)
    coarse, fine = (compare(Near(0), answers, each).metrics() for each in (kept, full))
    assert 0.75 * fine["kl_mean"] < coarse["kl_mean"] < 1.001 * fine["kl_mean"]
    assert coarse["top1_agreement"] == fine["top1_agreement"] < 1
    itself = compare(Table(0), answers, kept).metrics()
    assert abs(itself["kl_mean"]) < 1e-4


def test_prompts_that_a_device_does_not_take(folder):
    """Prompts longer than an NPU takes are left out with their distributions; when none is left, that is an error."""
    found = read_excerpt(folder)
    answers, kept = found.passages_up_to(100)
    assert [len(answer.prompt_ids) for answer in answers] == [6] * 4
    assert len(kept.ids) == 4 * TOKENS
    with pytest.raises(PipelineError, match="have more than 5 tokens: none fits the NPU"):
        found.passages_up_to(5)


def test_its_size_with_a_large_vocabulary():
    """With ids of six digits, full answers and a long prompt the excerpt has less than 350 kB."""
    rng, categories = np.random.default_rng(0), [f"category {number}" for number in range(8)] * PER_CATEGORY
    ids = rng.integers(100_000, VOCABULARY, size=(17 * TOKENS, TOP)).astype(np.int32)
    source = Distributions(ids, np.full((len(ids), TOP + 1), -12.3456, dtype=np.float32))
    prompts = [(category, 60) for category in categories] + [("long", 1800)]
    answers = [
        Continuation(category=category, question="", prompt_ids=[VOCABULARY] * length, ids=list(row), **ANSWER)
        for (category, length), row in zip(prompts, ids[::TOKENS, :].tolist(), strict=True)
    ]
    size = len(make_excerpt(REFERENCE.model_copy(update={"continuations": answers}), source).model_dump_json())
    assert 250_000 < size < 350_000


def change(content, *path, to):
    """Set what is at `path` in the nested `content`."""
    for key in path[:-1]:
        content = content[key]
    content[path[-1]] = to


@pytest.mark.parametrize(
    ("path", "to", "reason"),
    [
        (["passages"], [], r"passages: List should have at least 1 item"),
        (["passages", 0, "top"], [], "a passage has not one distribution per token"),
        (["passages", 1, "log_probs", 3], [-1.0], "the distributions differ in their numbers of tokens"),
        (["passages", 1, "log_probs", 3, 0], 0.5, r"log_probs\.3\.0: Input should be less than or equal to 0"),
        (["passages", 1, "log_probs", 3, 0], "-1", r"log_probs\.3\.0: Input should be a valid number"),
        (["passages", 0, "ids", 0], -1, r"it has tokens outside the vocabulary of config\.json"),
        (["passages", 0, "top", 0, 0], 500, r"it has tokens outside the vocabulary of config\.json"),
        (["passages", 0, "prompt_ids"], [10**30], r"it has tokens outside the vocabulary of config\.json"),
        (["answers", 0, "prompt_ids"], [500], r"it has tokens outside the vocabulary of config\.json"),
        (["answers", 0, "prompt_ids"], [-1], r"it has tokens outside the vocabulary of config\.json"),
        (["answers"], [], "it has no questions, or one without an answer"),
        (["answers", 0, "ids"], [], "it has no questions, or one without an answer"),
        (["more"], 1, "more: Extra inputs are not permitted"),
    ],
)
def test_a_hostile_one_is_refused(folder, path, to, reason):
    """What would make numpy or a runtime fail is refused with a sentence that names it."""
    content = json.loads((folder / EXCERPT).read_text())
    change(content, *path, to=to)
    (folder / EXCERPT).write_text(json.dumps(content))
    with pytest.raises(PipelineError, match=rf"{EXCERPT} is refused \(.*{reason}"):
        read_excerpt(folder)


def test_what_is_no_excerpt(folder):
    """Too many bytes, no JSON, deep nesting, NaN and a missing file are one sentence each."""
    path = folder / EXCERPT
    for content in (b" " * (MAX_BYTES + 1), b"\xff", b"[" * 20_000, path.read_bytes().replace(b"-", b"NaN,-", 1)):
        path.write_bytes(content)
        with pytest.raises(PipelineError, match=rf"{EXCERPT} is refused \("):
            read_excerpt(folder)
    path.unlink()
    with pytest.raises(PipelineError, match=rf"{EXCERPT} is missing: this version was published without it"):
        read_excerpt(folder)
