"""Tiny random checkpoints in the three Phi styles pass through export, quantization and the ONNX builder."""

import contextlib
import io
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest

from pipeline.check.measurement import load_runtime, load_scorer
from pipeline.common.checkpoint import read_json, tensor_shapes
from pipeline.common.context import limits
from pipeline.common.errors import PipelineError
from pipeline.common.matrices import matrices, summary
from pipeline.common.params import OnnxInt4, OpenvinoFp16, OpenvinoInt4, Variant
from pipeline.convert import onnx_format, onnx_genai, openvino, openvino_format
from pipeline.convert.backend import backend
from pipeline.convert.onnx_builder import RESIDUAL_SCALE
from pipeline.run.source_model import Torch
from tests.checkpoints import STYLES, make_checkpoint
from tests.helpers import LIMITS, ROOT, edit_json, run

pytestmark = pytest.mark.slow
INT4 = OpenvinoInt4(stage="quantize_openvino", limits=LIMITS, symmetric=True, group_size=128, ratio=0.6)
ONNX = {
    "stage": "build_onnx",
    "limits": LIMITS,
    "symmetric": True,
    "block_size": 32,
    "algorithm": "default",
    "int8": [],
}
RECIPES = {
    "fp16": OpenvinoFp16(stage="export_openvino", limits=LIMITS),
    "g128": INT4,
    "channel-wise": INT4.model_copy(update={"group_size": -1, "ratio": 1.0}),
    "dml": OnnxInt4(execution_provider="dml", **ONNX),
    "cpu": OnnxInt4(execution_provider="cpu", **ONNX),
}
WIDE = INT4.model_copy(update={"group_size": 256})
CORRELATION = {"fp16": 0.99999}  # of a variant's logits with the source's, at least; of the others 0.95
NEAR = 0.02  # in nats: a runtime's logits may differ from those of its scorer by as much
PROMPT = [{"role": "user", "content": "the capital of France is"}]


@pytest.fixture(scope="module", params=STYLES)
def style(request, tiny_checkpoint, tiny_ir, tmp_path_factory):
    """The name of a style, its checkpoint, and that checkpoint's FP16 IR."""
    if request.param == "phi-3-4k":
        return request.param, tiny_checkpoint, tiny_ir
    root = tmp_path_factory.mktemp(request.param)
    checkpoint = make_checkpoint(root / "checkpoint", request.param)
    (root / "fp16").mkdir()
    openvino.export_fp16(checkpoint, root / "fp16")
    return request.param, checkpoint, root / "fp16"


@dataclass(frozen=True)
class Built:
    """A variant of a tiny checkpoint, and what was printed when it was built."""

    name: str
    recipe: Variant
    checkpoint: Path
    directory: Path
    output: str

    def scorer(self):
        """Its logits in float32."""
        config = read_json(self.checkpoint / "config.json")
        return load_scorer(self.directory, variant=self.recipe, context=limits(config, directml=False))


@pytest.fixture(scope="module", params=RECIPES)
def built(request, style, tmp_path_factory):
    """Each of RECIPES for a checkpoint of each style."""
    (_, checkpoint, fp16), recipe = style, RECIPES[request.param]
    directory, output = tmp_path_factory.mktemp(request.param), io.StringIO()
    with contextlib.redirect_stdout(output):
        if request.param == "fp16":
            directory = fp16
        elif isinstance(recipe, OnnxInt4):
            onnx_genai.build_int4(checkpoint, directory, recipe=recipe, trust_remote_code=False, calibration=None)
        else:
            openvino.quantize_int4(fp16, directory, recipe=recipe, adjust_group_size=False, calibration=None)
    return Built(request.param, recipe, checkpoint, directory, output.getvalue())


of_onnx = pytest.mark.parametrize("built", ["dml", "cpu"], indirect=True)


def options(checkpoint, recipe, *, adjust=False):
    """The arguments of a backend's expected_form and expected_size."""
    return {"recipe": recipe, "config": read_json(checkpoint / "config.json"), "adjust_group_size": adjust}


def test_formats(built):
    """Every weight of the source is there, in the format that the recipe gives it."""
    library = backend(built.recipe)
    found = library.read_matrices(built.directory)
    expected = [library.expected_form(matrix, **options(built.checkpoint, built.recipe)).format for matrix in found]
    assert [matrix.format for matrix in found] == expected
    source = matrices(tensor_shapes(built.checkpoint))
    assert sum(matrix.elements for matrix in found) == sum(matrix.elements for matrix in source)
    if isinstance(built.recipe, OpenvinoInt4):
        assert summary(found).int4_ratio <= built.recipe.ratio


def test_size(built):
    """The weights have the size that the recipe predicts."""
    library = backend(built.recipe)
    size = library.expected_size(matrices(tensor_shapes(built.checkpoint)), **options(built.checkpoint, built.recipe))
    # With so few matrices NNCF cannot get close to the ratio asked for.
    tolerance = 0.03 if isinstance(built.recipe, OnnxInt4) else 0.25
    assert (built.directory / library.WEIGHTS).stat().st_size == pytest.approx(size, rel=tolerance)


def test_tokenizer(built):
    """The runtime renders and encodes a chat as the source does, and ends with the same ids."""
    runtime, source = load_runtime(built.directory, variant=built.recipe), Torch(built.checkpoint)
    assert runtime.encode(runtime.render_chat(PROMPT)) == source.encode(source.render_chat(PROMPT))
    assert runtime.eos_token_ids() == [0, 1]


def test_logits(built):
    """The logits are near the source's: those of FP16 to within rounding, those of INT4 by correlation."""
    source = Torch(built.checkpoint)
    ids = source.encode(source.render_chat(PROMPT))
    found, expected = (scorer.logits(ids, last=len(ids)).ravel() for scorer in (built.scorer(), source))
    assert np.corrcoef(found, expected)[0, 1] > CORRELATION.get(built.name, 0.95)


def test_generation(built):
    """The runtime generates tokens that the variant's own logits prefer."""
    runtime, source = load_runtime(built.directory, variant=built.recipe), Torch(built.checkpoint)
    prompt = source.encode(source.render_chat(PROMPT))
    said = runtime.generate(prompt, max_new_tokens=8).ids
    logits = built.scorer().logits(prompt + said[:-1], last=len(said))
    assert (logits.max(axis=1) - logits[np.arange(len(said)), said]).max() < NEAR


@of_onnx
def test_progress_of_the_onnx_builder(built):
    """The layers that are read and the matrices that are quantized are counted, and the builder's own lines kept."""
    assert "reading layers: 2 of 2 in " in built.output
    assert re.search(r"quantizing matrices: (\d+) of \1 in ", built.output)
    assert "Extra options" in built.output


@of_onnx
def test_the_same_bytes_in_every_checkout(built):
    """An ONNX model does not name a commit: by default it would name that of the project around .venv."""
    head = run("git", "rev-parse", "HEAD", cwd=ROOT).stdout[:7]
    assert head.encode() not in (built.directory / "model.onnx").read_bytes()


@of_onnx
def test_the_residual_scale(built):
    """The residual stream is divided for DirectML alone, which is read back from the model."""
    scale = onnx_format.residual_scale(built.directory, config=read_json(built.checkpoint / "config.json"))
    assert scale == (RESIDUAL_SCALE if built.name == "dml" else 1)


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
    """Group size 256, which does not divide a width of 128, is an error, and nothing is written."""
    _, _, fp16 = style
    with pytest.raises(PipelineError, match="group size 256 does not divide the width of every layer: choose another"):
        openvino.quantize_int4(fp16, tmp_path, recipe=WIDE, adjust_group_size=False, calibration=None)
    assert list(tmp_path.iterdir()) == []


def test_a_group_size_that_is_adjusted(style, tmp_path):
    """If the model allows it, the group size is halved where it does not divide the width."""
    _, checkpoint, fp16 = style
    openvino.quantize_int4(fp16, tmp_path, recipe=WIDE, adjust_group_size=True, calibration=None)
    found = openvino_format.read_matrices(tmp_path)
    assert {matrix.group_size for matrix in found if matrix.bits == 4} == {128, 256}
    forms = [openvino_format.expected_form(matrix, **options(checkpoint, WIDE, adjust=True)) for matrix in found]
    assert [matrix.format for matrix in found] == [form.format for form in forms]


def test_a_tokenizer_without_openvino_form(tmp_path):
    """A tokenizer whose conversion fails silently gives an error with the reason."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint")
    edit_json(checkpoint / "tokenizer.json", pre_tokenizer={"type": "UnicodeScripts"})
    (tmp_path / "fp16").mkdir()
    with pytest.raises(
        PipelineError, match=r"has no OpenVINO form, openvino_tokenizer\.xml was not written \(OpenVINO T"
    ):
        openvino.export_fp16(checkpoint, tmp_path / "fp16")
