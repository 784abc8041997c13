"""OpenVINO IR: export a checkpoint to FP16, quantize the IR to INT4, and read back what a built IR really holds."""

import contextlib
import logging
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.checkpoint import to_float16
from pipeline.errors import PipelineError, writing_to
from pipeline.ir_inputs import model_inputs
from pipeline.params import OpenvinoFp16, OpenvinoInt4
from pipeline.progress import Bar, say
from pipeline.recipe import CHANNEL_WISE, Matrix, Role

MODEL = ("openvino_model.xml", "openvino_model.bin")
TOKENIZER = (
    "openvino_tokenizer.xml",
    "openvino_tokenizer.bin",
    "openvino_detokenizer.xml",
    "openvino_detokenizer.bin",
)
# A weight's name in the IR: optimum renames those that it maps from a float16 checkpoint, NNCF the compressed ones.
WEIGHT_CONSTANT = re.compile(r"self\.(.+)\.(?:weight|_openvino_orig_weight)(?:_compressed)?")
REQUIRED = (*MODEL, *TOKENIZER, "config.json", "generation_config.json", "tokenizer.json")
WEIGHTS = MODEL[1]
MIN_GROUP_SIZE = 32  # min_adjusted_group_size of nncf.AdvancedCompressionParameters


def export_fp16(checkpoint: Path, target: Path, *, trust_remote_code: bool = False) -> None:
    """Write the FP16 IR of `checkpoint`, with the OpenVINO tokenizer and detokenizer, into the directory `target`.

    The weights are first streamed to float16, since from a float16 checkpoint the export maps them instead of
    copying: 3 GB of anonymous memory instead of 16 for 3.8 billion parameters, with the same bytes as result.

    Raises PipelineError when the tokenizer cannot be converted, with the reason.
    """
    with tempfile.TemporaryDirectory(prefix=".float16-", dir=target) as directory:
        half = Path(directory)
        to_float16(checkpoint, half)
        say("exporting the IR")
        with writing_to(target), _optimum_messages() as messages:
            from optimum.exporters.openvino import main_export
            from optimum.intel import OVConfig

            main_export(
                str(half),
                target,
                task="text-generation-with-past",
                library_name="transformers",
                ov_config=OVConfig(),  # as loaded: with dtype "fp16" the rotary frequencies lose precision, too
                convert_tokenizer=True,
                trust_remote_code=trust_remote_code,
                local_files_only=True,
            )
    # A failed tokenizer conversion is no error to optimum-intel, only a debug message.
    missing = [name for name in TOKENIZER if not (target / name).is_file()]
    if missing:
        reason = next((text for text in messages if "Tokenizer export" in text), "optimum-intel gave no reason")
        raise PipelineError(
            f"the tokenizer of {checkpoint} has no OpenVINO form, {missing[0]} was not written ({reason}): "
            "openvino-genai could not load the artifact."
        )


def quantize_int4(
    fp16: Path,
    target: Path,
    *,
    recipe: OpenvinoInt4,
    adjust_group_size: bool,
    calibration: list[list[int]],
) -> None:
    """Write the INT4 form of the FP16 IR in `fp16` into the directory `target`, with the other files beside it.

    `calibration` are the token ids of chats, used when the recipe is calibrated.

    Raises PipelineError when the group size does not divide a layer's width and `adjust_group_size` is false.
    """
    import nncf
    import openvino

    say(
        f"quantizing: group size {recipe.group_size}, ratio {recipe.ratio}"
        + (f", calibrated on {len(calibration)} answers" if recipe.calibrated else ", without data")
    )
    mode = nncf.CompressWeightsMode.INT4_SYM if recipe.symmetric else nncf.CompressWeightsMode.INT4_ASYM
    fallback = nncf.GroupSizeFallbackMode.ADJUST if adjust_group_size else nncf.GroupSizeFallbackMode.ERROR
    model = openvino.Core().read_model(fp16 / MODEL[0])
    try:
        with _nncf_bars():
            model = nncf.compress_weights(
                model,
                mode=mode,
                group_size=recipe.group_size,
                ratio=recipe.ratio,
                dataset=nncf.Dataset([model_inputs(ids) for ids in calibration]) if recipe.calibrated else None,
                sensitivity_metric=nncf.SensitivityMetric(recipe.sensitivity_metric),
                awq=recipe.awq,
                scale_estimation=recipe.scale_estimation,
                gptq=recipe.gptq,
                advanced_parameters=nncf.AdvancedCompressionParameters(group_size_fallback_mode=fallback),
            )
    except nncf.InvalidGroupSizeError as error:
        raise PipelineError(
            f"group size {recipe.group_size} does not divide the width of every layer: choose another group_size, "
            f"or set group_size_fallback: adjust for this model ({str(error).splitlines()[0]})"
        ) from error
    say("saving the IR")
    with writing_to(target):
        openvino.save_model(model, target / MODEL[0], compress_to_fp16=False)
    for path in fp16.iterdir():
        if path.name not in (*MODEL, "manifest.json"):
            shutil.copyfile(path, target / path.name)


def read_matrices(directory: Path) -> list[Matrix]:
    """Return every weight matrix of the IR in `directory` as it is stored: bits, group size, symmetry.

    A compressed weight is a low-bit constant, minus a zero point if asymmetric, times a scale; grouped ones have
    the shape (rows, groups, group size).
    """
    import openvino

    built = []
    for operation in openvino.Core().read_model(directory / MODEL[0]).get_ops():
        constant = WEIGHT_CONSTANT.fullmatch(operation.get_friendly_name())
        if operation.get_type_name() != "Constant" or constant is None:
            continue
        shape = list(operation.get_output_shape(0))
        if len(shape) < 2:
            continue
        name = f"{constant[1]}.weight"
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
    """Return `matrix` as `recipe` stores it, given its bits: NNCF chooses which layers are INT4 and which INT8."""
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
    """Return the bytes of weights that `recipe` leads to for a checkpoint with the matrices `source`."""

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
    # NNCF's own bars are of use in a terminal only, and go to the log.
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
