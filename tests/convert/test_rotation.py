"""A rotated checkpoint computes the same function, and variants built from it are calibrated on the rotated inputs."""

import numpy as np
import openvino
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from pipeline.common.checkpoint import read_json, to_float16
from pipeline.common.errors import PipelineError
from pipeline.common.params import OnnxInt4, OpenvinoInt4
from pipeline.convert import onnx_genai
from pipeline.convert.calibration import Calibration
from pipeline.convert.hessians import hessians, write_calibration
from pipeline.convert.openvino import build_int4, export_fp16
from pipeline.convert.rotation import Hadamard, Rotation
from pipeline.convert.solver import Grid
from pipeline.convert.variant import asked
from pipeline.run.onnx import OnnxGenai
from pipeline.run.openvino import OpenvinoLogits
from pipeline.run.source_model import Torch
from tests.checkpoints import make_checkpoint
from tests.helpers import LIMITS

IDS = list(range(20, 60))
INT4 = OpenvinoInt4(
    stage="quantize_openvino", limits=LIMITS, symmetric=True, group_size=32, ratio=1.0, calibrated=True, rotated=True
)


def with_norms(checkpoint):
    """Return `checkpoint` with random norm weights, since those of a fresh model are all ones."""
    weights = load_file(checkpoint / "model.safetensors")
    torch.manual_seed(1)
    for name in (name for name in weights if name.endswith("norm.weight")):
        weights[name] = (torch.rand(weights[name].shape) + 0.5).to(weights[name].dtype)
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    return checkpoint


def difference(found, expected):
    """Return the relative distance of logits from the expected ones; for unrelated logits it is 1.4."""
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny checkpoint with a head of its own and two queries to a key."""
    return with_norms(make_checkpoint(tmp_path_factory.mktemp("rotation") / "checkpoint", num_key_value_heads=2))


@pytest.fixture(scope="module")
def statistics(checkpoint, tmp_path_factory):
    """The calibration directory of `checkpoint`."""
    target = tmp_path_factory.mktemp("rotation") / "calibration"
    write_calibration(target, answers=[IDS, IDS[::-1]], layers=hessians(Torch(checkpoint), [IDS, IDS[::-1]]))
    return target


def test_the_same_function(checkpoint):
    """In float32 the rotated weights, all of them changed, give the logits of the checkpoint."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.inference_mode():
        before = model(torch.tensor([IDS])).logits
        rotation, own = Rotation(checkpoint), model.state_dict()
        rotated = {name: rotation.weight(name) for name in own}
        assert not any(torch.allclose(rotated[name], own[name], atol=1e-3) for name in own)
        model.load_state_dict(rotated)
        torch.testing.assert_close(model(torch.tensor([IDS])).logits, before, atol=1e-5, rtol=1e-4)
    assert all((rotated[name] == 1).all() for name in own if name.endswith("norm.weight"))


def test_statistics(checkpoint, statistics, tmp_path):
    """Every matrix's H, and its largest diagonal element, is that of the rotated model reading the same answers."""
    rotated = tmp_path / "checkpoint"
    rotated.mkdir()
    to_float16(checkpoint, rotated, weight=Rotation(checkpoint).weight)
    write_calibration(tmp_path / "calibration", answers=[IDS], layers=hessians(Torch(rotated), [IDS, IDS[::-1]]))
    expected = Calibration(tmp_path / "calibration", rotated)
    found = Calibration(statistics, checkpoint, rotated=True)
    for matrix, largest in expected.largest().items():
        torch.testing.assert_close(
            found._hessian(matrix), expected._hessian(matrix), rtol=1e-2, atol=1e-2 * largest, msg=matrix
        )
    assert found.largest() == pytest.approx(expected.largest(), rel=1e-2)
    assert found.largest() != pytest.approx(Calibration(statistics, checkpoint).largest(), rel=1e-2)


@pytest.mark.parametrize("size", [2, 12, 20, 32, 96, 576, 3072, 5120])
def test_a_rotation_spreads_evenly(size):
    """The rotation is orthogonal, each column of the model goes in equal parts to all columns, and rows turn alike."""
    hadamard = Hadamard(size, torch.Generator().manual_seed(0))
    rotation = hadamard.turn(torch.eye(size), 1)
    torch.testing.assert_close(hadamard.turn(torch.eye(size), 0), rotation.T)
    torch.testing.assert_close(rotation.abs(), torch.full((size, size), size**-0.5))
    some = slice(None, None, 1 + size // 97)  # rows, since all of them would take seconds
    torch.testing.assert_close(rotation[some] @ rotation.T, torch.eye(size)[some], atol=1e-5, rtol=0)


def test_a_width_without_a_rotation():
    """A width for which no rotation is known is refused with a sentence."""
    with pytest.raises(PipelineError, match=r"rotated: no rotation of 7 columns is known here.*: set rotated: false\."):
        Hadamard(7, torch.Generator())


def test_a_model_whose_head_is_its_embedding(tmp_path, capsys):
    """A model whose head is its embedding is not rotated; the output says so, and the manifest claims no rotation."""
    tied = make_checkpoint(tmp_path / "checkpoint", "phi-4-mini")
    write_calibration(tmp_path / "calibration", answers=[IDS], layers=hessians(Torch(tied), [IDS]))
    assert Calibration(tmp_path / "calibration", tied, rotated=True).rotation is None
    assert "not rotated, since the model's head is its embedding" in capsys.readouterr().out
    assert asked(INT4, read_json(tied / "config.json"))["rotated"] is False
    assert asked(INT4, {"tie_word_embeddings": False})["rotated"] is True


@pytest.mark.slow
def test_fp16(checkpoint, tmp_path):
    """The rotated FP16 IR gives the checkpoint's logits, to within rounding."""
    export_fp16(checkpoint, tmp_path, weight=Rotation(checkpoint).weight)
    expected = Torch(checkpoint).logits(IDS, last=40)
    np.testing.assert_allclose(OpenvinoLogits(tmp_path, device="CPU").logits(IDS, last=40), expected, atol=5e-3)


@pytest.fixture(scope="module")
def calibration(checkpoint, statistics):
    """The calibration of the rotated model."""
    return Calibration(statistics, checkpoint, rotated=True)


@pytest.fixture(scope="module")
def int4(checkpoint, calibration, tmp_path_factory):
    """The rotated INT4 IR."""
    target = tmp_path_factory.mktemp("rotation") / "int4"
    target.mkdir()
    build_int4(
        checkpoint,
        target.parent / "not-read",
        target,
        recipe=INT4,
        adjust_group_size=False,
        trust_remote_code=False,
        calibration=calibration,
    )
    return target


@pytest.mark.slow
def test_what_an_ir_stores(calibration, int4):
    """The INT4 IR holds the scales that were solved for the rotated weights, and the FP16 IR is not left beside it."""
    assert not [path for path in int4.iterdir() if path.is_dir()]
    scales = {
        node.get_friendly_name(): node.data
        for node in openvino.Core().read_model(int4 / "openvino_model.xml").get_ops()
        if node.get_friendly_name().endswith("/scale")
    }
    grid = Grid(bits=4, group_size=32, symmetric=True, scale_dtype=torch.float16)
    for matrix in calibration.summary.largest.keys() - {"lm_head"}:
        (stored,) = (data for name, data in scales.items() if name.startswith(f"self.{matrix}."))
        np.testing.assert_array_equal(stored[..., 0], calibration.quantize(matrix, grid).scales.half().numpy())


@pytest.mark.slow
def test_int4(checkpoint, int4):
    """The rotated INT4 IR gives the checkpoint's logits, to within the error of INT4."""
    expected = Torch(checkpoint).logits(IDS, last=40)
    assert difference(OpenvinoLogits(int4, device="CPU").logits(IDS, last=40), expected) < 0.08


@pytest.mark.slow
@pytest.mark.parametrize("provider", ["dml", "cpu"])
def test_onnx(checkpoint, calibration, tmp_path, provider):
    """A rotated ONNX model gives the checkpoint's logits, to within the error of INT4."""
    recipe = OnnxInt4(
        stage="build_onnx",
        limits=LIMITS,
        execution_provider=provider,
        algorithm="rtn",
        symmetric=False,
        block_size=32,
        calibrated=True,
        rotated=True,
        int8=["last_matmul"],
    )
    onnx_genai.build_int4(checkpoint, tmp_path, recipe=recipe, trust_remote_code=False, calibration=calibration)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    expected = Torch(checkpoint).logits(IDS, last=40)
    assert difference(OnnxGenai(tmp_path).logits(IDS, last=40), expected) < 0.08
