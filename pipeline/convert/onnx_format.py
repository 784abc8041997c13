"""How ONNX Runtime GenAI models store their weights: what a built model really holds, and what a recipe should give."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.common.checkpoint import head_size
from pipeline.common.matrices import Matrix, role
from pipeline.common.params import OnnxInt4

MODEL = ("model.onnx", "model.onnx.data")
CONFIG = "genai_config.json"
REQUIRED = (*MODEL, CONFIG, "tokenizer.json", "tokenizer_config.json")
WEIGHTS = MODEL[1]
INT4 = 4


def read_matrices(directory: Path) -> list[Matrix]:
    """Return every weight matrix of the ONNX model in `directory` as it is stored, without reading the weights.

    Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md (MatMulNBits,
    GatherBlockQuantized). A matrix that the embedding shares with the head is listed once, as the embedding.
    """
    import onnx

    model = onnx.load(directory / MODEL[0], load_external_data=False)
    shapes = {tensor.name: list(tensor.dims) for tensor in model.graph.initializer}
    bits = {tensor.name: 32 if tensor.data_type == onnx.TensorProto.FLOAT else 16 for tensor in model.graph.initializer}
    shared = {
        output: node.input[0]
        for node in model.graph.node
        if node.op_type in ("Reshape", "Transpose")
        for output in node.output
    }
    built: dict[str, Matrix] = {}
    for node in model.graph.node:
        attributes = node_attributes(node)
        if node.op_type == "MatMulNBits":
            matrix = Matrix(
                matrix_name(node.name),
                role(node.name),
                rows=attributes["N"],
                columns=attributes["K"],
                bits=attributes["bits"],
                group_size=attributes["block_size"],
                symmetric=len([name for name in node.input if name]) == 3,
            )
            built.setdefault(node.input[1], matrix)
        elif node.op_type == "GatherBlockQuantized":
            weight = shared.get(node.input[0], node.input[0])
            rows, blocks = shapes[node.input[2]]
            matrix = Matrix(
                matrix_name(node.name),
                "embedding",
                rows,
                blocks * attributes["block_size"],
                attributes["bits"],
                attributes["block_size"],
                symmetric=len(node.input) == 3,
            )
            built[weight] = matrix
        elif node.op_type in ("MatMul", "Gather"):
            weight = next((i for i in (shared.get(i, i) for i in node.input) if len(shapes.get(i, ())) == 2), None)
            if weight is not None:
                transposed = node.op_type == "MatMul" or weight not in node.input
                rows, columns = reversed(shapes[weight]) if transposed else shapes[weight]
                built.setdefault(weight, Matrix(matrix_name(node.name), role(node.name), rows, columns, bits[weight]))
    return list(built.values())


def node_attributes(node: Any) -> dict[str, Any]:
    """Return the attributes of the graph's `node` by their names; `bits` is 4, the operators' default, if not given."""
    import onnx

    given = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    return {"bits": INT4} | given


def residual_scale(directory: Path, *, config: dict[str, Any]) -> float:
    """Return the divisor of the residual stream of the model in `directory`, from the epsilon of its RMS norms."""
    import onnx

    model = onnx.load(directory / MODEL[0], load_external_data=False)
    norms = (node for node in model.graph.node if node.op_type.endswith("SimplifiedLayerNormalization"))
    attributes = {attribute.name: attribute.f for attribute in next(norms).attribute}
    return round(float((config["rms_norm_eps"] / attributes["epsilon"]) ** 0.5), 3)


def expected_form(matrix: Matrix, *, recipe: OnnxInt4, config: dict[str, Any], adjust_group_size: bool) -> Matrix:
    """Return `matrix` as `recipe` stores it: an embedding in float unless a CPU model shares it with the head."""
    if matrix.role == "embedding" and (shares_float16(config, recipe) or not config.get("tie_word_embeddings", False)):
        return replace(matrix, bits=16 if recipe.directml else 32)
    bits = 8 if _is_int8(matrix, config, recipe) else INT4
    return replace(matrix, bits=bits, group_size=recipe.block_size, symmetric=recipe.symmetric)


def expected_size(source: list[Matrix], *, recipe: OnnxInt4, config: dict[str, Any], adjust_group_size: bool) -> float:
    """Return the bytes of weights that `recipe` should give for a checkpoint with matrices `source` and `config`."""
    directml = recipe.directml
    scale_bytes = 2 if directml else 4
    parts = [part for matrix in source for part in (_split_qkv(matrix, config) if directml else [matrix])]
    forms = (expected_form(part, recipe=recipe, config=config, adjust_group_size=adjust_group_size) for part in parts)
    return (
        sum(form.size(scale_bytes=scale_bytes) for form in forms)
        + _rotary_caches(config, directml=directml) * scale_bytes
    )


def shares_float16(config: dict[str, Any], recipe: OnnxInt4) -> bool:
    """Return whether embedding and head are one float16 table."""
    # DirectML has no GatherBlockQuantized, the operator that lets embedding and head share a quantized table. One table
    # in float16 for both is smaller than one for the embedding and another in INT8 for the head: it saves 31 MB for
    # smol-phi3.
    return recipe.directml and bool(config.get("tie_word_embeddings", False))


def _is_int8(matrix: Matrix, config: dict[str, Any], recipe: OnnxInt4) -> bool:
    # mixed_layers is llama.cpp's choice: the value and down projections of the first and the last eighth of the layers
    # and of every third layer between. Where the CPU model keeps qkv fused, all of qkv is INT8.
    if matrix.role == "head" or (matrix.role == "embedding" and config.get("tie_word_embeddings", False)):
        return "last_matmul" in recipe.int8
    layer = re.search(r"layers\.(\d+)\.", matrix.name)
    if layer is None or "mixed_layers" not in recipe.int8:
        return False
    index, count = int(layer[1]), config["num_hidden_layers"]
    upgraded = index < count / 8 or index >= 7 * count / 8 or (index - round(count / 8)) % 3 == 2
    return upgraded and any(part in matrix.name for part in ("v_proj", "down_proj"))


def _split_qkv(matrix: Matrix, config: dict[str, Any]) -> list[Matrix]:
    if "qkv_proj" not in matrix.name:
        return [matrix]
    rows = qkv_rows(config)
    return [replace(matrix, name=matrix.name.replace("qkv_", f"{n}_"), rows=count) for n, count in rows.items()]


def qkv_rows(config: dict[str, Any]) -> dict[str, int]:
    """Return how many rows of the fused matrix belong to queries, keys and values, in the matrix's order."""
    head = head_size(config)
    rows = {"q": config["num_attention_heads"] * head}
    return rows | dict.fromkeys("kv", config["num_key_value_heads"] * head)


def _rotary_caches(config: dict[str, Any], *, directml: bool) -> float:
    # The number of elements in the cosine and sine tables beside the weights: one pair of tables, or with LongRoPE one
    # pair for short and one for long contexts. The CPU model keeps the LongRoPE tables in the branches of its graph.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    factor = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    short, long = config["original_max_position_embeddings"], config["max_position_embeddings"]
    positions = long if short == long else (short + long) * directml
    return float(positions * head_size(config) * factor)


def matrix_name(node: str) -> str:
    """Return the name of the matrix of the graph's node `node`, such as `model.layers.0.mlp.down_proj`."""
    return re.sub(r"/(MatMul|Gather)(BlockQuantized)?(_Q\d)?$", "", node).strip("/").replace("/", ".")
