"""OpenVINO IR: export a checkpoint to FP16, quantize the IR to INT4, and read back what a built IR really holds."""

import contextlib
import logging
import math
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.common.checkpoint import to_float16
from pipeline.common.errors import PipelineError, writing_to
from pipeline.common.matrices import CHANNEL_WISE, Matrix, Role
from pipeline.common.params import OpenvinoFp16, OpenvinoInt4
from pipeline.common.progress import Bar, say
from pipeline.convert.calibration import Calibration
from pipeline.convert.solver import Grid, pack

MODEL = ("openvino_model.xml", "openvino_model.bin")
TOKENIZER = (
    "openvino_tokenizer.xml",
    "openvino_tokenizer.bin",
    "openvino_detokenizer.xml",
    "openvino_detokenizer.bin",
)
# A weight's name in the IR: optimum renames the weights that it maps from a float16 checkpoint, NNCF those that it
# compresses.
WEIGHT_CONSTANT = re.compile(r"self\.(.+)\.(?:weight|_openvino_orig_weight)(?:_compressed)?")
REQUIRED = (*MODEL, *TOKENIZER, "config.json", "generation_config.json", "tokenizer.json")
WEIGHTS = MODEL[1]
MIN_GROUP_SIZE = 32  # min_adjusted_group_size of nncf.AdvancedCompressionParameters


def export_fp16(
    checkpoint: Path,
    target: Path,
    *,
    trust_remote_code: bool = False,
    weight: Callable[[str], Any] | None = None,
) -> None:
    """Write the FP16 IR of `checkpoint`, with the OpenVINO tokenizer and detokenizer, into the directory `target`.

    The weights are first streamed into a float16 checkpoint, because the export maps float16 weights into memory
    instead of copying them. For 3.8 billion parameters it then takes 3 GB of anonymous memory instead of 16, and the
    resulting bytes are the same. `weight` returns a tensor by its name, in place of the checkpoint's own.

    Raises PipelineError when the tokenizer cannot be converted, with the reason.
    """
    with tempfile.TemporaryDirectory(prefix=".float16-", dir=target) as directory:
        half = Path(directory)
        to_float16(checkpoint, half, weight=weight)
        say("exporting the IR")
        with writing_to(target), _optimum_messages() as messages:
            from optimum.exporters.openvino import main_export
            from optimum.intel import OVConfig

            main_export(
                str(half),
                target,
                task="text-generation-with-past",
                library_name="transformers",
                ov_config=OVConfig(),  # keeps all dtypes; "fp16" would round the rotary frequencies, too
                convert_tokenizer=True,
                trust_remote_code=trust_remote_code,
                local_files_only=True,
            )
    # When the tokenizer conversion fails, optimum-intel raises no error and only logs a debug message.
    missing = [name for name in TOKENIZER if not (target / name).is_file()]
    if missing:
        reason = next((text for text in messages if "Tokenizer export" in text), "optimum-intel gave no reason")
        raise PipelineError(
            f"the tokenizer of {checkpoint} has no OpenVINO form, {missing[0]} was not written ({reason}): "
            "openvino-genai could not load the artifact."
        )


def build_int4(
    checkpoint: Path,
    fp16: Path,
    target: Path,
    *,
    recipe: OpenvinoInt4,
    adjust_group_size: bool,
    trust_remote_code: bool,
    calibration: Calibration | None,
) -> None:
    """Do what `quantize_int4` does; if `calibration` has a rotation, quantize the rotated `checkpoint` instead."""
    options: dict[str, Any] = {"recipe": recipe, "adjust_group_size": adjust_group_size, "calibration": calibration}
    if calibration is None or calibration.rotation is None:
        quantize_int4(fp16, target, **options)
        return
    with tempfile.TemporaryDirectory(prefix=".rotated-", dir=target) as directory:
        rotated = Path(directory)
        export_fp16(checkpoint, rotated, trust_remote_code=trust_remote_code, weight=calibration.rotation.weight)
        quantize_int4(rotated, target, **options)


def quantize_int4(
    fp16: Path,
    target: Path,
    *,
    recipe: OpenvinoInt4,
    adjust_group_size: bool,
    calibration: Calibration | None,
) -> None:
    """Quantize the FP16 IR in `fp16` to INT4, and write it and the other files into the directory `target`.

    NNCF decides how the IR stores its weights. With `calibration` the layers' inputs decide which layers stay INT8,
    and the solver replaces NNCF's codes and scales.

    Raises PipelineError when the group size does not divide a layer's width and `adjust_group_size` is false.
    """
    import nncf
    import openvino

    say(
        f"quantizing: group size {recipe.group_size}, ratio {recipe.ratio}"
        + (f", calibrated on {len(calibration.summary.answers)} answers" if calibration else ", without data")
    )
    mode = nncf.CompressWeightsMode.INT4_SYM if recipe.symmetric else nncf.CompressWeightsMode.INT4_ASYM
    fallback = nncf.GroupSizeFallbackMode.ADJUST if adjust_group_size else nncf.GroupSizeFallbackMode.ERROR
    model = openvino.Core().read_model(fp16 / MODEL[0])
    int8 = _int8_layers(model, calibration.largest(), ratio=recipe.ratio) if calibration else []
    try:
        with _nncf_bars():
            model = nncf.compress_weights(
                model,
                mode=mode,
                group_size=recipe.group_size,
                ratio=1.0 if calibration else recipe.ratio,
                ignored_scope=nncf.IgnoredScope(names=int8),
                advanced_parameters=nncf.AdvancedCompressionParameters(group_size_fallback_mode=fallback),
            )
            if int8:
                model = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM)
    except nncf.InvalidGroupSizeError as error:
        raise PipelineError(
            f"group size {recipe.group_size} does not divide the width of every layer: choose another group_size, "
            f"or set group_size_fallback: adjust for this model ({str(error).splitlines()[0]})"
        ) from error
    if calibration:
        _solve(model, calibration)
    say("saving the IR")
    with writing_to(target):
        openvino.save_model(model, target / MODEL[0], compress_to_fp16=False)
    for path in fp16.iterdir():
        if path.name not in (*MODEL, "manifest.json"):
            shutil.copyfile(path, target / path.name)


def _weights(model: Any) -> dict[str, Any]:
    # Return the weight constants of an IR by the name of their matrix, such as `model.layers.0.mlp.down_proj`.
    return {
        match[1]: operation
        for operation in model.get_ops()
        if operation.get_type_name() == "Constant"
        and (match := WEIGHT_CONSTANT.fullmatch(operation.get_friendly_name()))
        and len(operation.get_output_shape(0)) > 1
    }


def _int8_layers(model: Any, largest: dict[str, float], *, ratio: float) -> list[str]:
    # Return the names of the MatMul nodes whose weights stay INT8: just enough that at most `ratio` of the weights are
    # INT4. Layers with the largest inputs come first, where a layer counts by its column with the largest inputs. On
    # smol-phi3 this choice lost less (mean KL 0.0466) than a choice by the solver's own loss per weight (0.0496) or by
    # that loss relative to the output (0.0658).
    constants = {name: node for name, node in _weights(model).items() if _role(name) == "layer"}
    left = (1 - ratio) * sum(math.prod(node.get_output_shape(0)) for node in constants.values())
    chosen = []
    for name in sorted(constants, key=lambda name: -largest[name]):
        if left <= 0:
            break
        left -= math.prod(constants[name].get_output_shape(0))
        chosen.append(_consumer(constants[name], "MatMul").get_friendly_name())
    return chosen


def _consumer(node: Any, kind: str) -> Any:
    # Return the next node of type `kind` on the path from the output of `node`.
    while node.get_type_name() != kind:
        (port,) = node.output(0).get_target_inputs()
        node = port.get_node()
    return node


def _solve(model: Any, calibration: Calibration) -> None:
    # Replace the codes, scales and zero points of all layers of `model`. NNCF names scales and zero points after their
    # weight.
    import torch

    nodes = {node.get_friendly_name(): node for node in model.get_ops()}
    layers = {name: node for name, node in _weights(model).items() if _role(name) == "layer"}
    for name, node in Bar(sorted(layers.items()), desc="solving matrices"):
        shape = list(node.get_output_shape(0))
        zero_points = nodes.get(f"{node.get_friendly_name()}/zero_point")
        grid = Grid(
            bits=node.get_output_element_type(0).bitwidth,
            group_size=shape[2] if len(shape) == 3 else CHANNEL_WISE,
            symmetric=zero_points is None,
            scale_dtype=torch.float16,
        )
        solved = calibration.quantize(name, grid)
        if zero_points is None:
            _replace(node, solved.codes.numpy() - grid.middle)
        else:
            _replace(node, solved.codes.numpy())
            _replace(zero_points, solved.zero_points.numpy())
        _replace(nodes[f"{node.get_friendly_name()}/scale"], solved.scales.numpy())


def _replace(constant: Any, values: Any) -> None:
    # Replace `constant` by one of the same type, shape and name that holds `values`.
    from openvino import Tensor, op

    kind, shape = constant.get_output_element_type(0), constant.get_output_shape(0)
    tensor = Tensor(kind, shape)
    if kind.bitwidth == 4:
        tensor.data[:] = pack(values).view(tensor.data.dtype)
    else:
        tensor.data[:] = values.reshape(shape)
    new = op.Constant(tensor)
    new.set_friendly_name(constant.get_friendly_name())
    for port in constant.output(0).get_target_inputs():
        port.replace_source_output(new.output(0))


def read_matrices(directory: Path) -> list[Matrix]:
    """Return every weight matrix of the IR in `directory` as it is stored: bits, group size, symmetry.

    A compressed weight is a low-bit constant, minus a zero point if asymmetric, times a scale. The constant of a
    grouped weight has the shape (rows, groups, group size).
    """
    import openvino

    built = []
    model = openvino.Core().read_model(directory / MODEL[0])  # a constant knows its users only while this exists
    for matrix, operation in _weights(model).items():
        name, shape = f"{matrix}.weight", list(operation.get_output_shape(0))
        element = operation.get_output_element_type(0)
        groups = shape[2] if len(shape) == 3 else CHANNEL_WISE
        built.append(
            Matrix(
                name,
                _role(name),
                rows=shape[0],
                columns=shape[1] * shape[2] if len(shape) == 3 else shape[1],
                bits=element.bitwidth,
                group_size=groups,
                symmetric=not _has_zero_point(operation),
            )
        )
    return built


def expected_form(
    matrix: Matrix, *, recipe: OpenvinoFp16 | OpenvinoInt4, config: dict[str, Any], adjust_group_size: bool
) -> Matrix:
    """Return `matrix` as `recipe` stores it, with its bits as given, since NNCF chooses the INT4 and INT8 layers."""
    if isinstance(recipe, OpenvinoFp16):
        return replace(matrix, bits=16, group_size=CHANNEL_WISE, symmetric=True)
    if matrix.role != "layer" or matrix.bits != 4:
        return replace(matrix, bits=8, group_size=CHANNEL_WISE, symmetric=False)
    group_size: int = recipe.group_size
    while adjust_group_size and group_size > MIN_GROUP_SIZE and matrix.columns % group_size:
        group_size //= 2
    return replace(matrix, group_size=group_size, symmetric=recipe.symmetric)


def expected_size(
    source: list[Matrix], *, recipe: OpenvinoFp16 | OpenvinoInt4, config: dict[str, Any], adjust_group_size: bool
) -> float:
    """Return how many bytes of weights `recipe` makes of a checkpoint with the matrices `source`."""

    def size(bits: int) -> float:
        forms = (
            expected_form(replace(m, bits=bits), recipe=recipe, config=config, adjust_group_size=adjust_group_size)
            for m in source
        )
        return sum(form.size() for form in forms)

    ratio = recipe.ratio if isinstance(recipe, OpenvinoInt4) else 0
    return ratio * size(4) + (1 - ratio) * size(8)


def _role(name: str) -> Role:
    if "embed_tokens" in name:
        return "embedding"
    return "head" if "lm_head" in name else "layer"


def _has_zero_point(constant: Any) -> bool:
    node = constant
    for _ in range(3):  # constant, convert, subtract
        users = [port.get_node() for port in node.output(0).get_target_inputs()]
        if any(user.get_type_name() == "Subtract" for user in users):
            return True
        if not users or users[0].get_type_name() != "Convert":
            return False
        node = users[0]
    return False


@contextlib.contextmanager
def _nncf_bars() -> Iterator[None]:
    # Replace NNCF's progress bars by Bar: its own work in a terminal only, and would go to the log.
    from nncf.common.logging.track_progress import track

    def bar(self: Any) -> Iterator[Any]:
        return iter(Bar(self.sequence, desc=self.description, total=self.total if self.weights is None else None))

    own, track.__iter__ = track.__iter__, bar
    try:
        yield
    finally:
        track.__iter__ = own


@contextlib.contextmanager
def _optimum_messages() -> Iterator[list[str]]:
    """Collect what optimum's exporter logs, debug messages included, and keep the tracer's warnings off the screen."""
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger = logging.getLogger("optimum.exporters.openvino.convert")
    level, collector = logger.level, Collector()
    logger.addHandler(collector)
    logger.setLevel(logging.DEBUG)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield messages
    finally:
        logger.removeHandler(collector)
        logger.setLevel(level)
