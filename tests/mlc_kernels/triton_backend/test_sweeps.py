"""The sweeps alone: who meets whom in a turn, and what the bound at which they stop leaves of the error."""

from __future__ import annotations

import pytest
import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from mlc_kernels import fused, loss_kernels
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
    gram_ptr, out_ptr, languages, TURNED: tl.constexpr, TILE: tl.constexpr
):
    """(TILE, TILE) float64: the columns that the sweeps make orthogonal."""
    place = tl.arange(0, TILE)[:, None] * TILE + tl.arange(0, TILE)[None, :]
    tl.store(out_ptr + place, _orthogonal_columns(tl.load(gram_ptr + place), languages, TURNED, TILE))


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
    write_columns[(1,)](padded.to(device), out, languages, TURNED=bound, TILE=tile)
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


def largest_error(languages: int, difference: float, bound: float, device: str) -> float:
    worst = 0.0
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(1, 512, generator=generator, dtype=torch.float64)
        rows = rows + difference * torch.randn(languages, 512, generator=generator, dtype=torch.float64)
        unit = rows / rows.norm(dim=1, keepdim=True)
        truth = true_gradient(unit)
        error = (gradient_by_sweeps(unit, bound, device) - truth).norm() / truth.norm()
        worst = max(worst, float(error))
    return worst


# Rounding of float64 in the Gram matrix is magnified by the square of the difference, for either bound: 1e-16 over 1e-6
# or 1e-8, times a small factor. The rest of the narrow bound is what the sweeps leave.
@pytest.mark.parametrize(
    ("difference", "wide", "narrow"), [(1.0, 1e-12, 1e-9), (1e-1, 1e-12, 1e-9), (1e-2, 1e-10, 1e-9), (1e-3, 1e-8, 1e-8)]
)
@pytest.mark.parametrize("languages", [2, 10, 17])
def test_where_sweeps_stop(device: str, languages: int, difference: float, wide: float, narrow: float) -> None:
    """The bound of float64 rows leaves rounding alone; that of other rows leaves far less than float32 rounds away."""
    assert largest_error(languages, difference, loss_kernels._TURNED_WIDE.value, device) < wide
    assert largest_error(languages, difference, loss_kernels._TURNED.value, device) < narrow


def test_a_wider_bound_would_show(device: str) -> None:
    """The counterpart: sweeps that stop at a cosine of 1e-3 leave more than float32 rounds away."""
    assert max(largest_error(10, difference, 4e-6, device) for difference in (1.0, 1e-1)) > 1e-9
