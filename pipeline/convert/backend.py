"""The library behind a variant, OpenVINO or onnxruntime-genai: how its files are read and what they should hold."""

from pathlib import Path
from typing import Any, Protocol

from pipeline.common.matrices import Matrix
from pipeline.common.params import OnnxInt4, Variant
from pipeline.convert import onnx_format, openvino_format


class Backend(Protocol):
    """What pipeline/convert/openvino_format.py and pipeline/convert/onnx_format.py both offer."""

    REQUIRED: tuple[str, ...]  # the files without which the runtime cannot load the artifact
    WEIGHTS: str  # the file that holds the weights

    def read_matrices(self, directory: Path) -> list[Matrix]:
        """Return every weight matrix of the artifact in `directory` as it is stored."""

    def expected_form(self, matrix: Matrix, *, recipe: Any, config: dict[str, Any], adjust_group_size: bool) -> Matrix:
        """Return `matrix` as `recipe` stores it."""

    def expected_size(
        self, source: list[Matrix], *, recipe: Any, config: dict[str, Any], adjust_group_size: bool
    ) -> float:
        """Return the bytes of weights that `recipe` leads to for a checkpoint with the matrices `source`."""


def backend(variant: Variant) -> Backend:
    """Return the backend of `variant`."""
    return onnx_format if isinstance(variant, OnnxInt4) else openvino_format
