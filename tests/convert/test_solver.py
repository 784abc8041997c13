"""The solver's codes and scales are compared with brute force and the textbook's GPTQ, and its limits are tested."""

import gc
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.common.errors import PipelineError
from pipeline.common.matrices import CHANNEL_WISE
from pipeline.convert import solver
from pipeline.convert.solver import Grid, factorize, pack, quantize

SYMMETRIC = Grid(bits=4, group_size=CHANNEL_WISE, symmetric=True, scale_dtype=torch.float16)
GRIDS = [
    Grid(bits=bits, group_size=size, symmetric=symmetric, scale_dtype=kind)
    for bits, size, symmetric, kind in (
        (4, CHANNEL_WISE, True, torch.float16),
        (4, 32, True, torch.float16),
        (4, 32, False, torch.float32),
        (8, CHANNEL_WISE, False, torch.float16),
    )
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def inputs(tokens: int, columns: int) -> torch.Tensor:
    """Return inputs as language models have them: correlated, and with a few columns far larger than the rest."""
    mixed = torch.randn(tokens, columns) @ (torch.eye(columns) + 0.3 * torch.randn(columns, columns) / columns**0.5)
    return mixed * torch.exp(1.2 * torch.randn(columns))


def hessian(tokens: int, columns: int) -> torch.Tensor:
    """Return X'X of such inputs."""
    x = inputs(tokens, columns)
    return x.T @ x


def loss(weight: torch.Tensor, quantized: solver.Quantized, factor: solver.Factor) -> torch.Tensor:
    """Return ||R (w - q)||² of each row."""
    error = (weight - quantized.weights())[:, factor.order]
    return (error @ factor.slopes.T).square() @ factor.importance


def rounded(weight: torch.Tensor, grid: Grid, solved: solver.Quantized) -> solver.Quantized:
    """Return `weight` rounded to the nearest code of the scales of `solved`."""
    size = solved.group_size
    scales, zeros = (
        part.float().repeat_interleave(size, 1)[:, : weight.shape[1]] for part in (solved.scales, solved.zero_points)
    )
    codes = (weight / scales + zeros).round().clamp(0, grid.highest).to(torch.uint8)
    return solver.Quantized(codes, solved.scales, solved.zero_points, size)


def test_brute_force():
    """Of all 65,536 rows of codes for 4 columns, none beats the solver's by more than Babai's bound, a quarter of the
    sum of (R_jj scale)², and for most rows none is better at all."""
    weight, factor = torch.randn(40, 4), factorize(hessian(50, 4), name="m")
    solved = quantize(weight, factor, SYMMETRIC)
    found = loss(weight, solved, factor)
    every = torch.tensor(list(itertools.product(range(16), repeat=4)), dtype=torch.uint8)
    best = torch.stack(
        [
            loss(
                row[None], solver.Quantized(every, scale[None].expand(len(every), 1), torch.tensor([[8]]), 4), factor
            ).min()
            for row, scale in zip(weight, solved.scales, strict=True)
        ]
    )
    bound = factor.importance.sum() * solved.scales[:, 0].square() / 4
    assert (found >= best * 0.9999).all()
    # The bound holds for infinite lattices only, so rows with codes at the ends of the range are left out.
    inside = ((solved.codes > 0) & (solved.codes < 15)).all(1)
    assert (found - best <= bound)[inside].all()
    assert (found < best * 1.001).float().mean() > 0.6


def test_the_codes_of_gptq():
    """Frantar's GPTQ, which goes through the inverse of H column by column, gives the same codes."""
    columns = 24
    weight, h = torch.randn(16, columns), hessian(100, columns)
    factor = factorize(h, name="m")
    solved = quantize(weight, factor, SYMMETRIC)
    order = factor.order.flip(0)  # the solver decides the last column first, GPTQ the first
    damped = h.double() + torch.eye(columns) * solver.DAMPING * h.diagonal().mean()
    upper = torch.linalg.cholesky(torch.linalg.inv(damped[order][:, order]), upper=True)
    left, codes = weight.double()[:, order].clone(), torch.empty(16, columns, dtype=torch.uint8)
    scale = solved.scales[:, 0].double()
    for j in range(columns):
        codes[:, j] = (left[:, j] / scale + 8).round().clamp(0, 15)
        error = (left[:, j] - (codes[:, j].double() - 8) * scale) / upper[j, j]
        left[:, j:] -= error[:, None] * upper[j, j:]
    assert torch.equal(solved.codes[:, order], codes)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.bits}-{grid.group_size}-{grid.symmetric}")
def test_better_than_rounding(grid):
    """In every format the solver loses clearly less than rounding to the same scales, and its codes fit the bits."""
    weight, factor = torch.randn(64, 96), factorize(hessian(400, 96), name="m")
    solved = quantize(weight, factor, grid)
    assert solved.codes.max() <= grid.highest
    assert loss(weight, solved, factor).sum() < 0.9 * loss(weight, rounded(weight, grid, solved), factor).sum()


def test_the_order_of_columns(monkeypatch):
    """Columns with the largest inputs are decided first; in the plain order the loss is larger."""
    weight, h = torch.randn(64, 128), hessian(400, 128)
    ours = factorize(h, name="m")
    assert torch.equal(h.diagonal()[ours.order], h.diagonal().sort().values)
    found = loss(weight, quantize(weight, ours, SYMMETRIC), ours).sum()
    monkeypatch.setattr(torch.Tensor, "argsort", lambda self, **options: torch.arange(len(self)))
    plain = factorize(h, name="m")
    assert found < 0.97 * loss(weight, quantize(weight, plain, SYMMETRIC), plain).sum()


def test_the_search_for_scales(monkeypatch):
    """The solver also tries scales too small to cover the whole range, and they win where a row has an outlier."""
    weight, factor = torch.randn(64, 128), factorize(hessian(400, 128), name="m")
    weight[:, 7] *= 3
    found = loss(weight, quantize(weight, factor, SYMMETRIC), factor).sum()
    monkeypatch.setattr(solver, "SHRINK", [1.0])
    assert found < 0.9 * loss(weight, quantize(weight, factor, SYMMETRIC), factor).sum()


@pytest.mark.parametrize("grid", GRIDS)
def test_scales_are_searched_in_pieces(monkeypatch, grid):
    """A matrix is solved as a whole, though the scales of only a few of its rows are searched at a time."""
    weight, factor = torch.randn(50, 96), factorize(hessian(400, 96), name="m")
    whole = quantize(weight, factor, grid)
    monkeypatch.setattr(solver, "CACHED", 7 * 96)
    pieces = quantize(weight, factor, grid)
    torch.testing.assert_close(pieces.weights(), whole.weights(), rtol=1e-6, atol=0)


def test_columns_count_by_their_inputs():
    """A scale fits the columns with large inputs rather than the largest weights, where the two differ."""
    h = torch.eye(64) * 0.01
    h[:8, :8] = torch.eye(8) * 1000
    weight = torch.randn(32, 64)
    weight[:, :8] *= 0.3
    error = (weight - quantize(weight, factorize(h, name="m"), SYMMETRIC).weights()).abs()
    assert error[:, :8].mean() < 0.8 * error[:, 8:].mean()


def test_groups_that_do_not_divide():
    """The last group of a row may be shorter; each weight has the scale of its own group."""
    grid = Grid(bits=4, group_size=32, symmetric=False, scale_dtype=torch.float32)
    weight, factor = torch.randn(5, 72), factorize(hessian(200, 72), name="m")
    weight[:, 64:] *= 100
    solved = quantize(weight, factor, grid)
    assert solved.scales.shape == solved.zero_points.shape == (5, 3)
    assert (solved.scales[:, 2] > 10 * solved.scales[:, :2].amax(1)).all()
    assert solved.weights().shape == weight.shape


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.bits}-{grid.group_size}-{grid.symmetric}")
def test_nothing_to_see(grid):
    """Zero rows stay zero, and the result is finite and near the weights even when some columns have no inputs, there
    are fewer tokens than columns, or there are no inputs at all."""
    weight = torch.randn(6, 64)
    weight[2] = 0
    few = inputs(10, 64)
    few[:, 5:20] = 0
    for h in (few.T @ few, torch.zeros(64, 64)):
        quantized = quantize(weight, factorize(h, name="m"), grid)
        assert torch.isfinite(quantized.weights()).all()
        assert (quantized.weights()[2] == 0).all()
        assert torch.corrcoef(torch.stack([weight.flatten(), quantized.weights().flatten()]))[0, 1] > 0.9


def test_statistics_that_are_none():
    """Statistics with a value that is not finite, or that are not a sum of squares, are refused with a sentence."""
    h = hessian(100, 16)
    h[3, 4] = torch.nan
    with pytest.raises(
        PipelineError, match=r"the inputs of layer\.q are not finite on the calibration answers: the sou"
    ):
        factorize(h, name="layer.q")
    with pytest.raises(PipelineError, match=r"the statistics of layer\.q are no sum of squares"):
        factorize(hessian(100, 16) - 1e4 * torch.eye(16), name="layer.q")


def test_scales_are_those_of_the_file():
    """Scales, divided where that is asked for, are rounded to their stored form before codes are chosen."""
    weight, factor = torch.randn(8, 64) * 1e-3, factorize(hessian(100, 64), name="m")
    for divisor in (1, 8):
        grid = Grid(bits=4, group_size=32, symmetric=True, scale_dtype=torch.float16, scale_divisor=divisor)
        scales = quantize(weight, factor, grid).scales
        assert torch.equal((scales / divisor).half().float() * divisor, scales)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 70)),
    bits=st.sampled_from([4, 8]),
    size=st.sampled_from([CHANNEL_WISE, 1, 16, 32, 128]),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    magnitude=st.integers(-9, 4),
    seed=st.integers(0, 999),
)
def test_any_format(shape, bits, size, symmetric, dtype, magnitude, seed):
    """Whatever matrix and format, what is solved can be stored: codes and zero points in range, scales as in the file,
    one for each group; two codes in a byte are read back."""
    torch.manual_seed(seed)
    rows, columns = shape
    weight = torch.randn(rows, columns) * 10.0**magnitude
    grid = Grid(bits=bits, group_size=size, symmetric=symmetric, scale_dtype=dtype)
    solved = quantize(weight, factorize(hessian(columns + 3, columns), name="m"), grid)
    groups = -(-columns // solved.group_size)
    assert (solved.codes.shape, solved.scales.shape, solved.zero_points.shape) == (shape, *[(rows, groups)] * 2)
    assert int(solved.codes.max()) <= grid.highest
    assert int(solved.zero_points.max()) <= grid.highest
    assert not symmetric or (solved.zero_points == grid.middle).all()
    assert torch.equal(grid.stored(solved.scales), solved.scales)
    assert torch.isfinite(solved.weights()).all()
    packed = pack(solved.codes.numpy())
    codes = torch.from_numpy(packed).repeat_interleave(2)[: rows * columns]
    codes[1::2] >>= 4
    assert torch.equal(codes & 15, solved.codes.flatten() & 15)


def test_threads():
    """The same number of threads gives the same bytes; another number gives nearly the same loss."""
    weight, factor = torch.randn(256, 256), factorize(hessian(600, 256), name="m")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2):
            torch.set_num_threads(threads)
            found.append(quantize(weight, factor, SYMMETRIC))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0].codes, found[1].codes)
    assert torch.equal(found[0].scales, found[1].scales)
    losses = [float(loss(weight, solved, factor).sum()) for solved in found]
    assert losses[2] == pytest.approx(losses[0], rel=0.01)


def test_nothing_is_kept():
    """After a matrix is solved its arrays are freed at once, without waiting for Python's garbage collector."""
    weight, factor = torch.randn(32, 64), factorize(hessian(200, 64), name="m")

    def tensors() -> int:
        return sum(type(thing) is torch.Tensor for thing in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = tensors()
        quantize(weight, factor, SYMMETRIC)
        assert tensors() == before
    finally:
        gc.enable()


def test_pack():
    """Two codes are packed into a byte, the first in the low half; a single last code has a byte of its own."""
    assert pack(torch.tensor([[1, 2], [15, 0]]).numpy()).tolist() == [0x21, 0x0F]
    assert pack(torch.tensor([-8, 7, -1]).numpy()).tolist() == [0x78, 0x0F]
