"""The reference is what the source model itself says, and how probable it finds the alternatives."""

import re
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.check import recording, reference
from pipeline.check.fidelity import concatenate, distributions
from pipeline.check.long_context import ROWS
from pipeline.check.recording import near_tie, record
from pipeline.check.reference import CHATS, Answer
from pipeline.common.checkpoint import read_json
from pipeline.common.context import limits
from pipeline.common.errors import PipelineError
from pipeline.common.params import load_params
from pipeline.convert.openvino import export_fp16
from pipeline.run.source_model import Torch
from tests.checkpoints import LONGROPE, make_checkpoint
from tests.helpers import ROOT, built_once

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
    """The model of each of STYLES."""
    return load_model(request.param, tmp_path_factory)


def load_model(style, factory):
    """Return a random model with clear preferences: its source in torch, its checkpoint and its FP16 IR."""

    def build(root):
        checkpoint = make_checkpoint(root / "checkpoint", style, on_grid=True, **STYLES[style])
        (root / "fp16").mkdir()
        export_fp16(checkpoint, root / "fp16")

    root = built_once(factory, f"recording-{style}", build)
    return Torch(root / "checkpoint"), root / "checkpoint", root / "fp16"


@pytest.fixture(scope="module")
def recorded(model, params):
    """What is recorded of a model for every fourth prompt, without looking for near ties, and its float32 model of
    transformers."""
    source, checkpoint, fp16 = model
    bounds = limits(read_json(checkpoint / "config.json"), directml=False)
    prompts = recording.load_prompts("reference")[::4]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recording, "load_prompts", lambda name: prompts)
        patch.setattr(recording, "MIN_MARGIN", 0.0)
        found, rows = record(source, fp16, params=params, limits=bounds, eos_token_ids=[0, 1])
    return found, rows, AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


@pytest.fixture(scope="module")
def read(recorded):
    """What transformers finds when it reads the texts one at a time: distributions, and each text's largest state."""
    found, _, wide = recorded
    texts = [(answer.prompt_ids + answer.ids[:-1], len(answer.ids)) for answer in found.continuations]
    texts += [(found.long_context.ids[:length], ROWS) for length in found.long_context.lengths]
    peaks, rows = [], []
    hook = wide.model.norm.register_forward_pre_hook(lambda norm, inputs: peaks.append(float(inputs[0].abs().max())))
    with torch.inference_mode():
        for ids, last in texts:
            output = wide(torch.tensor([ids]), output_hidden_states=True)
            rows.append(distributions(output.logits[0, -last:].numpy()))
            peaks += [float(state.abs().max()) for state in output.hidden_states[:-1]]
    hook.remove()
    return concatenate(rows), peaks


@pytest.mark.slow
def test_the_answers_are_those_of_transformers(recorded):
    """Question and prompts are answered greedily, up to the length of params.yaml."""
    found, _, wide = recorded
    same = []
    for answer, most in ((found.answers[0], 8), *((answer, 6) for answer in found.continuations)):
        output = wide.generate(torch.tensor([answer.prompt_ids]), max_new_tokens=most, do_sample=False)
        same.append(answer.ids == output[0, len(answer.prompt_ids) :].tolist())
    assert sum(same) >= len(same) - 3  # the model nearly ties between two tokens in a few


@pytest.mark.slow
def test_an_answer_that_stops(recorded):
    """An answer is recorded as stopped if it ends with an eos id."""
    said = [*recorded[0].answers, *recorded[0].continuations]
    assert [answer.stopped for answer in said] == [answer.ids[-1] in (0, 1) for answer in said]


@pytest.mark.slow
def test_record(recorded, read):
    """At each token of the answers and at the ends of the long prompts the distributions are those of transformers."""
    rows, expected = recorded[1], read[0]
    np.testing.assert_allclose(rows.log_probs, expected.log_probs, atol=2e-3)
    assert (rows.ids[:, 0] == expected.ids[:, 0]).mean() > 0.99


@pytest.mark.slow
def test_the_residual_peak(recorded, read):
    """The largest magnitude of the residual stream on all texts is recorded."""
    assert recorded[0].residual_peak == pytest.approx(max(read[1]), rel=0.05)


@pytest.mark.slow
def test_all_questions_are_kept(recorded):
    """A question on which the source does not nearly tie is kept."""
    found = recorded[0]
    assert ([answer.question for answer in found.answers], found.near_ties) == ([QUESTION], [])


@pytest.fixture
def short(tmp_path_factory, monkeypatch):
    """The window's model, to record two prompts only."""
    prompts = recording.load_prompts("reference")[:2]
    monkeypatch.setattr(recording, "load_prompts", lambda name: prompts)
    return load_model("phi-3-4k", tmp_path_factory)


@pytest.mark.slow
def test_another_models_ir(short, params):
    """If the FP16 IR says other than the source model, the stage fails and says where."""
    source, checkpoint, fp16 = short
    with torch.no_grad():
        source.model.lm_head.weight.copy_(source.model.lm_head.weight.roll(1, dims=0))
    bounds = limits(read_json(checkpoint / "config.json"), directml=False)
    with pytest.raises(PipelineError, match=r"'Who are you\?': after '.*' the FP16 IR says '.*' and the source mod"):
        record(source, fp16, params=params, limits=bounds, eos_token_ids=[0, 1])


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


def test_a_near_tie_after_the_first_sentence(tiny_checkpoint):
    """A near tie counts only in the first sentence, with which variants' answers are compared."""
    source = Torch(tiny_checkpoint)
    said = [source.encode(text) for text in ("Yes", ".", " It", " is")]
    ids = [token for part in said for token in part]
    answer = Answer(question=QUESTION, prompt_ids=[30, 31], ids=ids, text="", stopped=False)
    logits = np.zeros((len(ids), 320), np.float32)
    logits[range(len(ids)), ids] = 20
    logits[-1, 77] = 20
    assert near_tie(source, answer, logits) is None
    logits[0, 77] = 20
    assert near_tie(source, answer, logits).startswith("'Who are you?' proves nothing: after '' the source model")


def test_a_chat_that_the_template_refuses(tiny_checkpoint, tmp_path, capsys):
    """A chat template without a system role leaves that chat out, and one that refuses everything is an error."""
    shutil.copytree(tiny_checkpoint, tmp_path, dirs_exist_ok=True)
    template = tmp_path / "chat_template.jinja"
    refuse = "{%% if messages[0].role == '%s' %%}{{ raise_exception('No %s.') }}{%% endif %%}x"
    template.write_text(refuse % ("system", "system"))
    assert [chat.messages for chat in recording.render_chats(Torch(tmp_path))] == [CHATS[0], CHATS[2]]
    assert capsys.readouterr().out == "left out: a chat that the chat template refuses (No system.)\n"
    template.write_text("{{ raise_exception('No.') }}")
    with pytest.raises(PipelineError, match=r"^the chat template refuses every chat \(No\.\): correct it"):
        list(recording.render_chats(Torch(tmp_path)))


@pytest.mark.slow
def test_no_question_is_left(short, params, capsys, monkeypatch):
    """If the source nearly ties on every question, the stage fails and names them."""
    monkeypatch.setattr(recording, "MIN_MARGIN", 100.0)
    source, checkpoint, fp16 = short
    bounds = limits(read_json(checkpoint / "config.json"), directml=False)
    with pytest.raises(PipelineError, match="give a question that the model answers without doubt"):
        record(source, fp16, params=params, limits=bounds, eos_token_ids=[0, 1])
    assert "left out: 'Who are you?' proves nothing" in capsys.readouterr().out


@pytest.mark.slow
def test_the_questions_of_smol_phi3(smol_phi3):
    """smol-phi3 answers the questions of params.yaml with a clear margin, so none is left out."""
    found = reference.read_reference(smol_phi3 / "reference.json")
    assert [answer.question for answer in found.answers] == load_params(ROOT / "params.yaml").validate_.prompts
    assert found.near_ties == []
