"""The sweeps alone: who meets whom in a turn, and what the bound at which they stop leaves of the error."""

from __future__ import annotations

import pytest
import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from mlc_kernels import fused, loss_kernels, mlc_loss
from mlc_kernels.loss_kernels import _next_opposite, _orthogonal_columns, _partners

TEMPERATURE = 0.2


@triton.jit  # type: ignore[untyped-decorator]
def write_schedule(out_ptr, players, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """(players - 1, TILE): the partner of each column in each turn."""
    column = tl.arange(0, TILE)
    opposite = 0
    for turn in range(players - 1):
        tl.store(out_ptr + turn * TILE + column, _partners(column, turn, opposite, players))
        opposite = _next_opposite(opposite, players)


@triton.jit  # type: ignore[untyped-decorator]
def write_columns(  # type: ignore[no-untyped-def]
    gram_ptr, out_ptr, languages, BOUND: tl.constexpr, TILE: tl.constexpr
):
    """(TILE, TILE) float64: the columns that the sweeps make orthogonal."""
    place = tl.arange(0, TILE)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    tl.store(out_ptr + place, _orthogonal_columns(tl.load(gram_ptr + place), languages, BOUND, TILE))


@pytest.mark.parametrize("languages", range(2, 65))
def test_every_pair_meets_once_in_a_sweep(device: str, languages: int) -> None:
    tile = fused.tile_of(languages)
    players = languages + languages % 2
    found = torch.full((players - 1, tile), -1, dtype=torch.int32, device=device)
    write_schedule[(1,)](found, players, TILE=tile)
    turns = found.tolist()
    pairs = set()
    for turn, partners in enumerate(turns):
        assert partners[players:] == list(range(players, tile))  # padding has no partner
        assert partners[players - 1] == turn * (players // 2) % (players - 1)
        assert [partners[partner] for partner in partners] == list(range(tile))
        assert all(one != other for one, other in enumerate(partners[:players]))
        pairs |= {frozenset(pair) for pair in enumerate(partners[:players])}
    assert len(pairs) == players * (players - 1) // 2


def gradient_by_sweeps(unit: Tensor, bound: float, device: str) -> Tensor:
    """Gradient of the loss of (L, D) unit rows, with the spectrum from the kernel's sweeps, all else in float64."""
    languages = len(unit)
    tile = fused.tile_of(languages)
    gram = unit @ unit.T
    padded = torch.zeros(tile, tile, dtype=torch.float64)
    padded[:languages, :languages] = gram
    out = torch.empty_like(padded, device=device)
    write_columns[(1,)](padded.to(device), out, languages, BOUND=bound, TILE=tile)
    columns = out.cpu()[:languages, :languages]
    eigenvalues = columns.norm(dim=0)
    values, vectors = eigenvalues.sqrt(), columns / eigenvalues
    steepness = 1 / (TEMPERATURE * values.max())
    slopes = (torch.softmax(values * steepness, 0) - (values == values.max()).double()) * steepness
    bracket = (vectors * (slopes / values)) @ vectors.T
    return (bracket - torch.diag((bracket @ gram).diagonal())) @ unit


def true_gradient(unit: Tensor) -> Tensor:
    """The same by a float64 SVD, without singular vectors that autograd divides by differences."""
    left, values, right = torch.linalg.svd(unit, full_matrices=False)
    steepness = 1 / (TEMPERATURE * values[0])
    slopes = torch.softmax(values * steepness, 0)
    slopes[0] -= 1
    gradient = (left * (slopes * steepness)) @ right
    return gradient - (gradient * unit).sum(1, keepdim=True) * unit


def relative_error(unit: Tensor, bound: float, device: str) -> float:
    truth = true_gradient(unit)
    return float((gradient_by_sweeps(unit, bound, device) - truth).norm() / truth.norm())


def largest_error(languages: int, difference: float, bound: float, device: str) -> float:
    worst = 0.0
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(1, 512, generator=generator, dtype=torch.float64)
        rows = rows + difference * torch.randn(languages, 512, generator=generator, dtype=torch.float64)
        worst = max(worst, relative_error(rows / rows.norm(dim=1, keepdim=True), bound, device))
    return worst


def nearly_equal_values(kind: str, gap: float) -> Tensor:
    """(10, 10) unit rows with singular values that are equal but for ``gap``: all of them, or all but the largest."""
    noise = torch.randn(10, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tril(-1)
    nearly_orthogonal = torch.eye(10, dtype=torch.float64) + gap * (noise + noise.T)
    gram = nearly_orthogonal if kind == "all" else (nearly_orthogonal + 1) / 2
    rows = torch.linalg.cholesky(gram)
    return rows / rows.norm(dim=1, keepdim=True)


# Rounding of float64 in the Gram matrix is magnified by the square of the difference, for either bound: 1e-16 over 1e-6
# or 1e-8, times a small factor. The rest of the narrow bound is what the sweeps leave.
@pytest.mark.parametrize(
    ("difference", "wide", "narrow"), [(1.0, 1e-12, 1e-9), (1e-1, 1e-12, 1e-9), (1e-2, 1e-10, 1e-9), (1e-3, 1e-8, 1e-8)]
)
@pytest.mark.parametrize("languages", [2, 10, 17])
def test_where_sweeps_stop(device: str, languages: int, difference: float, wide: float, narrow: float) -> None:
    """The bound of float64 rows leaves rounding alone; that of other rows leaves far less than float32 rounds away."""
    assert largest_error(languages, difference, loss_kernels._BOUND_WIDE.value, device) < wide
    assert largest_error(languages, difference, loss_kernels._BOUND.value, device) < narrow


def test_a_wider_bound_would_show(device: str) -> None:
    """The counterpart: with a bound of 1e-2, both tests of errors would fail."""
    assert largest_error(10, 1.0, 4e-4, device) > 1e-9
    assert relative_error(nearly_equal_values("all", 1e-4), 4e-4, device) > 1e-13 / 1e-4


# Which of nearly equal values is the largest depends on the last digits of the rows: rounding of float64 is magnified
# by 1 / gap, and so is what the sweeps leave. Rounding the rows to float32 would cost 6e-8 / gap.
@pytest.mark.parametrize("gap", [1e-4, 1e-5, 1e-6, 1e-7])
@pytest.mark.parametrize("kind", ["all", "all but the largest"])
def test_nearly_equal_singular_values(device: str, kind: str, gap: float) -> None:
    """Rotations are large here, so a sweep does not square the cosines."""
    unit = nearly_equal_values(kind, gap)
    assert relative_error(unit, loss_kernels._BOUND_WIDE.value, device) < 1e-14 / gap
    assert relative_error(unit, loss_kernels._BOUND.value, device) < 1e-13 / gap


def test_the_bound_of_float64_rows(device: str) -> None:
    """Where the other bound leaves an error of 1e-12."""
    rows = nearly_equal_values("all but the largest", 1e-8).to(device).requires_grad_()
    (found,) = torch.autograd.grad(mlc_loss(rows[None], temperature=TEMPERATURE, backend="triton"), rows)
    truth = true_gradient(rows.detach().cpu())
    assert float((found.cpu() - truth).norm() / truth.norm()) < 1e-13
