"""A released artifact passes on a device that computes what the source model says, and fails on one that does not."""

import json
import os
import re
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest

from pipeline import device_check
from pipeline.check.excerpt import EXCERPT, read_excerpt
from pipeline.check.fidelity import Distributions, compare
from pipeline.common.errors import PipelineError
from pipeline.common.params import Npu
from pipeline.convert.npu import compiler
from pipeline.convert.npu.blob import MAGIC
from pipeline.device_check import NPU_ON_CPU, check_device
from pipeline.run.blobs import Choice, compile_chosen, static_on_cpu
from pipeline.run.openvino import F32, STATIC_ON_CPU, OpenvinoLogits, StaticLogits
from tests.convert.test_npu import properties_for_the_cpu
from tests.helpers import edit, edit_json, phi3

pytestmark = pytest.mark.slow
SHORTER = {"MAX_PROMPT_LEN": 256, "MIN_RESPONSE_LEN": 64}
FIGURES = {"kl_mean_default", "top1_agreement", "load_time_s", "time_to_first_token_s", "tokens_per_second"}
FIGURES |= {"peak_memory_bytes"}
COMPARED = r"compared at \d{3} tokens of 17 prompts"  # where the source nearly ties, CPUs may end an answer elsewhere


@pytest.fixture
def shorter(monkeypatch):
    """Ask one question and compare two prompts, on NPUs with at most 256 tokens: the static pipeline computes as much
    for each prompt as for the longest."""

    def two(directory):
        found = read_excerpt(directory)
        return found.model_copy(update={"answers": found.answers[:1], "passages": found.passages[::12]})

    monkeypatch.setattr("pipeline.check.excerpt.read_excerpt", two)
    monkeypatch.setattr("pipeline.run.blobs.asked_lengths", lambda blobs: SHORTER)


def test_the_static_pipeline_of_npus(released, shorter):
    """Without an NPU its static pipeline runs on the CPU, which the result says."""
    result = check_device(released("npu-int4-channelwise"), device=NPU_ON_CPU)
    assert (result.failures, result.figures["prompts"]) == ([], 2)
    assert result.figures["device"] == "CPU (the NPU's static pipeline, compiled for it)"
    assert all(result.figures[name] > 0 for name in FIGURES)


def test_the_static_pipeline_in_float32(released):
    """It has the lengths of params.yaml. In float32, token by token, its divergence is that of the plain IR, which
    validation measures."""
    directory = released("npu-int4-channelwise")
    answers, source = read_excerpt(directory).passages_up_to(256)
    first = len(answers[0].ids)
    few = Distributions(source.ids[:first], source.log_probs[:first])
    choice = static_on_cpu(directory)
    assert (choice.options["MAX_PROMPT_LEN"], choice.options["MIN_RESPONSE_LEN"]) == (1024, 128)
    static = StaticLogits(compile_chosen(directory, replace(choice, options=choice.options | SHORTER | F32)))
    plain = OpenvinoLogits(directory, device="CPU")
    found, expected = (compare(scorer, answers[:1], few) for scorer in (static, plain))
    np.testing.assert_allclose(found.kl, expected.kl, rtol=0.02, atol=5e-3)
    assert found.kl.mean() == pytest.approx(expected.kl.mean(), rel=0.01)


@pytest.mark.parametrize(("whole", "longest"), [(True, 256), (False, 128)], ids=["blob", "damaged-blob"])
def test_the_logits_of_a_blob(smol_phi3, tmp_path, monkeypatch, whole, longest):
    """With a blob, here one for the CPU, the logits are the blob's; when it is refused, the IR is compiled, for the
    lengths that the choice has for this case."""
    directory, blob = smol_phi3 / "npu-int4-channelwise", tmp_path / "cpu.blob"
    if whole:
        monkeypatch.setattr(compiler, "has_native_compiler", lambda: True)
        properties = properties_for_the_cpu(Npu(max_prompt_len=256, min_response_len=64)) | F32
        compiler.compile_blob(directory / "openvino_model.xml", blob, properties=properties)
    else:
        blob.write_bytes(MAGIC + bytes(1000))
    weights = {"BLOB_PATH": str(blob), "WEIGHTS_PATH": str(directory / "openvino_model.bin")}
    lengths = {"MAX_PROMPT_LEN": 128, "MIN_RESPONSE_LEN": 64, **STATIC_ON_CPU, **F32}
    scorer = StaticLogits(compile_chosen(directory, Choice("NPU", weights, "it fits", lengths)))
    ids = list(range(300, 340))
    found, expected = (each.logits(ids, last=4) for each in (scorer, OpenvinoLogits(directory, device="CPU")))
    assert np.abs(found - expected).max() < 0.25 * expected.std()  # a blob forgets F32
    assert scorer.logits([260] * longest, last=1).shape == (1, 49152)
    with pytest.raises(RuntimeError, match=str(longest)):
        scorer.logits([260] * (longest + 1), last=1)


def wrong_scales(directory):
    """Make the scales of one matrix three times as large, as a kernel would that reads them wrongly."""
    name = r'name="self\.model\.layers\.15\.mlp\.down_proj\._openvino_orig_weight/scale"'
    data = r'[^>]*>\s*<data element_type="f16" shape="[^"]*" offset="(\d+)" size="(\d+)"'
    found = re.search(name + data, (directory / "openvino_model.xml").read_text("utf-8"))
    start, size = map(int, found.groups())
    weights = np.fromfile(directory / "openvino_model.bin", dtype=np.uint8)
    scales = weights[start : start + size].view(np.float16)
    scales *= np.float16(3)
    weights.tofile(directory / "openvino_model.bin")


def wrong_precision(directory):
    """Let each matrix read its inputs in an 8-bit float and cut off at 2, which every CPU computes alike."""
    import openvino
    from openvino import opset15

    model = openvino.Core().read_model(directory / "openvino_model.xml")
    for node in model.get_ordered_ops():
        if node.get_type_name() == "MatMul" and "linear" in node.get_friendly_name():
            within = opset15.clamp(node.input_value(0), -2, 2)
            low = opset15.convert(opset15.convert(within, "f8e4m3"), "f32")
            node.input(0).replace_source_output(low.output(0))
    openvino.save_model(model, directory / "changed.xml", compress_to_fp16=False)
    del model
    for suffix in ("xml", "bin"):
        (directory / f"changed.{suffix}").replace(directory / f"openvino_model.{suffix}")


def wrong_onnx_scales(directory):
    """Make the scales of the first INT4 matrix of an ONNX model larger."""
    import onnx
    from onnx.numpy_helper import from_array, to_array

    model = onnx.load(directory / "model.onnx")
    matrix = next(node for node in model.graph.node if node.op_type == "MatMulNBits")
    scales = next(tensor for tensor in model.graph.initializer if tensor.name == matrix.input[2])
    scales.CopyFrom(from_array(3 * to_array(scales), scales.name))
    onnx.save(model, directory / "model.onnx", save_as_external_data=True, location="model.onnx.data")


@pytest.mark.parametrize(
    ("variant", "damage", "device", "kl"),
    [
        ("openvino-int4", wrong_scales, None, 0.5),
        ("openvino-int4", wrong_precision, None, 4),
        ("npu-int4-channelwise", wrong_scales, NPU_ON_CPU, 0.5),
        ("onnx-cpu-int4", wrong_onnx_scales, None, 0.5),
    ],
)
def test_a_device_that_computes_wrongly(released, shorter, tmp_path, monkeypatch, variant, damage, device, kl):
    """A device whose kernels compute something else, behind files that are as published, fails with the figures.

    A damaged copy, which only the runtime reads, stands for such a device.
    """
    directory = released(variant)
    damaged = shutil.copytree(directory, tmp_path / "damaged", copy_function=shutil.copyfile)
    damage(damaged)
    for name in ("_openvino", "_onnx"):
        original = getattr(device_check, name)
        monkeypatch.setattr(device_check, name, lambda _, *rest, original=original: original(damaged, *rest))
    result = check_device(directory, device=device)
    found, limits = result.figures, result.limits
    assert found["kl_mean_default"] > kl > limits["kl_mean"]
    assert found["top1_agreement"] < limits["top1_agreement"]
    reasons = [
        f"check 'fidelity' failed: expected \"kl_mean at most {limits['kl_mean']}\", got {found['kl_mean_default']}",
        f"check 'fidelity' failed: expected \"top1_agreement at least {limits['top1_agreement']}\", "
        f"got {found['top1_agreement']}",
    ]
    assert result.failures[-2:] == reasons


def test_a_failure_is_told(released, tmp_path, monkeypatch):
    """A device that gives no numbers fails; the command and its file say why."""

    class Nothing:
        def logits(self, ids, *, last):
            return np.full((last, 49152), np.nan, dtype=np.float32)

    file = tmp_path / "x.json"
    monkeypatch.setattr("pipeline.run.openvino.OpenvinoLogits", lambda *_, **__: Nothing())
    result = phi3("check", released("openvino-int4"), "--json", file, check=False)
    reason = 'check \'finite\' failed: expected "finite logits", got "21725184 logits that are not"'
    assert (result.returncode, result.stdout.splitlines()[-1]) == (1, reason)
    assert result.stderr == "Error: failed: this device does not compute what the source model says\n"
    found = json.loads(file.read_text())
    assert (found["passed"], found["failures"], "kl_mean_default" in found) == (False, [reason], False)


def refuse(message, monkeypatch):
    """Let openvino-genai fail with `message` when it loads an artifact."""

    def fail(*_):
        raise RuntimeError(message)

    monkeypatch.setattr("pipeline.run.blobs.load_chosen", fail)


def test_a_device_that_does_not_load_it(released, monkeypatch):
    """A device that cannot load the model fails with the runtime's last line; the table has the rest."""
    refuse("a long story\nthe device is lost", monkeypatch)
    result = check_device(released("openvino-int4"))
    expected = 'check \'load\' failed: expected "a runtime that loads and runs it", got "the device is lost"'
    assert result.failures == [expected]
    assert re.fullmatch(COMPARED, result.table().splitlines()[-1])


def test_lack_of_memory(released, monkeypatch):
    """When memory runs out, nothing is said of the device; the error says what to do."""
    refuse("Check 'ptr' failed at cpu_memory.cpp:257:\nFailed to allocate 4608000 bytes of memory\n", monkeypatch)
    with pytest.raises(PipelineError, match=r"^memory ran out: close other programs, or pull a smaller variant\.$"):
        check_device(released("openvino-int4"))


@pytest.mark.parametrize(
    ("variant", "device", "reason"),
    [
        (
            "npu-int4-channelwise",
            "NPU",
            "this machine has no NPU, or no driver for it: OpenVINO sees CPU. `--device NPU-ON-CPU` checks the NPU's "
            "pipeline on the CPU.",
        ),
        ("openvino-int4", "GPU", "this machine has no GPU, or no driver for it: OpenVINO sees CPU."),
        (
            "openvino-int4",
            NPU_ON_CPU,
            "smol-phi3/openvino-int4 is not made for NPUs: pull a variant that is, with `--for npu`.",
        ),
        ("onnx-cpu-int4", "GPU", "smol-phi3/onnx-cpu-int4 is made for the CPU, not for GPU."),
        (
            "onnx-directml-int4",
            "GPU",
            "this onnxruntime-genai has no DirectML, which is for Windows: `--device CPU` checks the model on the CPU.",
        ),
    ],
)
def test_a_device_that_is_not_here(released, variant, device, reason):
    """A device that the machine lacks, or that the artifact is not made for, is refused with a sentence."""
    with pytest.raises(PipelineError, match=f"^{re.escape(reason)}$"):
        check_device(released(variant), device=device)


def copy(release, target):
    """Return `target`, a copy of a release of which a test may change all but the weights."""

    def place(source, to):
        return os.link(source, to) if source.endswith(".bin") else shutil.copyfile(source, to)

    return shutil.copytree(release, target, copy_function=place)


def test_a_directory_that_was_built_here(smol_phi3):
    """What was not published does not carry what the source model says, and is refused with what to do."""
    with pytest.raises(PipelineError, match="was built here, and only a release carries what the source model says"):
        check_device(smol_phi3 / "openvino-int4")


def test_a_changed_file(released, tmp_path):
    """A release of which a file has changed is refused before it is loaded."""
    directory = copy(released("openvino-int4"), tmp_path / "model")
    edit(directory / EXCERPT, "Tokyo", "Kyoto")
    with pytest.raises(PipelineError, match=rf"model: {EXCERPT} has changed\. Remove it and pull it again"):
        check_device(directory)


@pytest.mark.parametrize(
    ("name", "reason"), [(EXCERPT, "was published without it"), ("metrics.json", "does not have the figures")]
)
def test_an_older_release(released, tmp_path, name, reason):
    """A release without the reference, or without metrics, is refused."""
    older = copy(released("openvino-int4"), tmp_path / "model")
    (older / name).unlink()
    files = json.loads((older / "release.json").read_text())["files"]
    del files[name]
    edit_json(older / "release.json", files=files)
    with pytest.raises(PipelineError, match=rf"{name} .*{reason}"):
        check_device(older)


def test_a_runtime_that_is_not_installed(released, monkeypatch):
    """Without the runtime that a release needs, the error says how to install it."""
    monkeypatch.setitem(sys.modules, "openvino_genai", None)
    with pytest.raises(PipelineError, match=r"openvino-int4\S* needs openvino-genai==2026\.4\.1\.0: pip install it"):
        check_device(released("openvino-int4"))
