"""INT4 codes, scales and zero points of one weight matrix, chosen for the inputs that the matrix really gets.

A matrix W (rows, columns) meets input vectors x. Quantized to Q, it makes the squared error sum ||(W - Q) x||² over
all inputs, which is trace((W - Q) H (W - Q)') with H = X'X, the sum of the inputs' outer products. With the damped
H = R'R (Cholesky, R upper triangular) the error of a row is ||R (w - q)||², and the best codes are the nearest point
of a lattice. `quantize` walks its columns from the last to the first, and rounds each after it has made up for the
errors of those that are decided (Babai's nearest plane, https://doi.org/10.1007/BF02579403):

    q_j = round(t_j / scale) * scale    with    t_j = w_j + sum over k > j of R_jk / R_jj (w_k - q_k)

This gives the codes of GPTQ (https://arxiv.org/abs/2210.17323), which walks the other way with the inverse of H.
Columns are put in ascending order of H's diagonal, so that those with the largest inputs are decided first. A column
keeps the scale of the group that it was in before.
"""

from dataclasses import dataclass
from typing import Any

from pipeline.errors import PipelineError
from pipeline.recipe import CHANNEL_WISE

BITS = 4
LEVELS = 2**BITS
# Of the mean of H's diagonal, added to the diagonal.
DAMPING = 0.05
# Scales tried per group: the one that covers the whole range, and smaller ones down to half of it.
SHRINK = [1 - step / 64 for step in range(33)]
LEAF = 16  # columns that are rounded one by one; all that leads from one leaf to another are matrix products
SWEEPS = 2
ROWS = 4096  # of a matrix that are solved at a time: what a row needs is in memory a dozen times


@dataclass(frozen=True)
class Grid:
    """What the stored format admits: weights per scale, zero points or none, the scales' precision.

    `scale_dtype` is the torch type that scales are stored in, after a division by `scale_divisor`.
    """

    group_size: int
    symmetric: bool
    scale_dtype: Any
    scale_divisor: float = 1.0

    def stored(self, scales: Any) -> Any:
        """Return float32 `scales` as they come back from the file; none is zero."""
        import torch

        least = torch.finfo(self.scale_dtype).tiny * self.scale_divisor
        scales = torch.where(scales.abs() < least, torch.where(scales < 0, -least, least), scales)
        return (scales / self.scale_divisor).to(self.scale_dtype).float() * self.scale_divisor


@dataclass(frozen=True)
class Quantized:
    """A matrix as it is stored: `(codes - zero_points) * scales` are its weights.

    `codes` (rows, columns) and `zero_points` (rows, groups) are whole numbers from 0 to 15; `scales` (rows, groups) are
    float32, and negative where a symmetric group's largest weight is positive, since 0 lies 8 steps from one end of the
    range and 7 from the other. Symmetric formats have the zero point 8.
    """

    codes: Any
    scales: Any
    zero_points: Any
    group_size: int

    def weights(self) -> Any:
        """Return the float32 weights, shape (rows, columns)."""
        columns = self.codes.shape[1]
        scales, zero_points = (
            part.repeat_interleave(self.group_size, 1)[:, :columns] for part in (self.scales, self.zero_points)
        )
        return (self.codes.float() - zero_points.float()) * scales


@dataclass(frozen=True)
class Factor:
    """The damped H of one matrix, columns in the order in which they lie in R, and H = R'R."""

    hessian: Any
    order: Any
    triangle: Any


def factorize(hessian: Any, *, name: str) -> Factor:
    """Return the factor of `hessian`, X'X of the inputs of the matrix `name`, float32 of shape (columns, columns).

    Raises PipelineError when it is not finite or not positive semidefinite.
    """
    import torch

    if not torch.isfinite(hessian).all():
        raise PipelineError(
            f"the inputs of {name} are not finite on the calibration answers: the source model itself computes inf or "
            "NaN there; check its weights."
        )
    diagonal = hessian.diagonal()
    order = diagonal.argsort(stable=True)
    damped = hessian[order][:, order]
    damped.diagonal().add_(DAMPING * float(diagonal.mean()) or 1.0)
    triangle, failed = torch.linalg.cholesky_ex(damped, upper=True)
    if failed:
        raise PipelineError(
            f"the statistics of {name} are no sum of squares: the file that the stage calibrate wrote is damaged; "
            "build it again."
        )
    return Factor(damped, order, triangle)


def quantize(weight: Any, factor: Factor, grid: Grid) -> Quantized:
    """Return `weight`, float32 of shape (rows, columns), quantized for the inputs that `factor` stands for."""
    import torch

    parts = [_quantize(rows, factor, grid) for rows in weight.split(ROWS)]
    size = weight.shape[1] if grid.group_size == CHANNEL_WISE else grid.group_size
    return Quantized(*(torch.cat(columns) for columns in zip(*parts, strict=True)), size)


def loss(weight: Any, quantized: Quantized, factor: Factor) -> Any:
    """Return ||R (w - q)||² of each row, shape (rows,)."""
    error = (weight - quantized.weights())[:, factor.order]
    return (error @ factor.triangle.T).square().sum(1)


def _quantize(weight: Any, factor: Factor, grid: Grid) -> tuple[Any, Any, Any]:
    import torch

    columns = weight.shape[1]
    size = columns if grid.group_size == CHANNEL_WISE else grid.group_size
    importance = torch.empty(columns)
    importance[factor.order] = factor.triangle.diagonal().square()
    scales, zero_points = _search_scales(weight, importance, size=size, grid=grid)
    # Everything transposed: the numbers of one column lie together.
    group = factor.order // size
    walk = _Walk(
        weight=weight.T[factor.order].contiguous(),
        scales=scales.T.contiguous(),
        zero_points=zero_points.T.contiguous(),
        group=group,
    )
    walk.babai(factor)
    for _ in range(SWEEPS):
        walk.refit(factor, grid)
        walk.descend(factor)
    codes = torch.empty(columns, len(weight), dtype=torch.uint8)
    codes[factor.order] = walk.codes.to(torch.uint8)
    return codes.T.contiguous(), walk.scales.T.contiguous(), zero_points.to(torch.uint8)


def _search_scales(weight: Any, importance: Any, *, size: int, grid: Grid) -> tuple[Any, Any]:
    # The scale and zero point of each group, shape (rows, groups), that rounding to the nearest code is best with.
    import torch

    pad = -weight.shape[1] % size
    groups = torch.nn.functional.pad(weight, (0, pad)).unflatten(1, (-1, size))
    importance = torch.nn.functional.pad(importance, (0, pad)).view(-1, size)
    low, high = torch.aminmax(groups, dim=2)
    best = torch.full(low.shape, torch.inf)
    best_scale, best_zero = torch.ones_like(low), torch.full_like(low, LEVELS // 2)
    for full, zero in _ranges(low, high, symmetric=grid.symmetric):
        for shrink in SHRINK:
            scale = grid.stored(full * shrink)
            codes = groups.div(scale[..., None]).add_(zero[..., None]).round_().clamp_(0, LEVELS - 1)
            error = codes.sub_(zero[..., None]).mul_(scale[..., None]).sub_(groups).square_()
            error = torch.einsum("rgs,gs->rg", error, importance)
            better = error < best
            best = torch.where(better, error, best)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero


def _ranges(low: Any, high: Any, *, symmetric: bool) -> list[tuple[Any, Any]]:
    # Pairs of the scale that covers the range from `low` to `high`, and of its zero point.
    import torch

    if symmetric:
        largest = torch.where(low.abs() >= high.abs(), low, high)
        return [(largest / -(LEVELS // 2), torch.full_like(low, LEVELS // 2))]
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low) / (LEVELS - 1)
    zero = (-low / scale.clamp(min=torch.finfo(scale.dtype).tiny)).round_().clamp_(0, LEVELS - 1)
    return [(scale, zero)]


class _Walk:
    # The state of one solution; all matrices are transposed, (columns in the factor's order or groups, rows).

    def __init__(self, *, weight: Any, scales: Any, zero_points: Any, group: Any) -> None:
        import torch

        self.weight, self.scales, self.zero_points = weight, scales, zero_points
        self.group = group.tolist()
        self.groups = group
        self.codes = torch.empty_like(weight)
        self.error = torch.empty_like(weight)

    def babai(self, factor: Factor) -> None:
        slopes = factor.triangle / factor.triangle.diagonal()[:, None]
        self._babai(slopes, self.weight.clone(), 0, len(self.weight))

    def _babai(self, slopes: Any, target: Any, start: int, end: int) -> None:
        if end - start > LEAF:
            middle = (start + end) // 2
            self._babai(slopes, target, middle, end)
            target[start:middle].addmm_(slopes[start:middle, middle:end], self.error[middle:end])
            self._babai(slopes, target, start, middle)
            return
        for j in range(end - 1, start - 1, -1):
            self._round(j, target[j])
            target[start:j].addr_(slopes[start:j, j], self.error[j])

    def _round(self, j: int, target: Any) -> None:
        scale, zero = self.scales[self.group[j]], self.zero_points[self.group[j]]
        code = (target / scale).add_(zero).round_().clamp_(0, LEVELS - 1)
        self.codes[j] = code
        self.error[j] = self.weight[j] - (code - zero) * scale

    def descend(self, factor: Factor) -> None:
        # One sweep over all codes: each becomes the best for the others as they are.
        hessian = factor.hessian
        for start in range(0, len(self.weight), LEAF * 4):
            end = min(start + LEAF * 4, len(self.weight))
            gradient = hessian[start:end] @ self.error
            for j in range(start, end):
                before = self.error[j].clone()
                self._round(j, self.weight[j] - before + gradient[j - start] / hessian[j, j])
                gradient.addr_(hessian[start:end, j], self.error[j] - before)

    def refit(self, factor: Factor, grid: Grid) -> None:
        # Each group's scale becomes the best for its codes and all the other groups as they are.
        import torch

        for g in range(len(self.scales)):
            members = (self.groups == g).nonzero()[:, 0]
            steps = self.codes[members] - self.zero_points[g]
            hessian = factor.hessian[members]
            gain = (steps * (hessian @ self.error)).sum(0)
            curvature = (steps * (hessian[:, members] @ steps)).sum(0)
            scale = self.scales[g] + torch.where(curvature > 0, gain / curvature, torch.zeros_like(gain))
            self.scales[g] = grid.stored(scale)
            self.error[members] = self.weight[members] - steps * self.scales[g]
