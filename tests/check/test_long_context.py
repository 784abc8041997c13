"""Tiny models with a window of 15 or 31 tokens, or with LongRoPE's limit at 64, are tested beyond these lengths."""

import functools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pipeline.chat import OnnxChat, OpenvinoChat
from pipeline.check.checks import check_long_context
from pipeline.check.fidelity import Distributions, concatenate, distributions
from pipeline.check.long_context import ROWS, Found, answer, choose, compare, lengths, make_prompts, tokens_read
from pipeline.check.measurement import load_runtime, load_scorer
from pipeline.check.reference import LongContext
from pipeline.common.checkpoint import read_json
from pipeline.common.context import limits, room
from pipeline.common.errors import PipelineError
from pipeline.common.params import Limits, Npu, OnnxInt4, OpenvinoFp16, OpenvinoInt4
from pipeline.convert import onnx_genai, openvino
from pipeline.run import onnx, pieces
from pipeline.run import openvino as openvino_runtimes
from pipeline.run.openvino import F32, OpenvinoGenai
from pipeline.run.source_model import Torch
from tests.checkpoints import LONGROPE, make_checkpoint
from tests.helpers import built_once

FACTORS = {"long_factor": [16.0] * 16, "original_max_position_embeddings": 64, "partial_rotary_factor": 1.0}
MODELS = {
    "window-15": ("phi-3-4k", {"sliding_window": 15}),
    "window-31": ("phi-3-4k", {"sliding_window": 31}),
    "longrope": ("phi-3-128k", {"original_max_position_embeddings": 64, "rope_parameters": LONGROPE | FACTORS}),
}
GATES = Limits(kl_mean=0.01, kl_p99=0.05, top1_agreement=0.9, perplexity_ratio=1.1)
ONNX = {
    "stage": "build_onnx",
    "limits": GATES,
    "symmetric": False,
    "block_size": 32,
    "algorithm": "rtn",
    "int8": ["last_matmul"],
}
INT4 = {"stage": "quantize_openvino", "limits": GATES, "symmetric": True, "group_size": -1, "ratio": 1.0}
VARIANTS = {
    "fp16": OpenvinoFp16(stage="export_openvino", limits=GATES),
    "npu": OpenvinoInt4(**INT4, npu=Npu(max_prompt_len=256, min_response_len=64)),
    "cpu": OnnxInt4(**ONNX, execution_provider="cpu"),
    "dml": OnnxInt4(**ONNX, execution_provider="dml"),
}
NEAR = 0.25


@dataclass(frozen=True)
class Tiny:
    """A tiny model's directories by variant, its source in torch, and the source's distributions after long prompts."""

    name: str
    root: Path
    source: Torch
    prompts: LongContext
    ends: Distributions

    def limits(self) -> dict[str, int]:
        """The model's limits."""
        return limits(read_json(self.root / "checkpoint/config.json"), directml=False)

    def found(self, variant: str, *, directory: Path | None = None) -> list[Found]:
        """The findings of the check on a variant, or on a broken copy of it in `directory`."""
        directory = directory or self.root / variant
        most = 256 if variant == "npu" else 512
        chosen = choose(self.limits(), most=most)
        said = answer(load_runtime(directory, variant=VARIANTS[variant]), self.prompts, chosen)
        scorer = load_scorer(directory, variant=VARIANTS[variant], context=self.limits())
        return compare(scorer, self.prompts, said, self.ends)

    def departure(self, prompt: list[int], said: list[int]) -> float:
        """The most by which the source's logits, all tokens read at once, prefer another token to one of `said`."""
        logits = self.source.logits(prompt + said[:-1], last=len(said))
        return float((logits.max(axis=1) - logits[np.arange(len(said)), said]).max())


@pytest.fixture(scope="module", params=MODELS)
def tiny(request, tmp_path_factory):
    """Each of MODELS with all its variants; INT4 stores its weights without loss."""
    return load(request.param, tmp_path_factory)


def load(name: str, factory: pytest.TempPathFactory) -> Tiny:
    """Return the model `name`."""
    root = built_once(factory, name, functools.partial(build, name))
    source = Torch(root / "checkpoint")
    prompts = make_prompts(source.encode, limits(read_json(root / "checkpoint/config.json"), directml=False))
    rows = [distributions(source.logits(prompts.ids[:length], last=ROWS)) for length in prompts.lengths]
    ends = concatenate(rows)
    return Tiny(name, root, source, prompts, ends)


def build(name: str, root: Path) -> None:
    """Build the model `name` with all its variants in `root`."""
    style, changes = MODELS[name]
    checkpoint = make_checkpoint(root / "checkpoint", style, on_grid=True, **changes)
    for variant in VARIANTS:
        (root / variant).mkdir()
    openvino.export_fp16(checkpoint, root / "fp16")
    openvino.quantize_int4(
        root / "fp16", root / "npu", recipe=VARIANTS["npu"], adjust_group_size=False, calibration=None
    )
    for variant in ("cpu", "dml"):
        onnx_genai.build_int4(
            checkpoint, root / variant, recipe=VARIANTS[variant], trust_remote_code=False, calibration=None
        )


def test_lengths():
    """A short context is probed to its end, a long one to 2,048 tokens, and both beyond a window or LongRoPE limit."""
    assert lengths({"max_position_embeddings": 8192}) == [256, 512, 1024, 2048]
    window = {"max_position_embeddings": 4096, "sliding_window": 2047}
    assert lengths(window) == [256, 512, 1024, 2048, 2111, 4088]
    longrope = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
    assert lengths(longrope) == [256, 512, 1024, 2048, 4160]


@pytest.mark.parametrize(
    ("most", "expected"), [(4096, [2111, 4088]), (2047, [1024]), (256, [256]), (1024, [1024]), (255, [])]
)
def test_choose(most, expected):
    """A variant gets the longest prompt that it takes, and the one just beyond the window if it takes that."""
    window = {"max_position_embeddings": 4096, "sliding_window": 2047}
    assert choose(window, most=most) == expected


@pytest.mark.parametrize(("chosen", "tokens"), [([], 0), ([1024], 512 + 2048), ([2111, 4088], 1055 + 2 * 6199)])
def test_tokens_read(chosen, tokens):
    """The runtime and the scorer read every prompt, and the runtime the first one's first half before."""
    assert tokens_read(chosen) == tokens


def test_check():
    """Failures are an error, a large distance from the source, and an answer that the model's logits do not prefer."""
    found = [
        Found(256, kl_mean=0.04, departure=0.1),
        Found(512, kl_mean=0.06),
        Found(1024, departure=0.3),
        Found(2048, kl_mean=float("nan")),
        Found(2111, error="static cache too small"),
    ]
    assert list(map(str, check_long_context(found, limits=GATES))) == [
        "check 'long-context' failed: expected \"kl_mean at most 0.05 after 512 tokens\", got 0.06",
        "check 'long-context' failed: expected \"after 1,024 tokens, in a second turn, the tokens that its logits "
        'prefer by at most 0.25", got 0.3',
        "check 'long-context' failed: expected \"kl_mean at most 0.05 after 2,048 tokens\", got NaN",
        'check \'long-context\' failed: expected "an answer after 2,111 tokens", got "static cache too small"',
    ]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_passes(tiny, variant):
    """Beyond the window, beyond LongRoPE's original limit and at the context's end each variant is near its source."""
    found = tiny.found(variant)
    assert [prompt.length for prompt in found][-1] == (256 if variant == "npu" else 504)
    assert list(check_long_context(found, limits=GATES)) == []


@pytest.mark.slow
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


def failed(found):
    """The failures that the check reports for `found`, as one text."""
    return " ".join(str(failure) for failure in check_long_context(found, limits=GATES))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["cpu", "dml"])
def test_a_max_length_shorter_than_the_window(tiny, variant):
    """An ONNX model answers a short prompt even if max_length is shorter than the window."""
    said = load_runtime(tiny.root / variant, variant=VARIANTS[variant]).generate(tiny.prompts.ids[:5], max_new_tokens=3)
    assert len(said.ids) > 0


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    """The model with a window of 31 tokens."""
    return load("window-31", tmp_path_factory)


@pytest.fixture(scope="module")
def longrope(tmp_path_factory):
    """The model with LongRoPE."""
    return load("longrope", tmp_path_factory)


@pytest.mark.slow
def test_the_check_finds_attention_to_everything(window, tmp_path, monkeypatch):
    """Without layer_types, which the builder alone does not write, the ONNX model ignores the window, and is found."""
    monkeypatch.setattr(onnx_genai, "BUILDER", "onnxruntime_genai.models.builder")
    onnx_genai.build_int4(
        window.root / "checkpoint", tmp_path, recipe=VARIANTS["cpu"], trust_remote_code=False, calibration=None
    )
    assert [prompt.kl_mean > 1 for prompt in window.found("cpu", directory=tmp_path)] == [True, True]


@pytest.mark.slow
def test_the_check_finds_a_cache_that_ends(window, tmp_path):
    """A cache only as long as the window is a failed check with the runtime's message, not a traceback."""
    directory = shutil.copytree(window.root / "cpu", tmp_path / "cpu")
    config = read_json(directory / "genai_config.json")
    config["model"]["decoder"]["sliding_window"] = {
        "window_size": 31,
        "slide_key_value_cache": False,
        "slide_inputs": False,
        "layers": [],
    }
    (directory / "genai_config.json").write_text(json.dumps(config))
    failures = list(check_long_context(window.found("cpu", directory=directory), limits=GATES))
    assert [failure.expected for failure in failures] == ["an answer after 95 tokens", "an answer after 504 tokens"]
    assert all("GroupQueryAttention" in failure.actual for failure in failures), failures[0].actual


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_answer_that_crosses_the_limit(longrope, variant):
    """Every runtime generates the source's tokens only up to LongRoPE's original limit, where room() ends answers."""
    prompt = longrope.prompts.ids[:40]
    said = load_runtime(longrope.root / variant, variant=VARIANTS[variant]).generate(prompt, max_new_tokens=80).ids
    within, _ = room(longrope.limits(), len(prompt))
    assert within == 25
    assert longrope.departure(prompt, said[:within]) < NEAR
    assert longrope.departure(prompt, said) > 1


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["fp16", "cpu"])
def test_a_chat_with_longrope(longrope, variant, monkeypatch):
    """A chat ends an answer that would cross the limit, says so, and continues with the next turn. A model for CPUs
    runs on the CPU even if there is DirectML."""
    context = longrope.limits()
    if variant == "fp16":
        chat = OpenvinoChat(longrope.root / variant, device="CPU", npu=False, context=context)
    else:
        monkeypatch.setattr("onnxruntime_genai.is_dml_available", lambda: True)
        chat = OnnxChat(longrope.root / variant, directml=False, context=context)
    assert chat.device == "CPU"
    said = []
    questions = ("water is wet 0123", "the capital of France is Paris and water is wet. " * 6)
    ended = [chat.ask(question, on_text=said.append) for question in questions]
    assert ended[0] is not None
    assert ended[0].startswith("The answer ends here, at 64 tokens")
    assert ended[1] is None or "at the 512 tokens" in ended[1]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["fp16", "cpu"])
def test_a_chat_remembers(window, variant, monkeypatch):
    """A chat's second answer is that to the whole conversation; a long chat forgets its oldest turns and says so."""
    monkeypatch.setattr("pipeline.chat.MAX_NEW_TOKENS", 8)

    def load_chat():
        if variant == "fp16":
            return OpenvinoChat(window.root / variant, device="CPU", npu=False, context=window.limits())
        return OnnxChat(window.root / variant, directml=False, context=window.limits())

    def answer_of(chat, question):
        said = []
        assert chat.ask(question, on_text=said.append) is None
        return "".join(said)

    chat, said = load_chat(), []
    first, second = "water is wet", "the capital of France"
    messages = [{"role": "user", "content": first}, {"role": "assistant", "content": answer_of(chat, first)}]
    answer = answer_of(chat, second)
    other = load_chat()
    assert answer_of(other, second) != answer  # without the first turn
    other._conversation.messages = messages
    assert answer_of(other, second) == answer
    question = "the capital of France is Paris and water is wet. " * 3
    remarks = [chat.ask(question, on_text=said.append) for _ in range(12)]
    assert remarks[-1].startswith("The conversation is longer than this model takes: its first 1 turns are forgotten.")
    with pytest.raises(PipelineError, match="tokens, more than this model takes"):
        chat.ask("water " * 600, on_text=said.append)


@pytest.mark.slow
def test_the_check_finds_an_ir_without_the_window(window, tmp_path):
    """An IR that attends to all tokens is far from the source, so the check finds it."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", on_grid=True, sliding_window=None)
    (tmp_path / "fp16").mkdir()
    openvino.export_fp16(checkpoint, tmp_path / "fp16")
    assert [prompt.kl_mean > 1 for prompt in window.found("fp16", directory=tmp_path / "fp16")] == [True, True]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["fp16", "cpu"])
def test_the_check_finds_logits_of_pieces(longrope, monkeypatch, variant):
    """With LongRoPE a scorer that reads a prompt in pieces, as for other models, is found by its wrong logits."""
    monkeypatch.setattr(pieces, "PIECE", 32)
    for module in (onnx, openvino_runtimes):
        monkeypatch.setattr(
            module, "pieces", lambda tokens, last, at_once: pieces.pieces(tokens, last=last, at_once=False)
        )
    assert [prompt.kl_mean > 0.05 for prompt in longrope.found(variant)] == [True, True]
