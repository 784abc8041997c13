"""Calibration data are the model's own answers and statistics of each matrix's inputs; quantization uses them."""

import copy
import json
import shutil

import numpy as np
import onnx
import openvino
import pytest
import torch
from safetensors.torch import load_file

from pipeline.common.checkpoint import open_weights, read_json
from pipeline.common.errors import PipelineError
from pipeline.common.params import OnnxInt4, OpenvinoInt4
from pipeline.convert import onnx_format, onnx_genai
from pipeline.convert.calibration import Calibration
from pipeline.convert.hessians import hessians, make_calibration, write_calibration
from pipeline.convert.onnx_builder import RESIDUAL_SCALE
from pipeline.convert.openvino import quantize_int4
from pipeline.convert.solver import Grid
from pipeline.convert.statistics import fold, unfold
from pipeline.run.prompts import load_prompts
from pipeline.run.source_model import Torch
from tests.checkpoints import STYLES, make_checkpoint
from tests.helpers import LIMITS

ANSWERS = [[20 + (7 * i + j * j) % 200 for j in range(30 + i)] for i in range(4)]
LAYERS = ("model.layers.0", "model.layers.1")


@pytest.fixture(scope="module")
def calibrated(tiny_checkpoint, tmp_path_factory):
    """A calibration directory of the tiny checkpoint."""
    target = tmp_path_factory.mktemp("calibrated") / "calibration"
    write_calibration(target, answers=ANSWERS, layers=hessians(Torch(tiny_checkpoint), ANSWERS))
    return target


def test_chat_and_answer(tiny_checkpoint, tiny_ir):
    """Each sequence is a rendered chat with the model's greedy answer to it."""
    source, prompts = Torch(tiny_checkpoint), load_prompts("calibration")[:3]
    wide = copy.deepcopy(source.model).float()
    sequences = make_calibration(source, tiny_ir, prompts, max_new_tokens=8)
    for prompt, sequence in zip(prompts, sequences, strict=True):
        rendered = torch.tensor([source.encode(source.render_chat(prompt.messages))])
        assert sequence == wide.generate(rendered, max_new_tokens=8, do_sample=False)[0].tolist()


@pytest.mark.parametrize("style", STYLES)
def test_statistics(tmp_path, style, capsys, monkeypatch):
    """Every matrix's H is X'X over its inputs in the whole model, for all answers; too few tokens are reported."""
    monkeypatch.setattr("pipeline.convert.hessians.BLOCK", 100)  # the last block of columns is smaller
    source = Torch(make_checkpoint(tmp_path / "checkpoint", style))
    write_calibration(tmp_path / "calibration", answers=ANSWERS, layers=hessians(source, ANSWERS))
    inputs: dict[str, list[torch.Tensor]] = {}
    wide = copy.deepcopy(source.model).float()
    for name, module in wide.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda module, given, name=name: inputs.setdefault(name, []).append(given[0][0].double())
            )
    with torch.inference_mode():
        for ids in ANSWERS:
            wide(torch.tensor([ids]))
    expected = {name: torch.cat(parts).T @ torch.cat(parts) for name, parts in inputs.items()}
    found = {}
    for path in (tmp_path / "calibration").glob("*.safetensors"):
        found |= {name: unfold(folded) for name, folded in load_file(path).items()}
    assert found.keys() == expected.keys()
    for name, h in found.items():
        torch.testing.assert_close(h.double(), expected[name], rtol=1e-3, atol=1e-3 * float(expected[name].abs().max()))
    summary = json.loads((tmp_path / "calibration/summary.json").read_text())
    assert summary["answers"] == ANSWERS
    assert summary["largest"] == {name: float(h.diagonal().max()) for name, h in found.items()}
    assert (
        "calibrated on 126 tokens, and the widest matrix has 256 columns: 512 tokens would be b"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("size", [2, 6, 8])
def test_half_of_a_symmetric_matrix(size):
    """A folded matrix holds each number of the upper triangle once, and unfolding restores it exactly."""
    numbers = torch.rand(size, size)
    symmetric = numbers.triu() + numbers.triu(1).T
    folded = fold(symmetric)
    assert sorted(folded.flatten().tolist()) == sorted(numbers[numbers.triu() > 0].tolist())
    assert torch.equal(unfold(folded), symmetric)


def test_without_calibration(tmp_path):
    """Without calibration data the error names the stage that makes them."""
    with pytest.raises(PipelineError, match=r"summary\.json is missing: run the stage calibrate first"):
        Calibration(tmp_path, tmp_path)


def test_an_interrupted_calibration(tmp_path):
    """A calibration that fails after its first layer leaves nothing behind, and the earlier one as it was."""

    def layers(size, *, fail=False):
        yield "model.layers.0", {"model.layers.0.mlp.down_proj": torch.eye(size)}
        if fail:
            raise RuntimeError("killed")

    def content():
        return {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    for earlier in (False, True):
        if earlier:
            write_calibration(tmp_path / "calibration", answers=[[1]], layers=layers(4))
        before = content()
        with pytest.raises(RuntimeError, match="killed"):
            write_calibration(tmp_path / "calibration", answers=[[2]], layers=layers(8, fail=True))
        assert content() == before
    assert {path.name for path in before} == {"model.layers.0.safetensors", "summary.json"}


def constants(directory):
    """Return the constants of the IR in `directory`: type, shape and bytes, by name."""
    return {
        node.get_friendly_name(): (str(node.get_output_element_type(0)), list(node.shape), node.data.tobytes())
        for node in openvino.Core().read_model(directory / "openvino_model.xml").get_ops()
        if node.get_type_name() == "Constant" and len(node.shape) > 1
    }


def unpacked(data, *, signed=False):
    """Return the 4-bit numbers of packed bytes, the low half first."""
    packed = np.frombuffer(data, np.uint8)
    codes = np.stack([packed & 0xF, packed >> 4], -1).reshape(-1).astype(np.int64)
    return codes - 16 * (codes > 7) if signed else codes


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [-1, 32])
def test_openvino_stores_what_was_solved(tiny_checkpoint, tiny_ir, calibrated, tmp_path, symmetric, group_size):
    """In an IR the layers' codes, scales and zero points are the solver's, and everything else is NNCF's."""
    calibration = Calibration(calibrated, tiny_checkpoint)
    recipe = OpenvinoInt4(
        stage="quantize_openvino", limits=LIMITS, symmetric=symmetric, group_size=group_size, ratio=1.0
    )
    for name, known in {"plain": None, "solved": calibration}.items():
        (tmp_path / name).mkdir()
        quantize_int4(tiny_ir, tmp_path / name, recipe=recipe, adjust_group_size=False, calibration=known)
    texts = [(tmp_path / name / "openvino_model.xml").read_text() for name in ("plain", "solved")]
    assert texts[0].count("<layer ") == texts[1].count("<layer ")
    plain, solved = constants(tmp_path / "plain"), constants(tmp_path / "solved")
    assert {name: value[:2] for name, value in plain.items()} == {name: value[:2] for name, value in solved.items()}
    grid = Grid(bits=4, group_size=group_size, symmetric=symmetric, scale_dtype=torch.float16)
    for layer in LAYERS:
        for part in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"):
            matrix = f"{layer}.{part}"
            weight = next(name for name in solved if name.startswith(f"self.{matrix}.") and "/" not in name)
            _, shape, codes = solved.pop(weight)
            _, _, scales = solved.pop(f"{weight}/scale")
            codes = unpacked(codes, signed=symmetric).reshape(shape)
            if not symmetric:
                _, zero_shape, zeros = solved.pop(f"{weight}/zero_point")
                codes = codes - unpacked(zeros)[: np.prod(zero_shape)].reshape(zero_shape)
            values = codes.astype(np.float32) * np.frombuffer(scales, np.float16).astype(np.float32).reshape(
                *shape[:-1], 1
            )
            expected = calibration.quantize(matrix, grid).weights()
            np.testing.assert_array_equal(values.reshape(expected.shape), expected)
    assert solved == {name: plain[name] for name in solved}


@pytest.mark.slow
def test_the_layers_with_the_largest_inputs_stay_int8(tiny_checkpoint, tiny_ir, calibrated, tmp_path):
    """With a ratio below 1 the matrices with the largest inputs are INT8, as many as the ratio requires."""
    calibration = Calibration(calibrated, tiny_checkpoint)
    calibration.summary.largest["model.layers.1.mlp.down_proj"] = 1e9
    recipe = OpenvinoInt4(stage="quantize_openvino", limits=LIMITS, symmetric=True, group_size=32, ratio=0.95)
    quantize_int4(tiny_ir, tmp_path, recipe=recipe, adjust_group_size=False, calibration=calibration)
    bits = {
        name: kind
        for name, (kind, _, _) in constants(tmp_path).items()
        if name.startswith("self.model.layers") and "/" not in name
    }
    assert [name.split(".weight")[0].split("._openvino")[0] for name, kind in bits.items() if "uint8" in kind] == [
        "self.model.layers.1.mlp.down_proj"
    ]
    assert len(bits) == 8


def test_bits_that_are_not_given(tiny_checkpoint, calibrated, tmp_path):
    """A node of an ONNX model that leaves out `bits`, whose default is 4, is read as INT4 and calibrated."""
    names, shapes = ("codes", "scales"), ((128, 8, 16), (128, 8))
    tensors = [
        onnx.numpy_helper.from_array(np.zeros(shape, dtype), name)
        for name, shape, dtype in zip(names, shapes, (np.uint8, np.float32), strict=True)
    ]
    name, form = "/model/layers.0/mlp/down_proj/MatMul_Q4", {"K": 256, "N": 128, "block_size": 32}
    node = onnx.helper.make_node("MatMulNBits", ["x", *names], ["y"], name=name, domain="com.microsoft", **form)
    graph = onnx.helper.make_graph([node], "graph", [], [], tensors)
    onnx.save(
        onnx.helper.make_model(graph),
        tmp_path / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=0,
    )
    assert [matrix.format for matrix in onnx_format.read_matrices(tmp_path)] == ["int4-sym-g32"]
    calibration = Calibration(calibrated, tiny_checkpoint)
    onnx_genai.solve(tmp_path, calibration, read_json(tiny_checkpoint / "config.json"), directml=False)
    codes, scales = map(onnx.numpy_helper.to_array, onnx.load(tmp_path / "model.onnx").graph.initializer)
    grid = Grid(bits=4, group_size=32, symmetric=True, scale_dtype=torch.float32)
    expected = calibration.quantize("model.layers.0.mlp.down_proj", grid)
    np.testing.assert_array_equal(unpacked(codes.tobytes()).reshape(128, 256), expected.codes)
    np.testing.assert_array_equal(scales, expected.scales)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("style", "provider", "options"),
    [
        ("phi-3-4k", "dml", {"symmetric": False, "algorithm": "rtn", "block_size": 32, "int8": ["mixed_layers"]}),
        ("phi-4-mini", "cpu", {"symmetric": True, "algorithm": "default", "block_size": 128, "int8": []}),
        ("phi-3-128k", "dml", {"symmetric": True, "algorithm": "default", "block_size": 32, "int8": []}),
        ("phi-3-128k", "cpu", {"symmetric": False, "algorithm": "rtn", "block_size": 32, "int8": ["last_matmul"]}),
    ],
)
def test_onnx_stores_what_was_solved(tmp_path, style, provider, options):
    """In an ONNX model the INT4 matrices' codes, scales and zero points are the solver's; for DirectML, scales of those
    that write to the residual stream are divided; everything else is the builder's."""
    checkpoint = make_checkpoint(tmp_path / "checkpoint", style)
    write_calibration(tmp_path / "calibration", answers=ANSWERS, layers=hessians(Torch(checkpoint), ANSWERS))
    calibration = Calibration(tmp_path / "calibration", checkpoint)
    recipe = OnnxInt4(stage="build_onnx", limits=LIMITS, execution_provider=provider, **options)
    config = read_json(checkpoint / "config.json")
    (tmp_path / "plain").mkdir()
    onnx_genai.build_int4(checkpoint, tmp_path / "plain", recipe=recipe, trust_remote_code=False, calibration=None)
    shutil.copytree(tmp_path / "plain", tmp_path / "solved")
    onnx_genai.solve(tmp_path / "solved", calibration, config, directml=recipe.directml)
    models = [onnx.load(tmp_path / name / "model.onnx") for name in ("plain", "solved")]
    plain, solved = ({t.name: t for t in model.graph.initializer} for model in models)
    weights = open_weights(checkpoint)
    count = 0
    for node in models[1].graph.node:
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        if node.op_type != "MatMulNBits" or attributes["bits"] != 4:
            continue
        count += 1
        matrix, rows = onnx_genai._origin(onnx_format.matrix_name(node.name), config)
        columns, block = attributes["K"], attributes["block_size"]
        blocks = -(-columns // block)
        names = [name for name in node.input[1:] if name]
        codes, scales, *zeros = (onnx.numpy_helper.to_array(solved.pop(name)) for name in names)
        codes = unpacked(codes.tobytes()).reshape(-1, blocks, block)
        zero = 8
        if zeros:
            zero = unpacked(zeros[0].tobytes()).reshape(len(codes), -1)[:, :blocks, None]
        values = (codes - zero).astype(np.float32) * scales.astype(np.float32).reshape(len(codes), blocks, 1)
        values = values.reshape(len(codes), -1)[:, :columns]
        divisor = RESIDUAL_SCALE if provider == "dml" and matrix.endswith(("o_proj", "down_proj")) else 1
        grid = Grid(
            bits=4,
            group_size=block,
            symmetric=not zeros,
            scale_dtype=torch.float16 if provider == "dml" else torch.float32,
            scale_divisor=divisor,
        )
        expected = calibration.quantize(matrix, grid, rows=rows).weights().numpy()
        np.testing.assert_array_equal(values * divisor, expected)
        # These are the right rows of the fused matrix.
        own = weights(f"{matrix}.weight")[rows].numpy()
        assert np.corrcoef(values.ravel(), own.ravel())[0, 1] > 0.95
        assert attributes["N"] == len(own)
    assert count >= 6
    assert solved == {name: plain[name] for name in solved}
