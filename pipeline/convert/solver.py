"""Codes, scales and zero points of one quantized weight matrix, chosen for the inputs that it really gets.

A matrix W (rows, columns) is multiplied with input vectors x. Quantized to Q, it makes the squared error
sum ||(W - Q) x||² over all inputs, which is trace((W - Q) H (W - Q)') with H = X'X, the sum of the inputs' outer
products. With the damped H = R'R (Cholesky, R upper triangular) the error of a row is ||R (w - q)||², and the best
codes are the nearest point of a lattice. `quantize` goes through the columns from the last to the first. Before it
rounds a column, it corrects the column for the errors of those that are already rounded (Babai's nearest plane,
https://doi.org/10.1007/BF02579403):

    q_j = round(t_j / scale) * scale    with    t_j = w_j + sum over k > j of R_jk / R_jj (w_k - q_k)

This gives the codes of GPTQ (https://arxiv.org/abs/2210.17323), which goes the other way and uses the inverse of H.
Columns are first sorted in ascending order of H's diagonal, so that those with the largest inputs are rounded first. A
column keeps the scale of the group that it was in before sorting.
"""

from dataclasses import dataclass
from typing import Any

from pipeline.common.errors import PipelineError
from pipeline.common.matrices import CHANNEL_WISE
from pipeline.run.torch_device import product

# This share of the mean of H's diagonal is added to the diagonal.
DAMPING = 0.02
# Scales tried per group: the one that covers the whole range, and smaller ones down to half of it.
SHRINK = [1 - step / 64 for step in range(33)]
LEAF = 16  # columns that are rounded one by one; between leaves, errors are passed on by matrix products
ROWS = 4096  # rows of a matrix that are solved at a time, since memory holds each a dozen times
CACHED = (
    2**20
)  # weights whose scales are searched at a time: so many stay in a processor's cache, which is 3 times as fast


@dataclass(frozen=True)
class Grid:
    """A storage format: the bits of a code, the weights per scale, whether it has zero points, the scales' precision.

    `scale_dtype` is the torch type that scales are stored in, after a division by `scale_divisor`.
    """

    bits: int
    group_size: int
    symmetric: bool
    scale_dtype: Any
    scale_divisor: float = 1.0

    @property
    def highest(self) -> int:
        """The highest code; the lowest is 0."""
        return int(2**self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric format."""
        return int(2 ** (self.bits - 1))

    def stored(self, scales: Any) -> Any:
        """Return float32 `scales` as they are read back from the file; none is zero."""
        import torch

        least = torch.finfo(self.scale_dtype).tiny * self.scale_divisor
        scales = torch.where(scales.abs() < least, torch.where(scales < 0, -least, least), scales)
        return (scales / self.scale_divisor).to(self.scale_dtype).float() * self.scale_divisor


@dataclass(frozen=True)
class Quantized:
    """A matrix as it is stored: `(codes - zero_points) * scales` are its weights.

    `codes` (rows, columns) and `zero_points` (rows, groups) are uint8, from 0 to 15 in INT4; `scales` (rows, groups)
    are float32. In a symmetric format all zero points are in the middle, at 8 in INT4; that is 8 steps from the lowest
    code and 7 from the highest, so a scale is negative where the largest weight of its group is positive.
    """

    codes: Any
    scales: Any
    zero_points: Any
    group_size: int

    def cpu(self) -> "Quantized":
        """Return the same on the CPU."""
        return Quantized(self.codes.cpu(), self.scales.cpu(), self.zero_points.cpu(), self.group_size)

    def weights(self) -> Any:
        """Return the float32 weights, shape (rows, columns)."""
        columns = self.codes.shape[1]
        scales, zero_points = (
            part.repeat_interleave(self.group_size, 1)[:, :columns] for part in (self.scales, self.zero_points)
        )
        return (self.codes.float() - zero_points.float()) * scales


@dataclass(frozen=True)
class Factor:
    """The damped H of one matrix, factored as H = R'R, with the columns in the order that they have in R.

    Column `order[j]` of the matrix is column j here. `slopes` is R with each row divided by its diagonal element.
    `importance` is the square of the diagonal: the squared error of a deviation by 1 in one column, after the columns
    before it, which are rounded later, have made up for it as well as they can.
    """

    order: Any
    slopes: Any
    importance: Any


def factorize(hessian: Any, *, name: str) -> Factor:
    """Return the factor of `hessian`, X'X of the inputs of the matrix `name`, float32 of shape (columns, columns).

    Raises PipelineError when it is not finite or not positive semidefinite.
    """
    import torch

    if not torch.isfinite(hessian).all():
        raise PipelineError(
            f"the inputs of {name} are not finite on the calibration answers: the source model itself computes "
            "infinities or NaN there; check its weights."
        )
    diagonal = hessian.diagonal()
    order = diagonal.argsort(stable=True)
    damped = hessian[order][:, order]
    damped.diagonal().add_(DAMPING * float(diagonal.mean()) or 1.0)  # if all inputs are 0, all columns count the same
    triangle, failed = torch.linalg.cholesky_ex(damped, upper=True)
    if failed:
        raise PipelineError(
            f"the statistics of {name} are no sum of squares, so the file with them is damaged: run the stage "
            "calibrate again."
        )
    scale = triangle.diagonal().clone()
    return Factor(order, triangle.div_(scale[:, None]), scale.square())


def quantize(weight: Any, factor: Factor, grid: Grid) -> Quantized:
    """Return `weight`, float32 of shape (rows, columns), quantized for the inputs that `factor` stands for."""
    import torch

    size = weight.shape[1] if grid.group_size == CHANNEL_WISE else grid.group_size
    parts = []
    for rows in weight.split(ROWS):
        few = -(-CACHED // rows.shape[1])
        found = [_search_scales(some, factor, size=size, grid=grid) for some in rows.split(few)]
        scales, zero_points = (torch.cat(part) for part in zip(*found, strict=True))
        parts.append(
            (_nearest_plane(rows, factor, scales, zero_points, size=size, highest=grid.highest), scales, zero_points)
        )
    codes, scales, zero_points = (torch.cat(part) for part in zip(*parts, strict=True))
    return Quantized(codes, scales, zero_points.to(torch.uint8), size)


def pack(nibbles: Any) -> Any:
    """Return the lowest 4 bits of each integer in `nibbles`, two to a byte; the first is in the lower half."""
    import numpy as np

    flat = nibbles.reshape(-1).astype(np.uint8) & 0xF
    flat = np.concatenate([flat, np.zeros(len(flat) % 2, np.uint8)])
    return flat[0::2] | flat[1::2] << 4


def _search_scales(weight: Any, factor: Factor, *, size: int, grid: Grid) -> tuple[Any, Any]:
    # Return the scale and zero point of each group, shape (rows, groups), with which rounding every weight to the
    # nearest code gives the least squared error, weighted by the importance of the columns.
    import torch

    importance = torch.empty_like(factor.importance)
    importance[factor.order] = factor.importance
    pad = -weight.shape[1] % size
    groups = torch.nn.functional.pad(weight, (0, pad)).unflatten(1, (-1, size))
    importance = torch.nn.functional.pad(importance, (0, pad)).view(-1, size)
    full, zero = _range(groups, grid)
    best, best_scale = torch.full_like(full, torch.inf), full
    for shrink in SHRINK:
        scale = grid.stored(full * shrink)
        codes = groups.div(scale[..., None]).add_(zero[..., None]).round_().clamp_(0, grid.highest)
        error = codes.sub_(zero[..., None]).mul_(scale[..., None]).sub_(groups).square_()
        error = torch.einsum("rgs,gs->rg", error, importance)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale, zero


def _range(groups: Any, grid: Grid) -> tuple[Any, Any]:
    # Return the scale that covers all weights of each of `groups` (rows, groups, size), and its zero point.
    import torch

    low, high = torch.aminmax(groups, dim=2)
    if grid.symmetric:
        largest = torch.where(low.abs() >= high.abs(), low, high)
        return largest / -grid.middle, torch.full_like(low, grid.middle)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / grid.highest
    return scale, (-low / scale.clamp(min=torch.finfo(scale.dtype).tiny)).round_().clamp_(0, grid.highest)


def _nearest_plane(weight: Any, factor: Factor, scales: Any, zero_points: Any, *, size: int, highest: int) -> Any:
    # Return the codes of `weight`. All arrays are transposed and in the factor's order, so a column is contiguous.
    import torch

    walk = _Walk(
        slopes=factor.slopes,
        group=(factor.order // size).tolist(),
        scales=scales.T.contiguous(),
        zero_points=zero_points.T.contiguous(),
        highest=highest,
        weight=weight.T[factor.order],
    )
    walk.decide(0, len(walk.weight))
    solved = torch.empty_like(walk.codes)
    solved[factor.order] = walk.codes
    return solved.T.contiguous()


class _Walk:
    # This is a class because an inner function that calls itself is a reference cycle, and would keep gigabytes of
    # arrays in memory until Python's garbage collector runs.

    def __init__(
        self, *, slopes: Any, group: list[int], scales: Any, zero_points: Any, highest: int, weight: Any
    ) -> None:
        import torch

        self.slopes, self.group, self.highest = slopes, group, highest
        self.scales, self.zero_points, self.weight = scales, zero_points, weight
        self.target, self.error = weight.clone(), torch.empty_like(weight)
        self.codes = torch.empty_like(weight, dtype=torch.uint8)

    def decide(self, start: int, end: int) -> None:
        if end - start > LEAF:
            middle = (start + end) // 2
            self.decide(middle, end)
            self.target[start:middle] += product(self.slopes[start:middle, middle:end], self.error[middle:end].T)
            self.decide(start, middle)
            return
        for j in reversed(range(start, end)):
            scale, zero = self.scales[self.group[j]], self.zero_points[self.group[j]]
            code = self.target[j].div(scale).add_(zero).round_().clamp_(0, self.highest)
            self.codes[j] = code
            self.error[j] = self.weight[j] - (code - zero) * scale
            self.target[start:j].addr_(self.slopes[start:j, j], self.error[j])
