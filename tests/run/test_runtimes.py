"""The runtimes that judge variants compute in float32: other CPUs give the same figures, and the source's tokens."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline.check.measurement import load_runtime, load_scorer, machine
from pipeline.common.params import Npu, OnnxInt4, OpenvinoFp16, OpenvinoInt4
from pipeline.convert import onnx_genai
from pipeline.run.onnx import OnnxGenai
from pipeline.run.openvino import OpenvinoGenai, OpenvinoLogits, answer_together
from pipeline.run.pieces import piece_size, pieces
from pipeline.run.source_model import Torch
from tests.helpers import LIMITS, ROOT, run

pytestmark = pytest.mark.slow
FP16 = OpenvinoFp16(stage="export_openvino", limits=LIMITS)
# This program prints a variant's figures on the first reference answers.
FIGURES = """
import json, sys
from pathlib import Path
from pipeline.check.fidelity import compare, read_distributions
from pipeline.check.reference import read_reference
from pipeline.run.openvino import OpenvinoLogits
folder = Path("artifacts/smol-phi3")
answers = read_reference(folder / "reference.json").continuations[:6]
scorer = OpenvinoLogits(folder / sys.argv[1], device="CPU")
print(json.dumps(compare(scorer, answers, read_distributions(folder / "reference.safetensors")).metrics()))
"""

# This program prints by how many bytes its memory grows when an NPU variant is loaded.
GROWTH = """
import sys
from pathlib import Path
import psutil
from pipeline.check.measurement import load_runtime
from pipeline.common.params import load_params
name = sys.argv[1]
variant, before = load_params().get_variant(name), psutil.Process().memory_info()
runtime = load_runtime(Path("artifacts/smol-phi3") / name, variant=variant)
after = psutil.Process().memory_info()
print(after.rss - after.shared - before.rss + before.shared)
"""


def figures(variant, **environment):
    """Return the figures that FIGURES prints."""
    return json.loads(run(sys.executable, "-c", FIGURES, variant, cwd=ROOT, **environment).stdout.splitlines()[-1])


@pytest.mark.parametrize(
    ("variant", "older"), [("openvino-fp16", ["AVX512_CORE", "AVX2"]), ("openvino-int4", ["AVX512_CORE"])]
)
def test_older_cpus_give_the_same_figures(smol_phi3, variant, older):
    """Without newer CPUs' instructions every judging figure stays the same. oneDNN does not support INT4 on AVX2."""
    here = figures(variant)
    for isa in older:
        assert figures(variant, ONEDNN_MAX_CPU_ISA=isa) == pytest.approx(here, rel=1e-4, abs=1e-6)


def test_the_default_precision_shows_beside_the_verdict_alone(smol_phi3):
    """On a CPU with bfloat16, OpenVINO's default there, the FP16 IR's measured loss is larger, not its judged one. The
    measured figures may come from another machine, of which this one cannot say what it has."""
    metrics, measured = (
        json.loads((smol_phi3 / f"{kind}/openvino-fp16.json").read_bytes()) for kind in ("metrics", "measured")
    )
    assert (metrics["passed"], metrics["kl_mean"] < 1e-5) == (True, True)
    bfloat16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if measured["machine"] == machine() and bfloat16:
        assert measured["kl_mean_default"] > 1e-4
    assert not measured.keys() & metrics.keys() - {"runtime", "device"}


@pytest.mark.parametrize("npu", [None, Npu(max_prompt_len=64, min_response_len=64)], ids=["plain", "npu"])
def test_greedy_tokens_are_the_sources(tiny_checkpoint, tiny_ir, npu):
    """60 greedy tokens of a random model, which hardly prefers any token, are those of torch."""
    prompt = list(range(30, 70))
    runtime = OpenvinoGenai(tiny_ir, device="CPU", npu=npu)
    found = runtime.generate(prompt, max_new_tokens=60)
    assert found.ids == greedy(tiny_checkpoint, prompt, 60)


def greedy(checkpoint, prompt, count):
    """Return the `count` tokens, or fewer up to an eos, that transformers generates after `prompt` in float32."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    output = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False)
    return output[0, len(prompt) :].tolist()


def test_prompts_answered_together(tiny_checkpoint, tiny_ir, capsys):
    """40 prompts, more than are answered at a time, each get their own greedy answer, of their own length."""
    prompts = [[30 + (7 * i + j) % 200 for j in range(2 + 9 * i)] for i in range(40)]
    limits = [1 + i % 13 for i in range(40)]
    answers = answer_together(tiny_ir, prompts, max_new_tokens=limits)
    assert answers == [greedy(tiny_checkpoint, *pair) for pair in zip(prompts, limits, strict=True)]
    assert "answering prompts: 40 of 40 in" in capsys.readouterr().out


def test_the_longest_prompt_of_an_npu(tiny_ir):
    """The NPU's static pipeline takes prompts of the length that params.yaml says, and no longer ones."""
    runtime = OpenvinoGenai(tiny_ir, device="CPU", npu=Npu(max_prompt_len=64, min_response_len=64))
    assert len(runtime.generate(list(range(30, 94)), max_new_tokens=1).ids) == 1
    with pytest.raises(RuntimeError, match="64"):
        runtime.generate(list(range(30, 95)), max_new_tokens=1)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says how much memory is shared")
def test_the_static_pipeline_keeps_weights_packed(smol_phi3):
    """On a CPU the NPU's pipeline takes a few times the size of the INT4 weights, not that of unpacked ones."""
    growth = int(run(sys.executable, "-c", GROWTH, "npu-int4-group128", cwd=ROOT).stdout.splitlines()[-1])
    assert growth < 8 * (smol_phi3 / "npu-int4-group128/openvino_model.bin").stat().st_size


def test_a_prompt_read_in_pieces(tiny_checkpoint, tiny_ir):
    """The logits at the last positions are the source's, however long the prompt is."""
    source, scorer = Torch(tiny_checkpoint), OpenvinoLogits(tiny_ir, device="CPU")
    ids = [20 + (7 * i) % 200 for i in range(500)]
    for length, last in ((500, 500), (500, 3), (257, 1), (256, 1), (4, 4)):
        logits = scorer.logits(ids[:length], last=last)
        np.testing.assert_allclose(logits, source.logits(ids[:length], last=last), atol=2e-3)


def test_each_variant_in_its_runtime(tiny_ir):
    """The plain IR and the NPU's load in the runtimes that params ask for; both are scored as a plain IR on the CPU."""
    npu = OpenvinoInt4(
        stage="quantize_openvino",
        limits=LIMITS,
        symmetric=True,
        group_size=-1,
        ratio=1.0,
        npu=Npu(max_prompt_len=64, min_response_len=8),
    )
    assert load_runtime(tiny_ir, variant=FP16).device == "CPU"
    assert load_runtime(tiny_ir, variant=npu).device == "CPU (NPU static pipeline)"
    assert isinstance(load_scorer(tiny_ir, variant=npu, context={}), OpenvinoLogits)


@pytest.mark.parametrize(
    ("tokens", "size", "count"), [(1, 1, 1), (256, 256, 1), (257, 129, 2), (2048, 147, 14), (4088, 137, 30)]
)
def test_pieces(tokens, size, count):
    """A prompt is read in 1, 2, 6, 14 or 30 pieces, so that the doubling cache ends up just as long as the prompt."""
    assert piece_size(tokens) == size
    assert -(-tokens // size) == count


@pytest.mark.parametrize(
    ("tokens", "last", "expected"),
    [
        (512, 1, [(0, 256), (256, 512)]),
        (1000, 8, [(0, 514), (514, 681), (681, 848), (848, 1000)]),
        (520, 8, [(0, 520)]),
        (1000, 1000, [(0, 1000)]),
    ],
)
def test_pieces_with_longrope(tokens, last, expected):
    """The first piece of a text that is longer than the original limit, here 513, ends beyond it."""
    assert pieces(tokens, last=last, original=513) == expected


@pytest.fixture(scope="module")
def built(tiny_checkpoint, tmp_path_factory):
    """An ONNX model for CPUs."""
    recipe = OnnxInt4(
        stage="build_onnx",
        limits=LIMITS,
        symmetric=False,
        block_size=32,
        algorithm="rtn",
        int8=[],
        execution_provider="cpu",
    )
    directory = tmp_path_factory.mktemp("built")
    onnx_genai.build_int4(tiny_checkpoint, directory, recipe=recipe, trust_remote_code=False, calibration=None)
    return directory


@pytest.fixture
def onnx_model(built, tmp_path):
    """A copy of the ONNX model, in a folder of its own."""
    return shutil.copytree(built, tmp_path / "folder/model")


def test_packed_weights(onnx_model):
    """The judge maps packed weights from a file that is deleted at once, and gives the same logits as an application's
    session. What a killed validation left of such a file goes, too."""
    (onnx_model.parent / ".packed-model").mkdir()
    (onnx_model.parent / ".packed-model/model.onnx.data").write_text("a part of it")
    default, judge = (OnnxGenai(onnx_model, precision=precision) for precision in ("default", "f32"))
    assert list(onnx_model.parent.iterdir()) == [onnx_model]
    if sys.platform == "linux":
        mapped = f"{onnx_model.parent}/.packed-model/model.onnx.data (deleted)"
        assert mapped in Path("/proc/self/maps").read_text("utf-8")
    np.testing.assert_array_equal(judge.logits([1, 2, 3], last=3), default.logits([1, 2, 3], last=3))


@pytest.mark.parametrize("precision", ["default", "f32"])
def test_a_damaged_onnx_model(onnx_model, precision):
    """A model that ONNX Runtime cannot read is an error of the kind that the check of loading expects."""
    (onnx_model / "model.onnx").write_bytes((onnx_model / "model.onnx").read_bytes()[:1000])
    with pytest.raises(RuntimeError, match="Protobuf parsing failed"):
        OnnxGenai(onnx_model, precision=precision)
    assert list(onnx_model.parent.iterdir()) == [onnx_model]


def test_a_full_disk(built, mount, tmp_path):
    """A disk without room for the packed weights is not the model's fault: the error says that the disk is full."""
    size = sum(path.stat().st_size for path in built.iterdir()) / 1e6
    model = shutil.copytree(built, mount(tmp_path / "disk", 1.5 * size) / "model")
    with pytest.raises(OSError, match="No space left on device"):
        OnnxGenai(model)
    assert list(model.parent.iterdir()) == [model]
