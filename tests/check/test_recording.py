"""The reference is what the source model itself says, and how probable it finds the alternatives."""

import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.check import recording, reference
from pipeline.check.fidelity import distributions
from pipeline.check.long_context import ROWS
from pipeline.check.recording import near_tie, record
from pipeline.check.reference import Answer
from pipeline.common.checkpoint import read_json
from pipeline.common.context import limits
from pipeline.common.errors import PipelineError
from pipeline.common.params import load_params
from pipeline.convert.openvino import export_fp16
from pipeline.run.source_model import Torch
from tests.checkpoints import LONGROPE, make_checkpoint
from tests.helpers import ROOT

QUESTION = "Who are you?"
LONG = {"rope_parameters": LONGROPE | {"original_max_position_embeddings": 8192}}
STYLES = {
    "phi-3-4k": {"sliding_window": 63, "max_position_embeddings": 16384, "original_max_position_embeddings": 16384},
    "phi-3-128k": LONG | {"max_position_embeddings": 16384, "original_max_position_embeddings": 8192},
}


@pytest.fixture(scope="module")
def params():
    """The project's params with one question and short answers."""
    found = load_params(ROOT / "params.yaml")
    validate = found.validate_.model_copy(update={"prompts": [QUESTION], "max_new_tokens": 8})
    short = found.reference.model_copy(update={"max_new_tokens": 6})
    return found.model_copy(update={"validate_": validate, "reference": short})


@pytest.fixture(scope="module", params=STYLES)
def model(request, tmp_path_factory):
    """A random model with clear preferences: its source in torch, its checkpoint and its FP16 IR."""
    root = tmp_path_factory.mktemp(request.param)
    checkpoint = make_checkpoint(root / "checkpoint", request.param, on_grid=True, **STYLES[request.param])
    (root / "fp16").mkdir()
    export_fp16(checkpoint, root / "fp16")
    return Torch(checkpoint), checkpoint, root / "fp16"


@pytest.mark.slow
def test_record(model, params, monkeypatch):
    """Answers, distributions, long prompts and peak are those of transformers, which reads one text at a time."""
    monkeypatch.setattr(recording, "MIN_MARGIN", 0.0)
    source, checkpoint, fp16 = model
    bounds = limits(read_json(checkpoint / "config.json"), directml=False)
    found, rows = record(source, fp16, params=params, limits=bounds, eos_token_ids=[0, 1])
    wide = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    expected, peaks, same = [], [], []
    wide.model.norm.register_forward_pre_hook(lambda norm, inputs: peaks.append(float(inputs[0].abs().max())))
    for answer, most in ((found.answers[0], 8), *((answer, 6) for answer in found.continuations)):
        output = wide.generate(torch.tensor([answer.prompt_ids]), max_new_tokens=most, do_sample=False)
        same.append(answer.ids == output[0, len(answer.prompt_ids) :].tolist())
        assert answer.stopped == (answer.ids[-1] in (0, 1))
    assert sum(same) >= 68 - 3  # the model nearly ties between two tokens in a few
    texts = [(answer.prompt_ids + answer.ids[:-1], len(answer.ids)) for answer in found.continuations]
    texts += [(found.long_context.ids[:length], ROWS) for length in found.long_context.lengths]
    with torch.inference_mode():
        for ids, last in texts:
            read = wide(torch.tensor([ids]), output_hidden_states=True)
            expected.append(distributions(read.logits[0, -last:].numpy()))
            peaks += [float(state.abs().max()) for state in read.hidden_states[:-1]]
    log_probs = np.concatenate([part.log_probs for part in expected])
    np.testing.assert_allclose(rows.log_probs, log_probs, atol=2e-3)
    assert (rows.ids[:, 0] == np.concatenate([part.ids for part in expected])[:, 0]).mean() > 0.99
    assert found.residual_peak == pytest.approx(max(peaks), rel=0.05)
    assert [answer.question for answer in found.answers] == [QUESTION]
    assert found.near_ties == []


@pytest.mark.slow
def test_another_models_ir(model, params, tmp_path):
    """If the FP16 IR says other than the source model, the stage fails and says where."""
    source, checkpoint, _ = model
    with torch.no_grad():
        saved = source.model.lm_head.weight.clone()
        source.model.lm_head.weight.copy_(saved.roll(1, dims=0))
    bounds = limits(read_json(checkpoint / "config.json"), directml=False)
    try:
        with pytest.raises(
            PipelineError, match=r"'Who are you\?': after '.*' the FP16 IR says '.*' and the source mod"
        ):
            record(source, model[2], params=params, limits=bounds, eos_token_ids=[0, 1])
    finally:
        with torch.no_grad():
            source.model.lm_head.weight.copy_(saved)


def test_a_near_tie_is_told(tiny_checkpoint, monkeypatch):
    """A near tie is reported with its place and both tokens; an answer with large enough margins is not."""
    source = Torch(tiny_checkpoint)
    answer = Answer(question=QUESTION, prompt_ids=[30, 31], ids=[40, 41, 42], text="", stopped=False)
    logits = np.zeros((3, 320), np.float32)
    logits[[0, 1, 2], answer.ids] = 20
    assert near_tie(source, answer, logits) is None
    logits[1, 77] = 19.9
    pattern = (
        r"'Who are you\?' proves nothing: after '(.*)' the source model itself nearly ties between '.*' \(0\.525\)"
    )
    said = re.match(pattern, near_tie(source, answer, logits), re.DOTALL)
    assert said[1] == source.decode([40])
    monkeypatch.setattr(recording, "MIN_MARGIN", 0.05)
    assert near_tie(source, answer, logits) is None


@pytest.mark.slow
def test_no_question_is_left(model, params, capsys, monkeypatch):
    """If the source nearly ties on every question, the stage fails and names them."""
    monkeypatch.setattr(recording, "MIN_MARGIN", 100.0)
    source, checkpoint, fp16 = model
    bounds = limits(read_json(checkpoint / "config.json"), directml=False)
    with pytest.raises(PipelineError, match="give a question that the model answers without doubt"):
        record(source, fp16, params=params, limits=bounds, eos_token_ids=[0, 1])
    assert "left out: 'Who are you?' proves nothing" in capsys.readouterr().out


@pytest.mark.slow
def test_the_embedded_models_questions(embedded):
    """smol-phi3 answers the questions of params.yaml with a clear margin, so none is left out."""
    found = reference.read_reference(embedded / "reference.json")
    assert [answer.question for answer in found.answers] == load_params(ROOT / "params.yaml").validate_.prompts
    assert found.near_ties == []
