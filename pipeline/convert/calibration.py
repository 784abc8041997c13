"""Calibrate INT4 formats with the inputs that the source model's matrices get while it reads its own answers."""

import json
from pathlib import Path
from typing import Any

from pipeline.common import paths
from pipeline.common.checkpoint import open_weights, read_json
from pipeline.common.errors import PipelineError
from pipeline.common.params import OnnxInt4, OpenvinoInt4
from pipeline.common.progress import say
from pipeline.convert.rotation import Rotation, can_rotate
from pipeline.convert.solver import Factor, Grid, Quantized, factorize, quantize
from pipeline.convert.statistics import HEAD, SUMMARY, Summary, unfold
from pipeline.run.torch_device import torch_device


class Calibration:
    """What the stage calibrate wrote to `directory`, with the weights of the `checkpoint` that it was made from.

    With `rotated`, weights and H are those of the rotated model, and `rotation` is its rotation; a model that cannot be
    rotated is used as it is. Raises PipelineError when `directory` holds no calibration.
    """

    def __init__(self, directory: Path, checkpoint: Path, *, rotated: bool = False) -> None:
        try:
            self.summary = Summary.model_validate(json.loads((directory / SUMMARY).read_bytes()))
        except FileNotFoundError as error:
            raise PipelineError(f"{directory / SUMMARY} is missing: run the stage calibrate first.") from error
        self._directory, self._weight = directory, open_weights(checkpoint)
        self.rotation: Rotation | None = None
        if rotated and can_rotate(read_json(checkpoint / "config.json")):
            self.rotation = Rotation(checkpoint)
            self._weight = self.rotation.weight
        elif rotated:
            say("not rotated, since the model's head is its embedding")
        self._device = torch_device()
        self._last: tuple[str, Factor] | None = None

    def largest(self) -> dict[str, float]:
        """Return the largest diagonal element of each H by its matrix's name."""
        if self.rotation is None:
            return self.summary.largest
        return {matrix: float(self._hessian(matrix).diagonal().max()) for matrix in self.summary.largest}

    def quantize(self, matrix: str, grid: Grid, *, rows: slice = slice(None)) -> Quantized:
        """Return `rows` of the checkpoint's `matrix`, such as `model.layers.0.mlp.down_proj`, as `grid` stores them."""
        # The last factor is kept because the parts of a fused matrix, which share it, come one after another.
        if self._last is None or self._last[0] != matrix:
            self._last = None
            self._last = (matrix, factorize(self._hessian(matrix), name=matrix))
        weight = self._weight(f"{matrix}.weight")[rows].to(self._device)
        return quantize(weight, self._last[1], grid).cpu()

    def _hessian(self, matrix: str) -> Any:
        from safetensors import safe_open

        layer = matrix if matrix == HEAD else matrix.rsplit(".", 2)[0]
        with safe_open(self._directory / f"{layer}.safetensors", framework="pt") as file:
            hessian = unfold(file.get_tensor(matrix).to(self._device))
        return self.rotation.hessian(matrix, hessian) if self.rotation else hessian


def open_calibration(model: str, recipe: OpenvinoInt4 | OnnxInt4) -> Calibration | None:
    """Return the calibration of `model` for `recipe`, or None when the recipe uses no calibration.

    Raises PipelineError when the calibration does not exist yet.
    """
    if not recipe.calibrated:
        return None
    return Calibration(paths.calibration(model), paths.source(model), rotated=recipe.rotated)
