"""Each violation of DirectML's rules is found, in graphs of one node."""

import pytest
from onnx import TensorProto, helper, save

from pipeline.check.directml.operators import MS, find_faults

FLOAT16, UINT8 = TensorProto.FLOAT16, TensorProto.UINT8
WEIGHTS = {"K": 64, "N": 8, "block_size": 32, "bits": 4}


def graph(path, kind, inputs, *, domain=MS, type_=FLOAT16, **attributes):
    """Write a graph of one node `n` with its inputs and attributes, and return the file."""
    values = [helper.make_tensor_value_info(name, type_, None) for name in inputs if name]
    node = helper.make_node(kind, inputs, ["out"], name="n", domain=domain, **attributes)
    output = helper.make_tensor_value_info("out", type_, None)
    save(helper.make_model(helper.make_graph([node], "g", values, [output])), path / "model.onnx")
    return path / "model.onnx"


@pytest.mark.parametrize(
    ("kind", "inputs", "options", "fault"),
    [
        ("MatMulNBits", "a b scales zeros", WEIGHTS, None),
        ("MatMulNBits", "a b scales zeros", WEIGHTS | {"bits": 8}, None),
        ("MatMulNBits", "a b scales", WEIGHTS | {"bits": 8, "K": 96}, None),
        ("GroupQueryAttention", "q k v past_k past_v", {}, None),
        ("Sigmoid", "a", {"domain": ""}, None),
        (
            "GatherBlockQuantized",
            "b ids scales",
            {"type_": UINT8},
            "GatherBlockQuantized is not registered for DirectML",
        ),
        (
            "Sigmoid",
            "a",
            {"domain": "", "type_": TensorProto.DOUBLE},
            "Sigmoid is not registered for DirectML in DOUBLE",
        ),
        (
            "MatMulNBits",
            "a b scales",
            WEIGHTS | {"K": 80},
            "MatMulNBits needs a block size that divides K, and 32 does not divide 80",
        ),
        ("MatMulNBits", "a b scales zeros g", WEIGHTS, "MatMulNBits takes no g_idx on DirectML"),
        ("MatMulNBits", "a b scales zeros _ bias", WEIGHTS, "MatMulNBits takes no bias on DirectML"),
        (
            "MatMulNBits",
            "a b scales zeros",
            WEIGHTS | {"bits": 8, "K": 96},
            "DirectML misreads the zero points of an 8-bit MatMulNBits with an odd number of blocks per row",
        ),
        (
            "GroupQueryAttention",
            "qkv _ _ past_k past_v",
            {},
            "GroupQueryAttention needs separate q, k and v on DirectML",
        ),
    ],
)
def test_faults(tmp_path, kind, inputs, options, fault):
    """A node that DirectML accepts has no fault; a broken rule is a fault with the node's name."""
    names = ["" if name == "_" else name for name in inputs.split()]
    assert find_faults(graph(tmp_path, kind, names, **options)) == ([f"n: {fault}"] if fault else [])
