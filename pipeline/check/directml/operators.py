"""The rules by which a graph runs on DirectML as a whole, as graph capture, onnxruntime-genai's default, requires.

Registrations and types: ONNX Runtime's docs/OperatorKernels.md, section DmlExecutionProvider, which is generated from
DmlExecutionProvider/src/Operators/OperatorRegistration.cpp; only operators of Phi-3 graphs are listed here. Rules of
MatMulNBits and GroupQueryAttention: DmlOperatorMatMulNBits.cpp and DmlOperatorGroupQueryAttention.cpp in that folder.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

FLOATS = frozenset({"FLOAT", "FLOAT16"})
NUMBERS = FLOATS | {"INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64"}
ANY = NUMBERS | {"BOOL", "DOUBLE"}
MS = "com.microsoft"
# The types that an operator's first input may have.
REGISTERED = {
    ("", "Add"): NUMBERS,
    ("", "Cast"): ANY,
    ("", "Concat"): ANY,
    ("", "Gather"): ANY,
    ("", "GreaterOrEqual"): NUMBERS,
    ("", "MatMul"): FLOATS,
    ("", "Mul"): NUMBERS,
    ("", "ReduceMax"): NUMBERS,
    ("", "ReduceSum"): NUMBERS,
    ("", "Reshape"): ANY,
    ("", "Shape"): ANY,
    ("", "Sigmoid"): FLOATS,
    ("", "SimplifiedLayerNormalization"): FLOATS,
    ("", "Slice"): ANY,
    ("", "Sub"): NUMBERS,
    ("", "Transpose"): ANY,
    ("", "Unsqueeze"): ANY,
    ("", "Where"): ANY,
    (MS, "GroupQueryAttention"): FLOATS,
    (MS, "MatMulNBits"): FLOATS,
    (MS, "RotaryEmbedding"): FLOATS,
    (MS, "SkipSimplifiedLayerNormalization"): FLOATS,
}
G_IDX, BIAS = 4, 5  # inputs of MatMulNBits


def find_faults(model: Path) -> list[str]:
    """Return why the graph of the ONNX file `model` would not run correctly on DirectML, one sentence per fault."""
    import onnx

    graph = onnx.load(model, load_external_data=False).graph
    values = [*graph.input, *graph.output, *graph.value_info]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    faults = []
    for node in graph.node:
        if node.op_type == "Constant":  # ONNX Runtime makes it an initializer
            continue
        attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        kind = onnx.TensorProto.DataType.Name(types.get(node.input[0], 0))
        faults += [f"{node.name}: {fault}" for fault in _faults(node, kind, attributes)]
    return faults


def _faults(node: Any, kind: str, attributes: dict[str, Any]) -> Iterator[str]:
    allowed = REGISTERED.get((node.domain, node.op_type))
    if allowed is None:
        yield f"{node.op_type} is not registered for DirectML"
    elif kind not in allowed:
        yield f"{node.op_type} is not registered for DirectML in {kind}"
    if node.op_type == "MatMulNBits":
        columns, block = attributes["K"], attributes["block_size"]
        inputs = [*node.input, *[""] * (BIAS + 1)]
        if columns % block:
            yield f"MatMulNBits needs a block size that divides K, and {block} does not divide {columns}"
        for position, name in ((G_IDX, "g_idx"), (BIAS, "bias")):
            if inputs[position]:
                yield f"MatMulNBits takes no {name} on DirectML"
        if attributes.get("bits", 4) == 8 and inputs[3] and -(-columns // block) % 2:
            yield "DirectML misreads the zero points of an 8-bit MatMulNBits with an odd number of blocks per row"
    elif node.op_type == "GroupQueryAttention" and not all(node.input[1:3]):
        yield "GroupQueryAttention needs separate q, k and v on DirectML"
