"""Estimate from a model's config alone what each cell of dvc.yaml costs: disk, memory and time.

Sizes follow from the recipes. Memory and time are straight lines through measurements on 2 cores with AVX-512: of the
embedded model, and of that model widened to Phi-3-mini's shape (bench/rehearsal.md).
"""

from dataclasses import dataclass
from typing import Any, Literal

from pipeline.check.long_context import choose, longest_prompt, tokens_read
from pipeline.common.context import limits
from pipeline.common.matrices import CHANNEL_WISE, Matrix, matrices
from pipeline.common.params import OnnxInt4, OpenvinoInt4, Params, Variant
from pipeline.common.shapes import dtype, tensors
from pipeline.convert.backend import backend
from pipeline.convert.rotation import can_rotate
from pipeline.convert.solver import ROWS
from pipeline.graph import Cell
from pipeline.run.openvino import BATCH, BATCH_TOKENS, BLOCK
from pipeline.run.prompts import load_prompts

OTHER_FILES = 20e6  # tokenizers, configs, manifests
# Anonymous memory in bytes: a constant, and a factor of the FP16 weights' size.
MEMORY = {
    "download": (0.05e9, 0.0),
    "reference": (0.75e9, 0.0),
    "calibrate": (0.75e9, 0.0),
    "export_openvino": (0.74e9, 0.018),
    "quantize_openvino": (0.3e9, 0.0),
    "compile_npu": (0.4e9, 0.05),
    "build_onnx": (0.1e9, 0.0),
    "validate": (0.5e9, 0.0),
    "report": (0.1e9, 0.0),
}
# Memory on top of that. The first two are the numbers of copies of the largest matrix, in float32, that are in memory
# at the same time. The solver holds SQUARES copies of the widest matrix's statistics, or SLICES copies of the rows that
# it solves at a time.
OPENVINO_COPIES, ONNX_COPIES = 2.5, {"dml": 6.3, "cpu": 8.5}
SQUARES, SLICES = 3, 6
HALF = 0.6  # the part of a symmetric H that is computed
CHAT, STATES = 60, 3  # tokens of a shipped prompt with its chat template; copies of the hidden states in memory
RATE = 0.28e12  # float32 operations per second when the model answers prompts or reads texts, on 2 cores with AVX-512
NPU_COPIES = 3  # of its INT4 weights, in memory while the NPU's static pipeline runs on a CPU
ROW_COPIES = 2  # of the results of a layer's matrices, in memory while an IR reads a prompt at once
ONNX_RATE = 0.4e12  # the same in ONNX Runtime, which multiplies integers
ONNX_PACKED = 1.75  # the file with packed weights of an ONNX model for CPUs takes this many times its weights
PROMPT = 4096  # tokens of the longest prompt that reference and validate read
GGUF = 2.7  # rewriting a GGUF file takes this many times the memory of the FP16 weights
# Seconds: a constant, and seconds per GB of FP16 weights.
TIME = {
    "download": (3.0, 2.0),
    "reference": (20.0, 0.0),
    "calibrate": (15.0, 0.0),
    "export_openvino": (20.0, 6.0),
    "quantize_openvino": (4.0, 6.0),
    "compile_npu": (10.0, 2.5),
    "build_onnx": (6.0, 12.0),
    "validate": (20.0, 5.0),
    "report": (1.0, 0.0),
}
GROUPED = (0.25, 14.0)  # groups cost an NPU's compiler this factor of the FP16 weights, and seconds per GB of them
SOLVE, ROTATE = 40.0, 12.0  # further seconds per GB of FP16 weights for a calibrated and for a rotated variant


@dataclass(frozen=True)
class Cost:
    """What a cell needs: bytes of disk for its outputs, more of it while it runs, bytes of memory, and seconds."""

    disk: float
    temporary: float
    memory: float
    seconds: float


IDLE = Cost(disk=0.0, temporary=0.0, memory=0.02e9, seconds=1.0)  # a cell that has nothing to do


def estimate(cell: Cell, *, params: Params, config: dict[str, Any]) -> Cost:
    """Return what `cell` costs when its model has this `config`."""
    stage, name = cell.stage, cell.model
    source = matrices(tensors(config))
    fp16 = 2.0 * sum(matrix.elements for matrix in source)
    largest = 4.0 * max(matrix.elements for matrix in source)
    layers = sum(matrix.elements for matrix in source if matrix.role == "layer")
    base, slope = MEMORY[stage]
    memory = base + slope * fp16
    start, pace = TIME[stage]
    seconds = start + pace * fp16 / 1e9
    widest = max(matrix.columns for matrix in source)
    solver = 4.0 * widest * max(SQUARES * widest, SLICES * ROWS)
    size = temporary = 0.0
    if stage == "download":
        size = fp16 * (2 if dtype(config) == "float32" else 1)
        memory += GGUF * fp16 if params.get_model(name).source.pypi else 0.0
    elif stage == "export_openvino":
        size = temporary = fp16  # the second is a float16 copy of the checkpoint
    elif stage == "reference":
        tokens = _tokens("reference", params.reference.max_new_tokens)
        memory += _answering(config, fp16)
        read = 2 * tokens + min(PROMPT, config["max_position_embeddings"])  # the answers twice, first to write them
        seconds += 2 * layers * read / RATE
    elif stage == "validate":
        # Memory holds one loaded model at a time, with its weights packed for the processor, and the KV cache of the
        # longest prompt. Keys and values take 16 bits each, except in the ONNX model for CPUs, where they take 32.
        variant = params.get_variant(cell.variant)
        limit = limits(config, directml=variant.directml)
        chosen = choose(limit, most=longest_prompt(limit, variant))
        prompt = max(chosen, default=0)
        read = _tokens("reference", params.reference.max_new_tokens) + tokens_read(chosen)
        weights, cache = _size(variant, name, source, params=params, config=config), _cache(config, prompt)
        if variant.npu:
            # Its pipeline pads every prompt, and is asked the questions twice. It packs the weights once for prompts
            # and once for answers, and a scorer follows.
            read += 2 * len(params.validate_.prompts) * variant.npu.max_prompt_len
            memory += NPU_COPIES * weights
        elif isinstance(variant, OnnxInt4):
            logits = 4.0 * config["vocab_size"] * prompt  # it computes them at all positions of a prompt
            if variant.directml:
                memory += 2 * weights + cache + logits  # as they are and as the CPU provider packs them
            else:
                # Memory holds the packed weights until they are in a file, which the model that answers maps.
                temporary = ONNX_PACKED * weights
                memory += max(weights, 2 * cache + logits)
        else:
            memory += (
                weights + cache + ROW_COPIES * 4.0 * prompt * sum(m.rows for m in source if ".layers.0." in m.name)
            )
        seconds += 2 * layers * read / (ONNX_RATE if isinstance(variant, OnnxInt4) else RATE)
    elif stage in ("quantize_openvino", "build_onnx"):
        variant = params.get_variant(cell.variant)
        size = _size(variant, name, source, params=params, config=config)
        if isinstance(variant, OnnxInt4):
            temporary = size  # the quantized matrices, before they are put into one file
            builder = ONNX_COPIES[variant.execution_provider] * largest  # freed before the solver begins
            memory += max(builder, solver if variant.calibrated else 0.0)
        elif isinstance(variant, OpenvinoInt4):  # the result stays in memory until it is saved
            memory += max(size, OPENVINO_COPIES * largest) + (solver if variant.calibrated else 0.0)
        if variant.rotated and can_rotate(config):
            rotated = 1 if isinstance(variant, OnnxInt4) else 2  # a rotated checkpoint, and for OpenVINO also its IR
            temporary += rotated * fp16
            memory += 0.0 if isinstance(variant, OnnxInt4) else MEMORY["export_openvino"][0]
            export, pace = TIME["export_openvino"]
            seconds += export + (pace + ROTATE) * fp16 / 1e9
        if variant.calibrated:
            seconds += SOLVE * fp16 / 1e9
    elif stage == "compile_npu":
        variant = params.get_variant(cell.variant)
        if isinstance(variant, OpenvinoInt4) and variant.group_size != CHANNEL_WISE:
            memory += GROUPED[0] * fp16
            seconds += GROUPED[1] * fp16 / 1e9
    elif stage == "calibrate":
        if not any(variant.calibrated for variant in params.variants.values()):
            return IDLE
        size = sum(2.0 * matrix.columns**2 for matrix in source)  # half of a symmetric float32 matrix
        # After the answers, memory holds a layer in float32, its statistics, and STATES copies of all hidden states.
        layer = sum(matrix.elements for matrix in source if ".layers.0." in matrix.name)
        tokens = _tokens("calibration", params.calibrate.max_new_tokens)
        reading = 4.0 * (layer + SQUARES * widest**2 + STATES * tokens * config["hidden_size"])
        memory += max(_answering(config, fp16), reading)
        seconds += 2 * tokens * (2 * layers + HALF * sum(matrix.columns**2 for matrix in source)) / RATE
    return Cost(size + OTHER_FILES, temporary, memory, seconds)


def _tokens(prompts: Literal["reference", "calibration"], max_new_tokens: int) -> int:
    # The tokens of the shipped `prompts` and their answers.
    return len(load_prompts(prompts)) * (CHAT + max_new_tokens)


def _cache(config: dict[str, Any], tokens: int) -> float:
    # The bytes of the keys and values of a text, 16 bits each.
    head = config["hidden_size"] // config["num_attention_heads"]
    return float(4 * config["num_hidden_layers"] * config["num_key_value_heads"] * head * tokens)


def _answering(config: dict[str, Any], fp16: float) -> float:
    # The memory in which the FP16 IR answers many prompts at a time: its weights and its cache.
    return fp16 + _cache(config, BATCH_TOKENS + BATCH * BLOCK)


def _size(variant: Variant, name: str, source: list[Matrix], *, params: Params, config: dict[str, Any]) -> float:
    adjust = params.get_model(name).group_size_fallback == "adjust"
    return backend(variant).expected_size(source, recipe=variant, config=config, adjust_group_size=adjust)
