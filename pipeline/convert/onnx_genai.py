"""ONNX Runtime GenAI models: build them with onnxruntime-genai's builder, and read back what the files hold."""

import os
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.common.checkpoint import read_json, to_float16
from pipeline.common.errors import PipelineError
from pipeline.common.matrices import Matrix, Role
from pipeline.common.params import OnnxInt4
from pipeline.common.programs import stream_lines
from pipeline.common.progress import Bar
from pipeline.convert import onnx_builder
from pipeline.convert.calibration import Calibration
from pipeline.convert.onnx_builder import RESIDUAL_SCALE, WRITERS
from pipeline.convert.solver import Grid, pack

MODEL = ("model.onnx", "model.onnx.data")
CONFIG = "genai_config.json"
REQUIRED = (*MODEL, CONFIG, "tokenizer.json", "tokenizer_config.json")
WEIGHTS = MODEL[1]
INT4 = 4
BUILDER = onnx_builder.__name__


def build_int4(
    checkpoint: Path,
    target: Path,
    *,
    recipe: OnnxInt4,
    trust_remote_code: bool,
    calibration: Calibration | None,
) -> None:
    """Write the INT4 ONNX model of `checkpoint` for the recipe's execution provider into the directory `target`.

    The builder runs as a process of its own. With `calibration` the solver then replaces the INT4 codes and scales. If
    the calibration has a rotation, the rotated model is built.

    Raises PipelineError when the builder fails or leaves a file out.
    """
    if calibration is None or calibration.rotation is None:
        _build(checkpoint, target, recipe=recipe, trust_remote_code=trust_remote_code)
    else:
        with tempfile.TemporaryDirectory(prefix=".rotated-", dir=target) as directory:
            rotated = Path(directory)
            to_float16(checkpoint, rotated, weight=calibration.rotation.weight)
            _build(rotated, target, recipe=recipe, trust_remote_code=trust_remote_code)
    if calibration:
        config = read_json(checkpoint / "config.json")
        solve(target, calibration, config, directml=recipe.directml)


def _build(checkpoint: Path, target: Path, *, recipe: OnnxInt4, trust_remote_code: bool) -> None:
    options: dict[str, str | int] = {
        "algo_config": recipe.algorithm,
        "is_symmetric": recipe.symmetric,
        "block_size": recipe.block_size,
        "hf_remote": trust_remote_code,
        "hf_token": False,
        # 4 is the builder's default for CPUs, and DirectML ignores it. With the builder's default for DirectML, 0, ONNX
        # Runtime's CPU kernel unpacks 8-bit weights at every call: 1 to 5 tokens/s instead of 35 to 114. The setting 4
        # costs 0.001 of mean KL divergence.
        "accuracy_level": 4,
        # A cache of only the window's length fails when an application's max_length is shorter than the window.
        "windowed_kv_cache": False,
    }
    config = read_json(checkpoint / "config.json")
    int8 = [f"{selector}:int8" for selector in recipe.int8]
    if _shares_float16(config, recipe):
        options["nodes_to_exclude"] = "/lm_head/MatMul,/model/embed_tokens/Gather"
        int8 = [selector for selector in int8 if selector != "last_matmul:int8"]
    if int8:
        options["matmul_mixed_precision"] = ",".join(int8)
    with tempfile.TemporaryDirectory(prefix=".builder-", dir=target) as cache:
        command = [sys.executable, "-m", BUILDER]
        command += [
            "-i",
            str(checkpoint),
            "-o",
            str(target),
            "-c",
            cache,
            "-p",
            "int4",
            "-e",
            recipe.execution_provider,
        ]
        command += ["--extra_options", *(f"{key}={value}" for key, value in options.items())]
        # GIT_DIR hides this project's git repository from the builder; otherwise the model would name this project's
        # commit as its producer instead of the builder's.
        layers = config["num_hidden_layers"]
        with Bar(desc="reading layers", total=layers) as reading, Bar(desc="quantizing matrices") as quantizing:
            for line in stream_lines(command, env=os.environ | {"GIT_DIR": os.devnull}):
                if layer := re.match(r"Reading layer (\d+)", line):
                    reading.update(int(layer[1]) + 1 - reading.n)
                elif node := re.match(r"Quantized matrix (\d+) of (\d+)", line):
                    quantizing.total = int(node[2])
                    quantizing.update(int(node[1]) - quantizing.n)
    missing = [name for name in REQUIRED if not (target / name).is_file()]
    if missing:
        raise PipelineError(f"the onnxruntime-genai builder wrote no {missing[0]}.")


def solve(target: Path, calibration: Calibration, config: dict[str, Any], *, directml: bool) -> None:
    """Replace the codes, scales and zero points of all INT4 matrices of the model in `target` by the solver's.

    They are written in place in the weights file, packed as in
    https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md (MatMulNBits).
    """
    import numpy as np
    import onnx
    import torch

    model = onnx.load(target / MODEL[0], load_external_data=False)
    places = {t.name: {entry.key: entry.value for entry in t.external_data} for t in model.graph.initializer}
    attributes = {
        node.name: {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        for node in model.graph.node
        if node.op_type == "MatMulNBits"
    }
    int4 = [node for node in model.graph.node if attributes.get(node.name, {}).get("bits") == INT4]

    with (target / MODEL[1]).open("r+b") as data:

        def write(tensor: str, values: Any) -> None:
            if values.nbytes != int(places[tensor]["length"]):
                raise AssertionError(f"{tensor} has {places[tensor]['length']} bytes, not {values.nbytes}")
            data.seek(int(places[tensor]["offset"]))
            data.write(values.tobytes())

        for node in Bar(int4, desc="solving matrices"):
            _, codes, scales, *zero_points = node.input
            matrix, rows = _origin(_name(node.name), config)
            grid = Grid(
                bits=INT4,
                group_size=attributes[node.name]["block_size"],
                symmetric=not any(zero_points),
                scale_dtype=torch.float16 if directml else torch.float32,
                scale_divisor=RESIDUAL_SCALE if directml and matrix.endswith(WRITERS) else 1,
            )
            solved = calibration.quantize(matrix, grid, rows=rows)
            missing = -solved.codes.shape[1] % grid.group_size  # the last block is padded with the middle code
            write(codes, pack(np.pad(solved.codes.numpy(), ((0, 0), (0, missing)), constant_values=grid.middle)))
            write(scales, (solved.scales / grid.scale_divisor).to(grid.scale_dtype).numpy())
            if not grid.symmetric:
                odd = solved.zero_points.shape[1] % 2
                write(zero_points[0], pack(np.pad(solved.zero_points.numpy(), ((0, 0), (0, odd)))))


def _origin(name: str, config: dict[str, Any]) -> tuple[str, slice]:
    # The checkpoint's matrix that contains the builder's matrix `name`, and the rows that it takes there.
    if part := re.search(r"\.([qkv])_proj$", name):
        sizes = _qkv_rows(config)
        start = sum(sizes[other] for other in "qkv"[: "qkv".index(part[1])])
        return re.sub(r"attn\.[qkv]_proj", "self_attn.qkv_proj", name), slice(start, start + sizes[part[1]])
    if part := re.search(r"\.(gate|up)_proj$", name):
        width = config["intermediate_size"]
        start = width * (part[1] == "up")
        return re.sub(r"(gate|up)_proj", "gate_up_proj", name), slice(start, start + width)
    return name.replace(".attn.", ".self_attn."), slice(None)


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
        attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type == "MatMulNBits":
            matrix = Matrix(
                _name(node.name),
                _role(node.name),
                rows=attributes["N"],
                columns=attributes["K"],
                bits=attributes.get("bits", INT4),
                group_size=attributes["block_size"],
                symmetric=len([name for name in node.input if name]) == 3,
            )
            built.setdefault(node.input[1], matrix)
        elif node.op_type == "GatherBlockQuantized":
            weight = shared.get(node.input[0], node.input[0])
            rows, blocks = shapes[node.input[2]]
            matrix = Matrix(
                _name(node.name),
                "embedding",
                rows,
                blocks * attributes["block_size"],
                attributes.get("bits", INT4),
                attributes["block_size"],
                symmetric=len(node.input) == 3,
            )
            built[weight] = matrix
        elif node.op_type in ("MatMul", "Gather"):
            weight = next((i for i in (shared.get(i, i) for i in node.input) if len(shapes.get(i, ())) == 2), None)
            if weight is not None:
                transposed = node.op_type == "MatMul" or weight not in node.input
                rows, columns = reversed(shapes[weight]) if transposed else shapes[weight]
                built.setdefault(weight, Matrix(_name(node.name), _role(node.name), rows, columns, bits[weight]))
    return list(built.values())


def residual_scale(directory: Path, *, config: dict[str, Any]) -> float:
    """Return the divisor of the residual stream of the model in `directory`, from the epsilon of its RMS norms."""
    import onnx

    model = onnx.load(directory / MODEL[0], load_external_data=False)
    norms = (node for node in model.graph.node if node.op_type.endswith("SimplifiedLayerNormalization"))
    attributes = {attribute.name: attribute.f for attribute in next(norms).attribute}
    return round(float((config["rms_norm_eps"] / attributes["epsilon"]) ** 0.5), 3)


def expected_form(matrix: Matrix, *, recipe: OnnxInt4, config: dict[str, Any], adjust_group_size: bool) -> Matrix:
    """Return `matrix` as `recipe` stores it: an embedding in float unless a CPU model shares it with the head."""
    if matrix.role == "embedding" and (_shares_float16(config, recipe) or not config.get("tie_word_embeddings", False)):
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


def _shares_float16(config: dict[str, Any], recipe: OnnxInt4) -> bool:
    # DirectML has no GatherBlockQuantized, the operator that lets embedding and head share a quantized table. One table
    # in float16 for both is smaller than one for the embedding and another in INT8 for the head: the model has 126 MB
    # against 157 for smol-phi3.
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
    rows = _qkv_rows(config)
    return [replace(matrix, name=matrix.name.replace("qkv_", f"{n}_"), rows=count) for n, count in rows.items()]


def _qkv_rows(config: dict[str, Any]) -> dict[str, int]:
    # How many rows of the fused matrix belong to queries, keys and values, in the matrix's order.
    head = _head_size(config)
    rows = {"q": config["num_attention_heads"] * head}
    return rows | dict.fromkeys("kv", config["num_key_value_heads"] * head)


def _rotary_caches(config: dict[str, Any], *, directml: bool) -> float:
    # The number of elements in the cosine and sine tables beside the weights: one pair of tables, or with LongRoPE one
    # pair for short and one for long contexts. The CPU model keeps the LongRoPE tables in the branches of its graph.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    factor = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    short, long = config["original_max_position_embeddings"], config["max_position_embeddings"]
    positions = long if short == long else (short + long) * directml
    return float(positions * _head_size(config) * factor)


def _head_size(config: dict[str, Any]) -> int:
    return int(config["hidden_size"]) // int(config["num_attention_heads"])


def _name(node: str) -> str:
    return re.sub(r"/(MatMul|Gather)(BlockQuantized)?(_Q\d)?$", "", node).strip("/").replace("/", ".")


def _role(node: str) -> Role:
    if "embed_tokens" in node:
        return "embedding"
    return "head" if "lm_head" in node else "layer"
