"""Calibration data are the model's own answers, and quantization uses them."""

import json

import openvino
import pytest

from pipeline.calibration import make_calibration, read_calibration
from pipeline.openvino import export_fp16, quantize_int4
from pipeline.params import OpenvinoInt4
from pipeline.prompts import load_prompts
from pipeline.source_model import Torch


def test_chat_and_answer(tiny_checkpoint, tmp_path):
    """Each sequence is a rendered chat with the model's answer to it."""
    source, prompts = Torch(tiny_checkpoint), load_prompts("calibration")[:3]
    sequences = make_calibration(source, prompts, max_new_tokens=8)
    for prompt, sequence in zip(prompts, sequences, strict=True):
        rendered = source.encode(source.render_chat(prompt.messages))
        assert sequence == rendered + source.generate(rendered, max_new_tokens=8).ids
    (tmp_path / "calibration.json").write_text(json.dumps(sequences))
    assert read_calibration(tmp_path / "calibration.json") == sequences


@pytest.mark.slow
def test_statistics_are_collected_in_float32(tiny_checkpoint, tmp_path, monkeypatch):
    """Every model that NNCF runs while it calibrates computes in float32, also where the CPU has bfloat16."""
    (tmp_path / "fp16").mkdir()
    export_fp16(tiny_checkpoint, tmp_path / "fp16")
    precisions = []
    compile_model = openvino.Core.compile_model

    def recorded(core, *arguments, **options):
        compiled = compile_model(core, *arguments, **options)
        precisions.append(compiled.get_property("INFERENCE_PRECISION_HINT"))
        return compiled

    monkeypatch.setattr(openvino.Core, "compile_model", recorded)
    (tmp_path / "int4").mkdir()
    options = {"calibrated": True, "awq": True, "scale_estimation": True, "gptq": True}
    quantize_int4(
        tmp_path / "fp16",
        tmp_path / "int4",
        recipe=OpenvinoInt4(stage="quantize_openvino", symmetric=True, group_size=32, ratio=1.0, **options),
        adjust_group_size=False,
        calibration=[list(range(20, 60))],
    )
    assert len(precisions) > 2
    assert set(precisions) == {openvino.Type.f32}


@pytest.mark.slow
def test_calibrated_weights_differ(tiny_checkpoint, tmp_path):
    """A calibrated recipe gives weights of the same size that are not those of the data-free one."""
    sequences = [[20 + (7 * i + j) % 200 for j in range(40)] for i in range(4)]
    contents = []
    (tmp_path / "fp16").mkdir()
    export_fp16(tiny_checkpoint, tmp_path / "fp16")
    for name, options in {
        "plain": {},
        "calibrated": {"calibrated": True, "scale_estimation": True},
        "gptq": {"calibrated": True, "gptq": True, "sensitivity_metric": "max_activation_variance"},
    }.items():
        (tmp_path / name).mkdir()
        recipe = OpenvinoInt4(stage="quantize_openvino", symmetric=True, group_size=32, ratio=0.6, **options)
        quantize_int4(
            tmp_path / "fp16",
            tmp_path / name,
            recipe=recipe,
            adjust_group_size=False,
            calibration=sequences,
        )
        contents.append((tmp_path / name / "openvino_model.bin").read_bytes())
    assert len(set(contents)) == 3
    assert max(map(len, contents)) < 1.05 * min(map(len, contents))
