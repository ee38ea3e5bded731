"""The Gram matrix in parts, and the loss kernel with one warp, against the float64 definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mlc_kernels import fused, mlc_loss, mlc_loss_from_hidden, singular_values, split
from mlc_kernels.launch import Call
from mlc_kernels.split import Split

pytestmark = pytest.mark.usefixtures("poisoned")

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
EVERY = range(1, 1 << 20)
Choose = Callable[[int, int, bool], None]


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Iterator[Choose]:
    """Chooses parts, and whether the loss kernel has one warp, for every input with this number of languages.

    In the end, loss kernels with this choice must have been launched, and each after its parts.
    """
    launched: list[str] = []
    expected: list[str] = []
    launch = fused.launch

    def noted(prepare: Any, layout: tuple[Any, ...], tensors: Any) -> None:
        if prepare in (fused._parts_call, fused._forward_call):
            launched.append(said(prepare(*layout)))
        launch(prepare, layout, tensors)

    def said(call: Call) -> str:
        return f"{call.grid[1]} x {call.options['num_warps']} warps, {call.constants.get('PARTS')} parts"

    def choose(languages: int, parts: int, one_warp: bool) -> None:
        tile = fused.tile_of(languages)
        monkeypatch.setattr(split, "SPLITS", (Split(tile, EVERY, EVERY, parts, one_warp),))
        warps = fused.FORWARD[tile][0]
        if parts > 1:
            expected.append(f"{parts} x {warps} warps, None parts")
        expected.append(f"1 x {1 if one_warp else warps} warps, {parts} parts")

    monkeypatch.setattr(fused, "launch", noted)
    yield choose
    assert launched
    assert launched == expected * (len(launched) // len(expected))


def some_rows(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    """(B, L, D) rows: a shared row plus a third of noise."""
    generator = torch.Generator().manual_seed(shape[1])
    shared = torch.randn(shape[0], 1, shape[2], generator=generator, dtype=F64)
    return (shared + 0.3 * torch.randn(shape, generator=generator, dtype=F64)).to(device, dtype)


def loss_and_gradient(rows: Tensor, backend: Any, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(B,) losses, and the gradient of their sum, weighted by 1, 2, ..."""
    rows = rows.detach().clone().requires_grad_()
    loss = mlc_loss(rows, mask, reduction="none", backend=backend)
    (grad,) = torch.autograd.grad(loss, rows, torch.arange(1, len(loss) + 1).to(loss))
    return loss.detach(), grad


def assert_close(found: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> None:
    """One rounding of loss and gradient to their types, relative to the largest entry.

    For float64 it is the rounding of a sum, over the square of the rows' closeness. Triton's interpreter cuts bfloat16.
    """
    for one, other in zip(found, truth, strict=True):
        allowed = 1e-12 if one.dtype == F64 else torch.finfo(one.dtype).eps
        scale = float(other.abs().max())
        assert scale > 1e-4
        torch.testing.assert_close(one.double(), other.double(), rtol=0.0, atol=allowed * scale)


@pytest.mark.parametrize(
    ("languages", "features", "parts", "one_warp", "dtype"),
    [
        (2, 5, 2, True, F32),  # the second part is empty
        (3, 129, 2, False, F32),  # and here it has one feature
        (10, 300, 3, True, F32),  # the last block is not full
        (10, 512, 4, True, BF16),  # whole blocks, wide loads
        (10, 640, 4, True, F16),  # steps of two blocks: the third part has one, the fourth none
        (16, 1000, 8, True, BF16),
        (16, 700, 5, False, F64),
        (7, 260, 1, True, F32),  # one warp alone
        (17, 200, 3, False, F32),
        (32, 130, 2, False, F64),
    ],
)
def test_against_the_definition(
    device: str, choose: Choose, languages: int, features: int, parts: int, one_warp: bool, dtype: torch.dtype
) -> None:
    rows = some_rows(3 if languages <= 16 else 1, languages, features, dtype=dtype, device=device)
    choose(languages, parts, one_warp)
    found = loss_and_gradient(rows, "triton")
    assert_close(found, loss_and_gradient(rows.double(), "reference"))
    again = loss_and_gradient(rows, "triton")
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


@pytest.mark.parametrize("dtype", [F32, F64])
def test_missing_rows_zeros_and_nan(device: str, choose: Choose, dtype: torch.dtype) -> None:
    """Missing rows; a row of zeros, which counts as missing; NaN and infinity in the last part of a row."""
    rows = some_rows(6, 5, 300, dtype=dtype, device=device)
    mask = torch.ones(rows.shape[:2], dtype=torch.bool, device=device)
    mask[1, 1] = mask[2, 0] = False
    mask[3, 1:] = False
    rows[~mask] = float("nan")  # must not be read
    rows[2, 2] = 0.0
    rows[4, 3, 290], rows[5, 0, 290] = float("nan"), float("inf")
    choose(5, 3, True)
    loss, grad = loss_and_gradient(rows, "triton", mask)
    assert loss.isnan().tolist() == [False, False, False, False, True, True]
    assert loss[3] == 0
    assert grad[4:].isnan().all()
    for missing in (grad[~mask], grad[2, 2], grad[3]):
        assert (missing == 0).all()
    true_loss, true_grad = loss_and_gradient(rows[:4].double(), "closed_form", mask[:4])
    assert_close((loss[:4], grad[:4]), (true_loss, true_grad))


@pytest.mark.parametrize("strided", [True, False])
def test_singular_values(device: str, choose: Choose, strided: bool) -> None:
    rows = some_rows(2, 10, 300, dtype=F32, device=device)
    rows = rows.transpose(0, 1).contiguous().transpose(0, 1) if strided else rows[:, :, :290]
    mask = torch.ones(10, 2, dtype=torch.bool, device=device).T
    mask[1, 0] = False
    choose(10, 3, True)
    found = singular_values(rows, mask, backend="triton")
    torch.testing.assert_close(
        found.double(), singular_values(rows.double(), mask, backend="reference"), atol=0, rtol=1e-6
    )


def test_rows_from_a_table(device: str, choose: Choose) -> None:
    """The last tokens of a layer's output, one translation of the second prompt missing."""
    hidden = some_rows(5, 4, 300, dtype=F32, device=device)
    ids = torch.tensor([[1, 0, 0, 1, 0], [0, 2, 1, 2, 0]], device=device)

    def run(hidden: Tensor, backend: Any) -> tuple[Tensor, Tensor]:
        hidden = hidden.detach().requires_grad_()
        loss = mlc_loss_from_hidden(hidden, ids[0], ids[1], 2, 3, pooling="last", backend=backend)
        return loss.detach(), torch.autograd.grad(loss, hidden)[0]

    choose(3, 2, True)
    assert_close(run(hidden, "triton"), run(hidden.double(), "reference"))


def test_parts_of_very_different_size(device: str, choose: Choose) -> None:
    """Each part of a float64 row has a divisor of its own: no square over- or underflows, and none loses its place."""
    rows = some_rows(3, 4, 300, dtype=F64, device=device)
    rows[0, :, :128] *= 1e200
    rows[1, :, 128:] *= 1e-200
    rows[2, ::2, 256:] *= 1e-3
    rows[2, 1::2] *= 1e-250
    choose(4, 3, True)
    loss, grad = loss_and_gradient(rows, "triton")
    scale = rows.abs().amax(-1, keepdim=True)
    true_loss, true_grad = loss_and_gradient(rows / scale, "reference")
    assert_close((loss, grad * scale), (true_loss, true_grad))


@pytest.mark.gpu
def test_a_graph_of_parts(device: str, choose: Choose) -> None:
    """A CUDA graph captures both launches, and the memory between them."""
    rows = some_rows(2, 10, 1000, dtype=F32, device=device)
    choose(10, 2, True)
    expected = mlc_loss(rows, reduction="none", backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = mlc_loss(rows, reduction="none", backend="triton")
    graph.replay()
    assert torch.equal(found, expected)


def test_the_first_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    first = Split(16, range(1024, 2048), range(1, 9), 2, True)
    second = Split(16, range(1024, 1 << 20), range(1, 3), 4, True)
    monkeypatch.setattr(split, "SPLITS", (first, second))
    assert split.split_of(16, 1024, 8) is first
    assert split.split_of(16, 2047, 1) is first
    assert split.split_of(16, 2048, 2) is second
    for tile, features, prompts in ((16, 1023, 1), (16, 1024, 9), (16, 2048, 3), (32, 1024, 1)):
        assert split.split_of(tile, features, prompts) is None
