"""Questions on which the source model itself nearly ties between two tokens prove nothing, and are left out."""

import re

import pytest

from pipeline.check import reference
from pipeline.check.reference import answer_questions, ask, near_tie
from pipeline.common.errors import PipelineError
from pipeline.common.params import load_params
from pipeline.run.source_model import Torch
from tests.conftest import ROOT

QUESTION = "Who are you?"


@pytest.fixture(scope="module")
def source(tiny_checkpoint):
    """A random model, which hardly prefers any token."""
    return Torch(tiny_checkpoint)


def test_a_near_tie_is_told(source, monkeypatch):
    """A near tie is reported with its place and both tokens; an answer with large enough margins is not."""
    answer = ask(source, QUESTION, max_new_tokens=8)
    pattern = r"'Who are you\?' proves nothing: after '.*' the source model itself nearly ties between '.*' \(0\.\d+\)"
    assert re.match(pattern, near_tie(source, answer), re.DOTALL)
    monkeypatch.setattr(reference, "MIN_MARGIN", 0.0)
    assert near_tie(source, answer) is None


def test_no_question_is_left(source, capsys):
    """If the source nearly ties on every question, the stage fails before it reads long prompts."""
    params = load_params(ROOT / "params.yaml")
    validate = params.validate_.model_copy(update={"prompts": [QUESTION]})
    params = params.model_copy(update={"validate_": validate})
    with pytest.raises(PipelineError, match="give a question that the model answers without doubt"):
        answer_questions(source, params=params)
    assert "left out: 'Who are you?' proves nothing" in capsys.readouterr().out


@pytest.mark.slow
def test_the_embedded_models_questions(embedded):
    """smol-phi3 answers the questions of params.yaml with a clear margin, so none is left out."""
    found = reference.read_reference(embedded / "reference.json")
    assert [answer.question for answer in found.answers] == load_params(ROOT / "params.yaml").validate_.prompts
    assert found.near_ties == []
