"""How an OpenVINO IR stores its weights: what a built IR really holds, and what a recipe should give."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline.common.matrices import CHANNEL_WISE, Matrix, role
from pipeline.common.params import OpenvinoFp16, OpenvinoInt4

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


def weights(model: Any) -> dict[str, Any]:
    """Return the weight constants of the IR `model` by the name of their matrix: `model.layers.0.mlp.down_proj`."""
    return {
        match[1]: operation
        for operation in model.get_ops()
        if operation.get_type_name() == "Constant"
        and (match := WEIGHT_CONSTANT.fullmatch(operation.get_friendly_name()))
        and len(operation.get_output_shape(0)) > 1
    }


def read_matrices(directory: Path) -> list[Matrix]:
    """Return every weight matrix of the IR in `directory` as it is stored: bits, group size, symmetry.

    A compressed weight is a low-bit constant, minus a zero point if asymmetric, times a scale. The constant of a
    grouped weight has the shape (rows, groups, group size).
    """
    import openvino

    built = []
    model = openvino.Core().read_model(directory / MODEL[0])  # a constant knows its users only while this exists
    for matrix, operation in weights(model).items():
        name, shape = f"{matrix}.weight", list(operation.get_output_shape(0))
        element = operation.get_output_element_type(0)
        groups = shape[2] if len(shape) == 3 else CHANNEL_WISE
        built.append(
            Matrix(
                name,
                role(name),
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
