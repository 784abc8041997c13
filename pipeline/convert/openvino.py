"""Export a checkpoint to an OpenVINO IR in FP16, and quantize the IR to INT4."""

import contextlib
import logging
import math
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipeline.common.checkpoint import to_float16
from pipeline.common.errors import PipelineError, writing_to
from pipeline.common.matrices import CHANNEL_WISE, role
from pipeline.common.params import OpenvinoInt4
from pipeline.common.paths import MANIFEST
from pipeline.common.progress import Bar, say
from pipeline.convert.calibration import Calibration
from pipeline.convert.openvino_format import MODEL, TOKENIZER, weights
from pipeline.convert.solver import Grid, pack

OTHERS = ("/scale", "/zero_point")  # how NNCF names what belongs to a weight


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
    int8 = _int8_layers(model, calibration.largest(), ratio=recipe.ratio) if calibration and recipe.ratio < 1 else []
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
        if path.name not in (*MODEL, MANIFEST):
            shutil.copyfile(path, target / path.name)


def _int8_layers(model: Any, largest: dict[str, float], *, ratio: float) -> list[str]:
    # Return the names of the MatMul nodes whose weights stay INT8: just enough that at most `ratio` of the weights are
    # INT4. Layers with the largest inputs come first, where a layer counts by its column with the largest inputs. On
    # smol-phi3 this choice lost less (mean KL 0.0466) than a choice by the solver's own loss per weight (0.0496) or by
    # that loss relative to the output (0.0658).
    constants = {name: node for name, node in weights(model).items() if role(name) == "layer"}
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
    # weight. What is replaced is popped, and so freed.
    import torch

    others = {node.get_friendly_name(): node for node in model.get_ops() if node.get_friendly_name().endswith(OTHERS)}
    layers = {name: node for name, node in weights(model).items() if role(name) == "layer"}
    for name in Bar(sorted(layers), desc="solving matrices"):
        node = layers.pop(name)
        shape = list(node.get_output_shape(0))
        zero_points = others.pop(f"{node.get_friendly_name()}/zero_point", None)
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
        _replace(others.pop(f"{node.get_friendly_name()}/scale"), solved.scales.numpy())


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
