"""Tiny random checkpoints in the three Phi styles pass through export, quantization and the ONNX builder."""

import json
import re

import numpy as np
import onnx
import pytest

from pipeline.common.checkpoint import read_json, tensor_shapes
from pipeline.common.errors import PipelineError
from pipeline.common.matrices import matrices, summary
from pipeline.common.params import OnnxInt4, OpenvinoFp16, OpenvinoInt4
from pipeline.convert import onnx_format, onnx_genai, openvino, openvino_format
from pipeline.convert.backend import backend
from pipeline.convert.onnx_builder import RESIDUAL_SCALE
from pipeline.run.onnx import OnnxGenai
from pipeline.run.openvino import OpenvinoGenai, OpenvinoLogits
from pipeline.run.source_model import Torch
from tests.checkpoints import STYLES, make_checkpoint
from tests.helpers import LIMITS, ROOT, run

pytestmark = pytest.mark.slow
FP16 = OpenvinoFp16(stage="export_openvino", limits=LIMITS)
INT4 = OpenvinoInt4(stage="quantize_openvino", limits=LIMITS, symmetric=True, group_size=128, ratio=0.6)
CHANNEL_WISE = OpenvinoInt4(stage="quantize_openvino", limits=LIMITS, symmetric=True, group_size=-1, ratio=1.0)
ONNX = {
    "stage": "build_onnx",
    "limits": LIMITS,
    "symmetric": True,
    "block_size": 32,
    "algorithm": "default",
    "int8": [],
}
PROMPT = "the capital of France is"


@pytest.fixture(scope="module", params=STYLES)
def style(request, tmp_path_factory):
    """The name of a style, its checkpoint, and that checkpoint's FP16 IR."""
    root = tmp_path_factory.mktemp(request.param)
    checkpoint = make_checkpoint(root / "checkpoint", request.param)
    (root / "fp16").mkdir()
    openvino.export_fp16(checkpoint, root / "fp16")
    return request.param, checkpoint, root / "fp16"


def options(checkpoint, recipe, *, adjust=False):
    """The arguments of a backend's expected_form and expected_size."""
    return {"recipe": recipe, "config": read_json(checkpoint / "config.json"), "adjust_group_size": adjust}


def assert_recipe(directory, checkpoint, recipe):
    """Assert that a built file holds the formats and the bytes of the recipe."""
    library = backend(recipe)
    built = library.read_matrices(directory)
    expected = [library.expected_form(matrix, **options(checkpoint, recipe)).format for matrix in built]
    assert [matrix.format for matrix in built] == expected
    source = matrices(tensor_shapes(checkpoint))
    assert sum(m.elements for m in built) == sum(m.elements for m in source)
    size = library.expected_size(source, **options(checkpoint, recipe))
    # With so few matrices NNCF cannot get close to the ratio asked for.
    tolerance = 0.03 if isinstance(recipe, OnnxInt4) else 0.25
    assert (directory / library.WEIGHTS).stat().st_size == pytest.approx(size, rel=tolerance)


def assert_same_model(runtime, scorer, checkpoint, *, correlation):
    """Assert that a runtime's ids equal the source's, and that its scorer's logits are near the source's."""
    source = Torch(checkpoint)
    ids = source.encode(source.render_chat([{"role": "user", "content": PROMPT}]))
    assert runtime.encode(runtime.render_chat([{"role": "user", "content": PROMPT}])) == ids
    assert runtime.eos_token_ids() == [0, 1]
    assert (
        np.corrcoef(scorer.logits(ids, last=len(ids)).ravel(), source.logits(ids, last=len(ids)).ravel())[0, 1]
        > correlation
    )
    assert len(runtime.generate(ids, max_new_tokens=8).ids) > 0


def test_fp16(style):
    """The FP16 IR has every weight in 16 bits and gives the source's logits, to within rounding."""
    _, checkpoint, fp16 = style
    assert_recipe(fp16, checkpoint, FP16)
    assert_same_model(
        OpenvinoGenai(fp16, device="CPU"), OpenvinoLogits(fp16, device="CPU"), checkpoint, correlation=0.99999
    )


@pytest.mark.parametrize("recipe", [INT4, CHANNEL_WISE], ids=["g128", "channel-wise"])
def test_int4(style, tmp_path, recipe):
    """Both INT4 recipes give the formats asked for, and logits close to the source's."""
    _, checkpoint, fp16 = style
    openvino.quantize_int4(fp16, tmp_path, recipe=recipe, adjust_group_size=False, calibration=None)
    assert_recipe(tmp_path, checkpoint, recipe)
    assert summary(openvino_format.read_matrices(tmp_path)).int4_ratio <= recipe.ratio
    scorer = OpenvinoLogits(tmp_path, device="CPU")
    assert_same_model(OpenvinoGenai(tmp_path, device="CPU"), scorer, checkpoint, correlation=0.95)


@pytest.mark.parametrize("provider", ["dml", "cpu"])
def test_onnx(style, tmp_path, provider, capsys):
    """The ONNX models for both providers have the formats asked for, and logits close to the source's."""
    _, checkpoint, _ = style
    recipe = OnnxInt4(execution_provider=provider, **ONNX)
    (tmp_path / "model").mkdir()
    onnx_genai.build_int4(
        checkpoint,
        tmp_path / "model",
        recipe=recipe,
        trust_remote_code=False,
        calibration=None,
    )
    shown = capsys.readouterr().out
    assert "reading layers: 2 of 2 in " in shown
    assert re.search(r"quantizing matrices: (\d+) of \1 in ", shown)
    assert "Extra options" in shown
    # The model has the same bytes in every checkout: by default it would name the commit of the project around .venv.
    head = run("git", "rev-parse", "HEAD", cwd=ROOT).stdout[:7]
    assert head.encode() not in (tmp_path / "model/model.onnx").read_bytes()
    assert_recipe(tmp_path / "model", checkpoint, recipe)
    scale = onnx_format.residual_scale(tmp_path / "model", config=read_json(checkpoint / "config.json"))
    assert scale == (RESIDUAL_SCALE if provider == "dml" else 1)
    model = OnnxGenai(tmp_path / "model")
    assert_same_model(model, model, checkpoint, correlation=0.95)


WRITERS_SCALE = r"\.(o_proj|down_proj)\..*_scale"
MIXED = {"algorithm": "rtn", "symmetric": False, "int8": ["last_matmul", "mixed_layers"]}
ONE_BY_ONE = {
    "phi-3-4k": {"execution_provider": "dml"} | MIXED,
    "phi-3-128k": {"execution_provider": "cpu"} | MIXED,  # its rotary embedding is a node with two branches
    "phi-4-mini": {"execution_provider": "cpu"} | MIXED,
}


def undivided(model):
    """Assert that a DirectML model's residual stream is divided, and return the model without that division."""
    (halving,) = (node for node in model.graph.node if node.name == "/model/embed_tokens/Mul")
    (factor,) = (node for node in model.graph.node if halving.input[1] in node.output)
    assert onnx.numpy_helper.to_array(factor.attribute[0].t) == 1 / RESIDUAL_SCALE
    for node in (halving, factor):
        model.graph.node.remove(node)
    for node in model.graph.node:
        node.input[:] = [halving.input[0] if name == halving.output[0] else name for name in node.input]
        for attribute in node.attribute:
            if attribute.name == "epsilon":
                attribute.f *= RESIDUAL_SCALE**2
    for tensor in model.graph.initializer:
        if re.search(WRITERS_SCALE, tensor.name):
            tensor.raw_data = (onnx.numpy_helper.to_array(tensor) * RESIDUAL_SCALE).tobytes()
    return model


def test_onnx_quantized_one_by_one(style, tmp_path, monkeypatch):
    """A model quantized matrix by matrix has exactly the nodes and bytes that the builder alone produces.

    For DirectML the residual stream is divided; apart from that, only the last bits of scales below float16's normal
    numbers differ.
    """
    name, checkpoint, _ = style
    built = []
    for module in ("pipeline.convert.onnx_builder", "onnxruntime_genai.models.builder"):
        target = tmp_path / module
        target.mkdir()
        monkeypatch.setattr(onnx_genai, "BUILDER", module)
        onnx_genai.build_int4(
            checkpoint,
            target,
            recipe=OnnxInt4(**ONNX | ONE_BY_ONE[name]),
            trust_remote_code=False,
            calibration=None,
        )
        model = onnx.load(target / "model.onnx")
        if name == "phi-3-4k" and module == "pipeline.convert.onnx_builder":
            model = undivided(model)
        weights = {tensor.name: (tensor.data_type, tensor.dims, tensor.raw_data) for tensor in model.graph.initializer}
        nodes = [
            (node.name, node.op_type, node.input, node.output, sorted(a.SerializeToString() for a in node.attribute))
            for node in model.graph.node
        ]
        built.append((weights, sorted(nodes), sorted((opset.domain, opset.version) for opset in model.opset_import)))
    divided = {name for name in built[0][0] if re.search(WRITERS_SCALE, name)}
    ours, theirs = (
        np.concatenate([np.frombuffer(part[0].pop(name)[2], np.float16) for name in divided]) for part in built
    )
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=RESIDUAL_SCALE * 2**-25 if name == "phi-3-4k" else 0)
    assert built[0] == built[1]


def test_a_group_size_that_does_not_divide(style, tmp_path):
    """Group size 256, which does not divide a width of 128, is an error, or becomes smaller if the model allows it."""
    _, checkpoint, fp16 = style
    recipe = INT4.model_copy(update={"group_size": 256})
    with pytest.raises(PipelineError, match="group size 256 does not divide the width of every layer: choose another"):
        openvino.quantize_int4(fp16, tmp_path, recipe=recipe, adjust_group_size=False, calibration=None)
    assert list(tmp_path.iterdir()) == []
    openvino.quantize_int4(fp16, tmp_path, recipe=recipe, adjust_group_size=True, calibration=None)
    built = openvino_format.read_matrices(tmp_path)
    assert {matrix.group_size for matrix in built if matrix.bits == 4} == {128, 256}
    forms = [openvino_format.expected_form(matrix, **options(checkpoint, recipe, adjust=True)) for matrix in built]
    assert [matrix.format for matrix in built] == [form.format for form in forms]


def test_a_tokenizer_without_openvino_form(tmp_path):
    """A tokenizer whose conversion fails silently gives an error with the reason."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "UnicodeScripts"}
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "fp16").mkdir()
    with pytest.raises(
        PipelineError, match=r"has no OpenVINO form, openvino_tokenizer\.xml was not written \(OpenVINO T"
    ):
        openvino.export_fp16(checkpoint, tmp_path / "fp16")
