"""The loss against independent arithmetic, the backends against each other, and edge cases.

Unless a comment says otherwise, a tolerance of 1e-9 to 1e-14 is float64 rounding (1e-16), magnified by the computation:
by sums over D, and by 1/s of the smallest singular value of a small random matrix.
"""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from mlc_kernels import closed_form, loss_floor, mlc_loss, singular_values
from mlc_kernels.functional import Backend, Reduction, Scale

BACKENDS: list[Backend] = ["closed_form", "reference"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def random_rows(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def random_mask(batch: int, languages: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, languages, generator=generator) > 0.3


def numpy_loss(rows: np.ndarray, temperature: float, scale: str) -> float:
    """The paper's equation for one prompt, without torch."""
    rows = rows[np.abs(rows).sum(1) > 0]
    if len(rows) < 2:
        return 0.0
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    s = np.linalg.svd(unit, compute_uv=False)
    logits = s / (temperature * (s[0] if scale == "top" else 1.0))
    return float(np.log(np.exp(logits - logits[0]).sum()))


def gradient(rows: Tensor, mask: Tensor | None = None, **options: object) -> Tensor:
    rows = rows.detach().clone().requires_grad_()
    mlc_loss(rows, mask, **options).backward()  # type: ignore[arg-type]
    assert rows.grad is not None
    return rows.grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", ["top", "none"])
@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 5, 7), (2, 7, 3), (4, 10, 33), (1, 13, 1)])
def test_agrees_with_the_papers_equation(backend: Backend, scale: Scale, shape: tuple[int, int, int]) -> None:
    rows, mask = random_rows(*shape), random_mask(*shape[:2], seed=1)
    expected = [numpy_loss(row[there].numpy(), 0.2, scale) for row, there in zip(rows, mask, strict=True)]
    found = mlc_loss(rows, mask, scale=scale, reduction="none", backend=backend)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12)


def assert_closed_form_is_exact(
    shape: tuple[int, int, int], dtype: torch.dtype, scale: Scale, reduction: Reduction, seed: int = 0
) -> None:
    """Compare loss and gradient with the definition, for the same numbers in float64."""
    mask = random_mask(*shape[:2], seed=shape[1] + seed)
    weights = torch.arange(1.0, shape[0] + 1)
    results = []
    for backend, work in (("closed_form", dtype), ("reference", torch.float64)):
        rows = random_rows(*shape, dtype=dtype, seed=seed).to(work).requires_grad_()
        loss = mlc_loss(rows, mask, scale=scale, reduction=reduction, backend=backend)
        (loss * weights if reduction == "none" else loss).sum().backward()
        assert rows.grad is not None
        results.append((loss.detach(), rows.grad))
    (loss, grad), (true_loss, true_grad) = results
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    # Below float64, only the result is rounded: each prompt's loss once, and every sum of at most 5 of them.
    rtol = 1e-12 if dtype == torch.float64 else 2**-21
    torch.testing.assert_close(loss.double(), true_loss, rtol=rtol, atol=1e-12)
    # The gradient is rounded once, to its own dtype, and so is the incoming one (float32): two half units.
    # The smallest number of float16 is its smallest subnormal. The rest is float64 rounding relative to the largest
    # entry.
    rtol = 0.0 if dtype == torch.float64 else torch.finfo(dtype).eps
    atol = 1e-10 * float(true_grad.abs().max().clamp(min=1e-3)) if true_grad.numel() else 0.0
    atol += 6e-8 if dtype == torch.float16 else 0.0
    torch.testing.assert_close(grad.double(), true_grad, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", ["top", "none"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 5, 7), (4, 3, 130), (2, 13, 64), (5, 1, 9), (2, 9, 4)])
def test_closed_form_agrees_with_the_reference(
    dtype: torch.dtype, scale: Scale, reduction: Reduction, shape: tuple[int, int, int]
) -> None:
    assert_closed_form_is_exact(shape, dtype, scale, reduction)


@pytest.mark.parametrize("seed", range(24))
def test_closed_form_agrees_with_the_reference_on_random_shapes(seed: int) -> None:
    draw = random.Random(seed)
    features = draw.choice([1, draw.randint(2, 13), draw.randint(14, 130)])
    shape = (draw.randint(1, 5), draw.randint(1, 13), features)
    assert_closed_form_is_exact(shape, DTYPES[seed % 4], "top", "mean", seed)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_reference_is_as_good_as_a_float32_svd(dtype: torch.dtype) -> None:
    rows = random_rows(3, 5, 40, dtype=dtype)
    found, truth = gradient(rows, backend="reference"), gradient(rows.double(), backend="reference")
    # A unit of float32 over the gap between singular values (singular vectors move by that, and gaps of 1/30 are usual
    # here), and half a unit of the dtype for the result.
    tolerance = 30 * torch.finfo(torch.float32).eps + torch.finfo(dtype).eps
    assert (found.double() - truth).abs().max() < tolerance * truth.abs().max()


def test_gradcheck_against_finite_differences() -> None:
    rows, mask = random_rows(3, 4, 6).requires_grad_(), random_mask(3, 4, seed=2)
    # Only scale="none": "top" has a stop-gradient, which finite differences cannot see.
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(
            lambda x, how=reduction: mlc_loss(x, mask, scale="none", reduction=how, backend="closed_form"),
            (rows,),
        )


def test_gradcheck_with_the_top_value_held_fixed() -> None:
    """scale="top" equals scale="none" at temperature * s_1, if s_1 is constant."""
    rows = random_rows(1, 4, 6)
    top = float(singular_values(rows)[0, 0])
    expected = gradient(rows, scale="none", temperature=0.2 * top)
    torch.testing.assert_close(gradient(rows, scale="top", temperature=0.2), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("eps", [1.0, 1e-1, 1e-2, 1e-3])
def test_gradient_is_exact_near_rank_one(eps: float) -> None:
    """Near rank one, the goal of training, float32 Gram matrices and SVDs lose the gradient.

    Rounding the result to float32 costs 3e-8. From eps = 1e-2 on, a float32 Gram matrix or a float32 bracket exceeds
    the bound of 1e-6.
    """
    rows = (random_rows(4, 1, 512) + eps * random_rows(4, 10, 512, seed=1)).float()
    truth = gradient(rows.double(), backend="reference")
    found = gradient(rows, backend="closed_form").double()
    assert (found - truth).norm() / truth.norm() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_order_of_prompts_and_languages_does_not_matter(backend: Backend) -> None:
    rows, mask = random_rows(4, 6, 9), random_mask(4, 6)
    prompts, languages = torch.tensor([2, 0, 3, 1]), torch.tensor([5, 3, 0, 1, 4, 2])
    losses = mlc_loss(rows, mask, reduction="none", backend=backend)
    moved_rows, moved_mask = rows[prompts][:, languages], mask[prompts][:, languages]
    moved = mlc_loss(moved_rows, moved_mask, reduction="none", backend=backend)
    torch.testing.assert_close(moved, losses[prompts], rtol=1e-12, atol=1e-13)
    grad = gradient(rows, mask, backend=backend)
    moved_grad = gradient(moved_rows, moved_mask, backend=backend)
    torch.testing.assert_close(moved_grad, grad[prompts][:, languages], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_length_of_a_row_does_not_matter(backend: Backend) -> None:
    rows = random_rows(2, 4, 8)
    lengths = torch.tensor([1e-30, 1.0, 7.0, 1e30], dtype=torch.float64)[None, :, None]
    torch.testing.assert_close(
        mlc_loss(rows * lengths, backend=backend), mlc_loss(rows, backend=backend), rtol=1e-10, atol=0
    )
    # Hence the gradient is orthogonal to each row.
    along = (gradient(rows, backend=backend) * rows).sum(2)
    torch.testing.assert_close(along, torch.zeros_like(along), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("dtype", "tiny", "huge"),
    [
        (torch.float16, 6e-8, 6e4),  # smallest subnormal, and near the largest number
        (torch.bfloat16, 1e-38, 1e38),
        (torch.float32, 1e-38, 1e38),
        (torch.float64, 1e-200, 1e200),  # squares leave the range of float64
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_lengths(backend: Backend, dtype: torch.dtype, tiny: float, huge: float) -> None:
    rows = torch.zeros(1, 3, 3, dtype=dtype)
    rows[0, 0, 0], rows[0, 1, 1], rows[0, 2, 2] = tiny, huge, 1.0
    loss = mlc_loss(rows, backend=backend)  # three orthogonal rows: three equal singular values
    assert loss.item() == pytest.approx(math.log(3), rel=1e-6)  # a float32 result


@pytest.mark.parametrize(
    ("dtype", "lengths"),
    [
        (torch.float16, [1.0, 8.0, 6e4]),
        (torch.bfloat16, [1e-30, 1.0, 1e30]),
        (torch.float32, [1e-30, 1.0, 1e30]),
        (torch.float64, [1e-200, 1.0, 1e200]),
    ],
)
def test_gradients_of_extreme_lengths(dtype: torch.dtype, lengths: list[float]) -> None:
    """The gradient of a row is the gradient of its direction, divided by the row's length."""
    rows = random_rows(1, 3, 4) * torch.tensor(lengths, dtype=torch.float64)[None, :, None] / 3
    rows = rows.to(dtype)
    norms = rows.double().abs().amax(2, keepdim=True)
    expected = gradient(rows.double() / norms)
    # One rounding to the dtype, relative to the largest entry of the row. At a length of 6e4, a float16 gradient is
    # about 1e-5, where float16 has steps of 6e-8.
    tolerance = {torch.float64: 1e-12, torch.float16: 1e-2}.get(dtype, torch.finfo(dtype).eps)
    error = (gradient(rows).double() * norms - expected).abs()
    assert (error <= tolerance * expected.abs().amax(2, keepdim=True)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("signs", [[1, 1, 1], [1, -1, 1]])
def test_rows_on_one_line_reach_the_floor(backend: Backend, signs: list[int]) -> None:
    """Duplicates and opposite rows are alike, because the loss depends on lines, not on directions."""
    row = random_rows(1, 1, 5)
    rows = row * torch.tensor(signs, dtype=torch.float64)[None, :, None]
    floor = math.log(1 + 2 * math.exp(-1 / 0.2))
    # A singular value of 0 comes from a float64 eigenvalue of up to 1e-16, so it may be as large as 1e-8.
    assert mlc_loss(rows, backend=backend).item() == pytest.approx(floor, abs=1e-8)
    assert float(loss_floor(3)) == pytest.approx(floor, rel=1e-12)


@pytest.mark.parametrize("shape", [(1, 3, 5), (4, 10, 512)])
@pytest.mark.parametrize("signed", [False, True])
def test_zero_singular_values_get_the_zero_subgradient(shape: tuple[int, int, int], signed: bool) -> None:
    rows = random_rows(shape[0], 1, shape[2]).repeat(1, shape[1], 1)
    rows[:, 1] *= -1 if signed else 1
    # An arbitrary subgradient would be 1e-3 to 1e-2 here.
    assert gradient(rows, backend="closed_form").abs().max() < 1e-12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("content", [0.0, 5.0, float("nan"), float("inf")])
def test_a_masked_row_takes_no_part(backend: Backend, content: float) -> None:
    rows = random_rows(1, 4, 6)
    rows[0, 2] = content
    mask = torch.tensor([[True, True, False, True]])
    kept = rows[:, [0, 1, 3]]
    torch.testing.assert_close(mlc_loss(rows, mask, backend=backend), mlc_loss(kept, backend=backend))
    grad = gradient(rows, mask, backend=backend)
    assert torch.equal(grad[0, 2], torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(grad[:, [0, 1, 3]], gradient(kept, backend=backend), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_zero_row_counts_as_masked(backend: Backend) -> None:
    rows = random_rows(1, 4, 6)
    rows[0, 1] = 0
    kept = rows[:, [0, 2, 3]]
    torch.testing.assert_close(mlc_loss(rows, backend=backend), mlc_loss(kept, backend=backend))
    assert torch.equal(gradient(rows, backend=backend)[0, 1], torch.zeros(6, dtype=torch.float64))


@pytest.mark.parametrize("content", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_spoils_its_own_prompt_alone(content: float) -> None:
    rows = random_rows(3, 3, 4)
    expected = mlc_loss(rows, reduction="none")
    rows[1, 0, 0] = content
    losses = mlc_loss(rows, reduction="none")
    assert losses[1].isnan()
    assert torch.equal(losses[[0, 2]], expected[[0, 2]])
    assert singular_values(rows)[1].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("content", [float("nan"), float("inf")])
@pytest.mark.parametrize("languages", [2, 3, 6])
def test_a_row_that_is_not_finite_spoils_its_prompt_only(
    backend: Backend, dtype: torch.dtype, content: float, languages: int
) -> None:
    """NaN in the result, which a gradient scaler handles: LAPACK must not raise for the batch, nor the result be 0."""
    rows = random_rows(3, languages, 4, dtype=dtype)
    rows[1, 0, 0] = content
    rows.requires_grad_()
    losses = mlc_loss(rows, reduction="none", backend=backend)
    losses.sum().backward()
    assert losses.isfinite().tolist() == [True, False, True]
    assert rows.grad is not None
    assert rows.grad[1].isnan().any()
    sound = torch.tensor([0, 2])
    # Equal numbers, in a batch of another size: rounding of the dtype.
    torch.testing.assert_close(rows.grad[sound], gradient(rows[sound], reduction="sum", backend=backend))
    assert singular_values(rows, backend=backend).isfinite().all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_prompt_that_does_not_count_may_hold_anything(backend: Backend) -> None:
    rows = random_rows(2, 3, 4)
    rows[1] = float("nan")
    mask = torch.tensor([[True, True, True], [False, True, False]])
    alone = gradient(rows[:1], backend=backend)
    torch.testing.assert_close(mlc_loss(rows, mask, backend=backend), mlc_loss(rows[:1], backend=backend))
    found = gradient(rows, mask, backend=backend)
    torch.testing.assert_close(found[:1], alone)
    assert torch.equal(found[1], torch.zeros_like(found[1]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_prompts_with_fewer_than_two_rows_are_left_out(backend: Backend) -> None:
    rows = random_rows(4, 3, 5)
    mask = torch.tensor([[True] * 3, [True, False, False], [False] * 3, [True, True, False]])
    losses = mlc_loss(rows, mask, reduction="none", backend=backend)
    assert losses[1] == 0
    assert losses[2] == 0
    torch.testing.assert_close(mlc_loss(rows, mask, backend=backend), (losses[0] + losses[3]) / 2)
    grad = gradient(rows, mask, backend=backend)
    assert grad[1:3].abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (0, 0, 4), (2, 1, 4), (2, 1, 1)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_to_compare_is_zero_with_a_zero_gradient(
    backend: Backend, shape: tuple[int, int, int], reduction: Reduction
) -> None:
    rows = torch.ones(shape, requires_grad=True)
    loss = mlc_loss(rows, reduction=reduction, backend=backend)
    assert loss.shape == (shape[:1] if reduction == "none" else ())
    loss.sum().backward()
    assert loss.abs().sum() == 0
    assert rows.grad is not None
    assert rows.grad.abs().sum() == 0
    assert singular_values(rows, backend=backend).shape == shape[:2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_input_is_written_to(backend: Backend) -> None:
    rows, mask = random_rows(2, 4, 5), random_mask(2, 4)
    copies = rows.clone(), mask.clone()
    gradient_input = rows.requires_grad_()
    mlc_loss(gradient_input, mask, backend=backend).backward()
    assert torch.equal(rows.detach(), copies[0])
    assert torch.equal(mask, copies[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_expanded_inputs(backend: Backend) -> None:
    wide = random_rows(6, 3, 10)
    view = wide.transpose(0, 1)[:, ::2, 1::3]
    torch.testing.assert_close(mlc_loss(view, backend=backend), mlc_loss(view.contiguous(), backend=backend))
    one = random_rows(1, 4, 5)
    expanded = one.expand(3, 4, 5)
    torch.testing.assert_close(mlc_loss(expanded, backend=backend), mlc_loss(one, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_singular_values(backend: Backend, dtype: torch.dtype) -> None:
    rows, mask = random_rows(5, 6, 4, dtype=dtype).requires_grad_(), random_mask(5, 6, seed=3)
    found = singular_values(rows, mask, backend=backend)
    assert found.shape == (5, 6)
    assert found.dtype == dtype
    assert not found.requires_grad
    for row, present, values in zip(rows.detach().double(), mask, found, strict=True):
        unit = (row[present] / row[present].norm(dim=1, keepdim=True)).numpy()
        expected = np.linalg.svd(unit, compute_uv=False)
        # A few units of the dtype, for values of up to 2.
        np.testing.assert_allclose(values[: len(expected)], expected, atol=10 * torch.finfo(dtype).eps)
        assert torch.equal(values[len(expected) :], torch.zeros(6 - len(expected), dtype=dtype))


class TestCompleteRows:
    """The closed form's short implementation, against the long one and the definition in float64."""

    @staticmethod
    def both_ways(
        monkeypatch: pytest.MonkeyPatch, rows: Tensor, mask: Tensor | None = None, **options: object
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Losses and gradient of the implementation that is chosen, and of the long one."""
        found = []
        for forced in (False, True):
            if forced:
                monkeypatch.setattr(closed_form, "_may_be_complete", lambda *_: False)
            x = rows.detach().clone().requires_grad_()
            losses = mlc_loss(x, mask, reduction="none", backend="closed_form", **options)  # type: ignore[arg-type]
            assert losses.grad_fn is not None
            assert (losses.grad_fn.name() == "_WithBracketBackward") is (not forced)
            (losses * torch.arange(1.0, len(x) + 1)).sum().backward()
            assert x.grad is not None
            found.append((losses.detach(), x.grad))
        monkeypatch.undo()
        return found[0], found[1]

    @pytest.mark.parametrize("dtype", DTYPES[1:])
    @pytest.mark.parametrize("scale", ["top", "none"])
    @pytest.mark.parametrize("shape", [(1, 2, 2), (3, 5, 7), (4, 3, 130), (2, 13, 64), (2, 9, 9)])
    @pytest.mark.parametrize("masked", [False, True])
    def test_both_ways_agree_with_the_definition(
        self,
        monkeypatch: pytest.MonkeyPatch,
        dtype: torch.dtype,
        scale: Scale,
        shape: tuple[int, int, int],
        masked: bool,
    ) -> None:
        rows = random_rows(*shape, dtype=dtype)
        mask = torch.ones(shape[:2], dtype=torch.bool) if masked else None
        short, long = self.both_ways(monkeypatch, rows, mask, scale=scale, temperature=0.3)
        wide = rows.double().requires_grad_()
        losses = mlc_loss(wide, scale=scale, temperature=0.3, reduction="none", backend="reference")
        (losses * torch.arange(1.0, len(rows) + 1)).sum().backward()
        assert wide.grad is not None
        unit = torch.finfo(dtype).eps
        for loss, grad in (short, long):
            torch.testing.assert_close(loss.double(), losses.detach(), rtol=2**-23, atol=0)  # rounded once
            # Rounded once; float64 rounding where terms cancel; the smallest number of float16 is its smallest
            # subnormal.
            atol = 1e-10 * float(wide.grad.abs().max()) + (6e-8 if dtype == torch.float16 else 0.0)
            torch.testing.assert_close(grad.double(), wide.grad, rtol=unit, atol=atol)

    @pytest.mark.parametrize("eps", [1.0, 1e-2, 1e-4, 0.0])
    def test_both_ways_agree_near_rank_one(self, monkeypatch: pytest.MonkeyPatch, eps: float) -> None:
        rows = (random_rows(3, 1, 96) + eps * random_rows(3, 10, 96, seed=1)).float()
        short, long = self.both_ways(monkeypatch, rows)
        torch.testing.assert_close(short[0], long[0], rtol=2**-23, atol=0)
        # The accuracy that is required. For equal rows the gradient is 0 up to float64 rounding.
        assert (short[1] - long[1]).norm() <= 1e-6 * long[1].norm() + 1e-12

    @pytest.mark.parametrize(
        ("dtype", "lengths"),
        [
            (torch.float16, [1.0, 8.0, 6e4]),
            (torch.bfloat16, [1e-36, 1.0, 1e37]),
            (torch.float32, [1e-36, 1.0, 1e37]),
        ],
    )
    def test_extreme_lengths_go_the_short_way(
        self, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, lengths: list[float]
    ) -> None:
        rows = (random_rows(2, 3, 5) * torch.tensor(lengths, dtype=torch.float64)[None, :, None] / 4).to(dtype)
        short, long = self.both_ways(monkeypatch, rows)
        torch.testing.assert_close(short[0], long[0], rtol=2**-23, atol=0)
        # Both are rounded once, relative to the largest entry of the row, or to a step of float16's subnormals.
        found, expected = short[1].double(), long[1].double()
        tolerance = torch.finfo(dtype).eps * expected.abs().amax(2, keepdim=True)
        tolerance += 6e-8 if dtype == torch.float16 else 0.0
        assert ((found - expected).abs() <= tolerance).all()

    @pytest.mark.parametrize("content", [0.0, float("nan"), float("inf"), float("-inf")])
    def test_a_row_without_a_direction_goes_the_long_way(self, content: float) -> None:
        rows = random_rows(2, 3, 4, dtype=torch.float32)
        rows[1, 0] = content
        losses = mlc_loss(rows.requires_grad_(), reduction="none", backend="closed_form")
        assert losses.grad_fn is not None
        assert losses.grad_fn.name() == "_PromptLossesBackward"
