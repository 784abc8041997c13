"""Estimate from a model's config alone what each cell of dvc.yaml costs: disk, memory and time.

Sizes follow from the recipes. Memory and time are straight lines through measurements on 2 cores with AVX-512: of
smol-phi3, of smol-phi3 widened to Phi-3-mini's shape (bench/rehearsal.md), and of Phi-4-mini's vocabulary.
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.check.long_context import choose, lengths, longest_prompt, tokens_read
from pipeline.common.checkpoint import expected_shapes, head_size, weights_dtype
from pipeline.common.context import limits
from pipeline.common.matrices import CHANNEL_WISE, matrices
from pipeline.common.params import OnnxInt4, OpenvinoFp16, OpenvinoInt4, Params, Variant
from pipeline.convert.backend import backend
from pipeline.convert.rotation import can_rotate
from pipeline.convert.solver import ROWS
from pipeline.graph import Cell
from pipeline.run.openvino import BATCH, BATCH_TOKENS, BLOCK
from pipeline.run.prompts import load_prompts

OTHER_FILES = 80.0  # bytes for each token of the vocabulary: tokenizers, configs, manifests
# Anonymous memory in bytes: a constant, and a factor of the FP16 weights' size.
MEMORY = {
    "download": (0.05e9, 0.0),
    "reference": (0.75e9, 0.0),
    "calibrate": (0.75e9, 0.0),
    "export_openvino": (0.43e9, 0.024),
    "quantize_openvino": (0.3e9, 0.0),
    "compile_npu": (0.36e9, 0.05),
    "build_onnx": (0.3e9, 0.0),
    "validate": (0.25e9, 0.0),
    "report": (0.1e9, 0.0),
}
# Memory on top of that: copies of the largest matrix, in float32, that are held at the same time by an export when the
# head is the embedding, by NNCF, and by onnxruntime-genai's builder, which holds more when the head is a matrix of its
# own; the part of its result that the builder holds. The solver holds SQUARES copies of the widest matrix's statistics,
# or SLICES copies of the rows that it solves at a time. An export also holds a graph of each layer.
EXPORT_COPIES, NNCF_COPIES, BUILDER_COPIES = 0.37, 2.35, {"dml": 1.4, "cpu": 5.2}
HEAD_COPIES, BUILDER_HOLDS = {"dml": 2.6, "cpu": 1.5}, {"dml": 0.33, "cpu": 0.21}
SQUARES, SLICES = 3, 6
LAYER_GRAPH, ROTATION = 0.0075e9, 1.0e9  # bytes; the second is what a rotated variant needs besides
HALF = 0.6  # the part of a symmetric H that is computed
CHAT, STATES = 60, 3  # tokens of a shipped prompt with its chat template; copies of the hidden states in memory
RATE = 0.28e12  # float32 operations per second when the model answers prompts or reads texts, on 2 cores with AVX-512
ONNX_RATE = 0.4e12  # the same in ONNX Runtime, which multiplies integers
OPENVINO = (0.25e9, 0.4e9)  # bytes that OpenVINO itself takes, and with an FP16 IR
NPU_COPIES = 3  # of its INT4 weights, in memory while the NPU's static pipeline runs on a CPU
ROW_COPIES = 2  # of the results of a layer's matrices, in memory while an IR reads a prompt at once
ONNX_PACKED = 1.75  # the file with packed weights of an ONNX model for CPUs takes this many times its weights
LOGITS = {"dml": 3, "cpu": 1}  # copies of a prompt's logits
# Rewriting a GGUF file takes this many times the memory of the FP16 weights, and seconds per GB of them.
GGUF = (2.0, 30.0)
# Seconds: a constant, and seconds per GB of FP16 weights.
TIME = {
    "download": (3.0, 2.0),
    "reference": (20.0, 0.0),
    "calibrate": (15.0, 0.0),
    "export_openvino": (20.0, 6.0),
    "quantize_openvino": (4.0, 6.0),
    "compile_npu": (10.0, 0.6),
    "build_onnx": (15.0, 12.0),
    "validate": (20.0, 5.0),
    "report": (0.5, 0.25),
}
# A blob has binaries of this size, in bytes, and the embedding in INT8. With groups it has all weights, although it is
# asked for none.
BINARIES = 0.035e9
# Seconds in which an NPU's compiler converts each GB of the largest matrix in float32, without and with groups.
EMBEDDING = (25.0, 60.0)
GROUPED = (0.25, 11.5)  # groups cost an NPU's compiler this factor of the FP16 weights, and seconds per GB of them
# Seconds per GB of the layers' FP16 weights for a calibrated variant: for an IR, and for ONNX models, of which the one
# for CPUs has fewer INT4 matrices.
SOLVE = {"openvino": 40.0, "dml": 60.0, "cpu": 36.0}
ROTATE = 12.0  # seconds per GB of FP16 weights for a rotated variant, besides an export


@dataclass(frozen=True)
class Cost:
    """What a cell needs: bytes of disk for its outputs, more of it while it runs, bytes of memory, and seconds."""

    disk: float = 0.0
    temporary: float = 0.0
    memory: float = 0.0
    seconds: float = 0.0


IDLE = Cost(memory=0.02e9, seconds=1.0)  # a cell that has nothing to do


class _Model:
    """What the costs of a model's cells follow from: sizes in bytes, `layers` in weights, `widest` in columns."""

    def __init__(self, name: str, *, params: Params, config: dict[str, Any]) -> None:
        self.params, self.config, self.block = params, config, params.get_model(name)
        self.source = matrices(dict(expected_shapes(config)))
        self.fp16 = 2.0 * sum(matrix.elements for matrix in self.source)
        self.largest = 4.0 * max(matrix.elements for matrix in self.source)  # in float32
        self.layers = sum(matrix.elements for matrix in self.source if matrix.role == "layer")
        self.tied = bool(config.get("tie_word_embeddings", False))
        self.layer = [matrix for matrix in self.source if ".layers.0." in matrix.name]
        self.widest = max(matrix.columns for matrix in self.source)

    def size(self, variant: Variant) -> float:
        adjust = self.block.group_size_fallback == "adjust"
        return backend(variant).expected_size(self.source, recipe=variant, config=self.config, adjust_group_size=adjust)

    def cache(self, tokens: int) -> float:
        # The keys and values of a text, 16 bits each.
        heads = self.config["num_hidden_layers"] * self.config["num_key_value_heads"]
        return float(4 * heads * head_size(self.config) * tokens)

    def answering(self) -> float:
        # The memory in which the FP16 IR answers many prompts at a time: its weights and its cache.
        return self.fp16 + self.cache(BATCH_TOKENS + BATCH * BLOCK)

    def solver(self, variant: OpenvinoInt4 | OnnxInt4) -> float:
        return 4.0 * self.widest * max(SQUARES * self.widest, SLICES * ROWS) if variant.calibrated else 0.0

    def solving(self, variant: OpenvinoInt4 | OnnxInt4) -> float:
        # The seconds of the solver, and those of a rotation, which takes another export.
        pace = SOLVE[variant.execution_provider if isinstance(variant, OnnxInt4) else "openvino"]
        seconds = pace * 2 * self.layers / 1e9 if variant.calibrated else 0.0
        if self.rotates(variant):
            export, pace = TIME["export_openvino"]
            seconds += export + (pace + ROTATE) * self.fp16 / 1e9
        return seconds

    def rotates(self, variant: OpenvinoInt4 | OnnxInt4) -> bool:
        return variant.rotated and can_rotate(self.config)


def estimate(cell: Cell, *, params: Params, config: dict[str, Any]) -> Cost:
    """Return what `cell` costs when its model has this `config`."""
    if cell.stage == "calibrate" and not any(variant.calibrated for variant in params.variants.values()):
        return IDLE
    model = _Model(cell.model, params=params, config=config)
    more = _more(cell, model)
    base, slope = MEMORY[cell.stage]
    start, pace = TIME[cell.stage]
    return Cost(
        disk=more.disk + OTHER_FILES * config["vocab_size"],
        temporary=more.temporary,
        memory=base + slope * model.fp16 + more.memory,
        seconds=start + pace * model.fp16 / 1e9 + more.seconds,
    )


def _more(cell: Cell, model: _Model) -> Cost:
    # Return what `cell` costs on top of the lines in MEMORY and TIME, and of OTHER_FILES.
    variant = model.params.get_variant(cell.variant) if cell.variant else None
    match cell.stage, variant:
        case "download", _:
            size = model.fp16 * (2 if weights_dtype(model.config) == "float32" else 1)
            memory, pace = GGUF if model.block.source.pypi else (0.0, 0.0)
            return Cost(disk=size, memory=memory * model.fp16, seconds=pace * model.fp16 / 1e9)
        case "export_openvino", _:
            # The temporary disk is for a float16 copy of the checkpoint.
            graph = LAYER_GRAPH * model.config["num_hidden_layers"]
            return Cost(
                disk=model.fp16, temporary=model.fp16, memory=graph + model.tied * EXPORT_COPIES * model.largest
            )
        case "reference", _:
            return _reference(model)
        case "calibrate", _:
            return _calibrate(model)
        case "quantize_openvino", OpenvinoInt4():
            return _quantize_openvino(model, variant)
        case "build_onnx", OnnxInt4():
            return _build_onnx(model, variant)
        case "compile_npu", OpenvinoInt4() if variant.group_size == CHANNEL_WISE:
            return Cost(disk=BINARIES + model.largest / 4, seconds=EMBEDDING[0] * model.largest / 1e9)
        case "compile_npu", OpenvinoInt4():
            disk = BINARIES + model.size(variant)
            seconds = EMBEDDING[1] * model.largest / 1e9 + GROUPED[1] * model.fp16 / 1e9
            return Cost(disk=disk, memory=GROUPED[0] * model.fp16, seconds=seconds)
        case "validate", OpenvinoFp16() | OpenvinoInt4() | OnnxInt4():
            return _validate(model, variant)
    return Cost()


def _reference(model: _Model) -> Cost:
    tokens = _tokens("reference", model.params.reference.max_new_tokens)
    read = 2 * tokens + lengths(limits(model.config, directml=False))[-1]  # the answers twice, first to write them
    return Cost(memory=model.answering(), seconds=2 * model.layers * read / RATE)


def _calibrate(model: _Model) -> Cost:
    # After the answers, memory holds a layer in float32, its statistics, and STATES copies of all hidden states.
    tokens = _tokens("calibration", model.params.calibrate.max_new_tokens)
    squares = sum(matrix.columns**2 for matrix in model.source)
    layer = sum(matrix.elements for matrix in model.layer)
    reading = 4.0 * (layer + SQUARES * model.widest**2 + STATES * tokens * model.config["hidden_size"])
    return Cost(
        disk=2.0 * squares,  # half of each symmetric float32 matrix
        memory=max(model.answering(), reading),
        seconds=2 * tokens * (2 * model.layers + HALF * squares) / RATE,
    )


def _quantize_openvino(model: _Model, variant: OpenvinoInt4) -> Cost:
    # NNCF is followed by the solver, beside which memory holds the result. A rotation takes a checkpoint and an IR.
    size = model.size(variant)
    memory = max(NNCF_COPIES * model.largest, size + model.solver(variant))
    temporary = 0.0
    if model.rotates(variant):
        temporary = 2 * model.fp16
        memory += ROTATION
    return Cost(disk=size, temporary=temporary, memory=memory, seconds=model.solving(variant))


def _build_onnx(model: _Model, variant: OnnxInt4) -> Cost:
    # The quantized matrices are files before they are put into one. The solver begins when the builder has ended.
    size = model.size(variant)
    temporary = size + (model.fp16 if model.rotates(variant) else 0.0)
    provider = variant.execution_provider
    copies = BUILDER_COPIES[provider] + (not model.tied) * HEAD_COPIES[provider]
    builder = copies * model.largest + BUILDER_HOLDS[provider] * size
    memory = max(builder, model.solver(variant))
    return Cost(disk=size, temporary=temporary, memory=memory, seconds=model.solving(variant))


def _validate(model: _Model, variant: Variant) -> Cost:
    # Memory holds one loaded model at a time, with its weights packed for the processor, and the KV cache of the
    # longest prompt. Keys and values take 16 bits each, except in the ONNX model for CPUs, where they take 32.
    limit = limits(model.config, directml=variant.directml)
    chosen = choose(limit, most=longest_prompt(limit, variant))
    prompt = max(chosen, default=0)
    read = _tokens("reference", model.params.reference.max_new_tokens) + tokens_read(chosen)
    weights, cache, temporary = model.size(variant), model.cache(prompt), 0.0
    if variant.npu:
        # Its pipeline pads every prompt, and is asked the questions twice. It packs the weights once for prompts and
        # once for answers, and a scorer follows.
        read += 2 * len(model.params.validate_.prompts) * variant.npu.max_prompt_len
        memory = OPENVINO[0] + NPU_COPIES * weights
    elif isinstance(variant, OnnxInt4):
        logits = 4.0 * model.config["vocab_size"] * prompt  # it computes them at all positions of a prompt
        if variant.directml:
            memory = 2 * weights + cache + LOGITS["dml"] * logits  # as they are and as the CPU provider packs them
        else:
            # Memory holds the packed weights until they are in a file, which the model that answers maps.
            temporary = ONNX_PACKED * weights
            memory = max(weights, 2 * cache + LOGITS["cpu"] * logits)
    else:
        memory = OPENVINO[isinstance(variant, OpenvinoFp16)] + weights + cache
        memory += ROW_COPIES * 4.0 * prompt * sum(matrix.rows for matrix in model.layer)
    rate = ONNX_RATE if isinstance(variant, OnnxInt4) else RATE
    return Cost(temporary=temporary, memory=memory, seconds=2 * model.layers * read / rate)


@functools.cache  # reading the prompts takes longer than the rest of a plan
def _tokens(prompts: Literal["reference", "calibration"], max_new_tokens: int) -> int:
    # The tokens of the shipped `prompts` and their answers.
    return len(load_prompts(prompts)) * (CHAT + max_new_tokens)
