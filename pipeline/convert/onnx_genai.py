"""Build ONNX models with onnxruntime-genai's builder, and replace their INT4 codes by the solver's."""

import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from pipeline.common.checkpoint import as_list, eos_token_ids, read_json, to_float16
from pipeline.common.errors import PipelineError
from pipeline.common.params import OnnxInt4
from pipeline.common.programs import stream_lines
from pipeline.common.progress import Bar
from pipeline.convert import onnx_builder
from pipeline.convert.calibration import Calibration
from pipeline.convert.onnx_builder import RESIDUAL_SCALE, WRITERS
from pipeline.convert.onnx_format import (
    CONFIG,
    INT4,
    MODEL,
    REQUIRED,
    matrix_name,
    node_attributes,
    qkv_rows,
    shares_float16,
)
from pipeline.convert.solver import Grid, pack

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
    if shares_float16(config, recipe):
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
    # The builder adds the tokenizer's eos token, at which the source model does not stop.
    genai, eos = read_json(target / CONFIG), eos_token_ids(checkpoint)
    if as_list(genai["model"]["eos_token_id"]) != eos:
        genai["model"]["eos_token_id"] = eos
        (target / CONFIG).write_text(json.dumps(genai, indent=4), "utf-8", newline="\n")


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
    quantized = [(node, node_attributes(node)) for node in model.graph.node if node.op_type == "MatMulNBits"]
    int4 = [(node, attributes) for node, attributes in quantized if attributes["bits"] == INT4]

    with (target / MODEL[1]).open("r+b") as data:

        def write(tensor: str, values: Any) -> None:
            if values.nbytes != int(places[tensor]["length"]):
                raise AssertionError(f"{tensor} has {places[tensor]['length']} bytes, not {values.nbytes}")
            data.seek(int(places[tensor]["offset"]))
            data.write(values.tobytes())

        for node, attributes in Bar(int4, desc="solving matrices"):
            _, codes, scales, *zero_points = node.input
            matrix, rows = _origin(matrix_name(node.name), config)
            grid = Grid(
                bits=INT4,
                group_size=attributes["block_size"],
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
        sizes = qkv_rows(config)
        start = sum(sizes[other] for other in "qkv"[: "qkv".index(part[1])])
        return re.sub(r"attn\.[qkv]_proj", "self_attn.qkv_proj", name), slice(start, start + sizes[part[1]])
    if part := re.search(r"\.(gate|up)_proj$", name):
        width = config["intermediate_size"]
        start = width * (part[1] == "up")
        return re.sub(r"(gate|up)_proj", "gate_up_proj", name), slice(start, start + width)
    return name.replace(".attn.", ".self_attn."), slice(None)
