"""Beyond each limit of its context a variant is near its source, and the check finds those that are not."""

import shutil

import pytest

from pipeline.check.checks import check_long_context
from pipeline.check.measurement import load_runtime
from pipeline.common.checkpoint import read_json
from pipeline.common.context import room
from pipeline.convert import onnx_genai, openvino
from pipeline.run import onnx, pieces
from pipeline.run import openvino as openvino_runtimes
from pipeline.run.openvino import F32, OpenvinoGenai
from tests.check.long_models import GATES, NEAR, VARIANTS
from tests.checkpoints import make_checkpoint
from tests.helpers import edit_json

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_passes(tiny, variant):
    """Beyond the window, beyond LongRoPE's original limit and at the context's end each variant is near its source."""
    found = tiny.found(variant)
    assert [prompt.length for prompt in found][-1] == (256 if variant == "npu" else 504)
    assert list(check_long_context(found, limits=GATES)) == []


@pytest.mark.parametrize("variant", [*VARIANTS, "sdpa"])
def test_generation(tiny, variant):
    """Every runtime generates the tokens that the source prefers, from a short prompt to far beyond the window and from
    a long prompt; so does OpenVINO's other attention backend, with one prompt after the other."""
    if variant == "sdpa":
        runtime = sdpa(tiny.root / "fp16")
    else:
        runtime = load_runtime(tiny.root / variant, variant=VARIANTS[variant])
    for prompt, tokens in ((tiny.prompts.ids[:10], 54), (tiny.prompts.ids[:180], 60)):
        said = runtime.generate(prompt, max_new_tokens=tokens).ids
        assert tiny.departure(prompt, said) < NEAR


def sdpa(directory):
    """Return the runtime with OpenVINO's SDPA backend."""
    import openvino_genai

    runtime = OpenvinoGenai(directory, device="CPU")
    runtime._pipeline = openvino_genai.LLMPipeline(directory, "CPU", ATTENTION_BACKEND="SDPA", **F32)
    return runtime


@pytest.mark.parametrize("variant", ["cpu", "dml"])
def test_a_max_length_shorter_than_the_window(tiny, variant):
    """An ONNX model answers a short prompt even if max_length is shorter than the window."""
    prompt = tiny.prompts.ids[:5]
    said = load_runtime(tiny.root / variant, variant=VARIANTS[variant]).generate(prompt, max_new_tokens=3)
    assert tiny.departure(prompt, said.ids) < NEAR


def test_the_check_finds_attention_to_everything(window, tmp_path, monkeypatch):
    """Without layer_types, which the builder alone does not write, the ONNX model ignores the window, and is found."""
    monkeypatch.setattr(onnx_genai, "BUILDER", "onnxruntime_genai.models.builder")
    onnx_genai.build_int4(
        window.root / "checkpoint", tmp_path, recipe=VARIANTS["cpu"], trust_remote_code=False, calibration=None
    )
    assert [prompt.kl_mean > 1 for prompt in window.found("cpu", directory=tmp_path)] == [True, True]


def test_the_check_finds_a_cache_that_ends(window, tmp_path):
    """A cache only as long as the window is a failed check with the runtime's message, not a traceback."""
    directory = shutil.copytree(window.root / "cpu", tmp_path / "cpu")
    model = read_json(directory / "genai_config.json")["model"]
    model["decoder"]["sliding_window"] = {
        "window_size": 31,
        "slide_key_value_cache": False,
        "slide_inputs": False,
        "layers": [],
    }
    edit_json(directory / "genai_config.json", model=model)
    failures = list(check_long_context(window.found("cpu", directory=directory), limits=GATES))
    assert [failure.expected for failure in failures] == ["an answer after 95 tokens", "an answer after 504 tokens"]
    assert all("GroupQueryAttention" in failure.actual for failure in failures), failures[0].actual


@pytest.mark.parametrize("pieces", [False, True], ids=["prefix-caching", "in-pieces"])
def test_the_check_finds_keys_that_were_kept(longrope, monkeypatch, pieces):
    """A LongRoPE model's second turn is wrong with the pipeline's defaults or if its prompt is read in pieces."""
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.max_num_batched_tokens = 64
    monkeypatch.setattr(
        openvino_runtimes, "pipeline_options", lambda _: {"scheduler_config": scheduler} if pieces else {}
    )
    assert [prompt.departure > 1 for prompt in longrope.found("fp16")] == [True, True]


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_answer_that_crosses_the_limit(longrope, variant):
    """Every runtime generates the source's tokens only up to LongRoPE's original limit, where room() ends answers."""
    prompt = longrope.prompts.ids[:40]
    said = load_runtime(longrope.root / variant, variant=VARIANTS[variant]).generate(prompt, max_new_tokens=80).ids
    within, _ = room(longrope.limits(), len(prompt))
    assert within == 25
    assert longrope.departure(prompt, said[:within]) < NEAR
    assert longrope.departure(prompt, said) > 1


def test_the_check_finds_an_ir_without_the_window(window, tmp_path):
    """An IR that attends to all tokens is far from the source, so the check finds it."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", on_grid=True, sliding_window=None)
    (tmp_path / "fp16").mkdir()
    openvino.export_fp16(checkpoint, tmp_path / "fp16")
    assert [prompt.kl_mean > 1 for prompt in window.found("fp16", directory=tmp_path / "fp16")] == [True, True]


@pytest.mark.parametrize("variant", ["fp16", "cpu"])
def test_the_check_finds_logits_of_pieces(longrope, monkeypatch, variant):
    """With LongRoPE a scorer that reads a prompt in pieces, as for other models, is found by its wrong logits."""
    monkeypatch.setattr(pieces, "PIECE", 32)
    for module in (onnx, openvino_runtimes):
        monkeypatch.setattr(
            module, "pieces", lambda tokens, last, original: pieces.pieces(tokens, last=last, original=None)
        )
    assert [prompt.kl_mean > 0.05 for prompt in longrope.found(variant)] == [True, True]
