"""The loss against independent arithmetic, its backends against each other, and its edge cases."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mlc_kernels import MLCLoss, loss_floor, mlc_loss, singular_values

BACKENDS = ["closed_form", "reference"]
# Unit roundoff of the input dtype bounds how well two exact formulas on the same input can agree after
# the result is rounded; float32 SVD (the reference for all narrow dtypes) adds a few ulps of its own.
LOSS_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
# Gradients are rounded to the input's dtype: half a unit in the last place of the largest entry, and
# for float32 the SVD's own error.
GRADIENT_TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}


def random_rows(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def random_mask(batch: int, languages: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, languages, generator=generator) > 0.3


def numpy_loss(rows: np.ndarray, temperature: float, scale: str) -> float:
    """Equation of the paper for one prompt, written without torch."""
    rows = rows[np.abs(rows).max(1) > 0]
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
def test_agrees_with_the_papers_equation(backend: str, scale: str, shape: tuple[int, int, int]) -> None:
    rows, mask = random_rows(*shape), random_mask(*shape[:2], seed=1)
    expected = [numpy_loss(r[m].numpy(), 0.2, scale) if m.any() else 0.0 for r, m in zip(rows, mask, strict=True)]
    found = mlc_loss(rows, mask, scale=scale, reduction="none", backend=backend)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", list(LOSS_TOLERANCE))
@pytest.mark.parametrize("scale", ["top", "none"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(1, 2, 2), (3, 5, 7), (4, 3, 130), (2, 13, 64), (5, 1, 9), (2, 9, 4)])
def test_closed_form_agrees_with_the_reference(
    dtype: torch.dtype, scale: str, reduction: str, shape: tuple[int, int, int]
) -> None:
    mask = random_mask(*shape[:2], seed=shape[1])
    weights = torch.arange(1.0, shape[0] + 1)
    results = []
    for backend, work in (("closed_form", dtype), ("reference", torch.float64)):
        rows = random_rows(*shape, dtype=dtype).to(work).requires_grad_()
        loss = mlc_loss(rows, mask, scale=scale, reduction=reduction, backend=backend)  # type: ignore[arg-type]
        (loss * weights if reduction == "none" else loss).sum().backward()
        assert rows.grad is not None
        results.append((loss.detach(), rows.grad))
    (loss, grad), (true_loss, true_grad) = results
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert grad.dtype == dtype
    torch.testing.assert_close(loss.double(), true_loss, rtol=0, atol=10 * LOSS_TOLERANCE[dtype])
    scale_of_gradient = true_grad.abs().max().clamp(min=1e-3)
    assert (grad.double() - true_grad).abs().max() <= GRADIENT_TOLERANCE[dtype] * scale_of_gradient


def test_gradcheck_against_finite_differences() -> None:
    rows, mask = random_rows(3, 4, 6).requires_grad_(), random_mask(3, 4, seed=2)
    # scale="none" only: under "top" the loss has a stop-gradient, which finite differences cannot see.
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(
            lambda x, how=reduction: mlc_loss(x, mask, scale="none", reduction=how, backend="closed_form"),
            (rows,),
        )


def test_gradcheck_with_the_top_value_held_fixed() -> None:
    """scale="top" equals scale="none" at temperature * s_1, for an s_1 that does not move."""
    rows = random_rows(1, 4, 6)
    top = float(singular_values(rows)[0, 0])
    expected = gradient(rows, scale="none", temperature=0.2 * top)
    torch.testing.assert_close(gradient(rows, scale="top", temperature=0.2), expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("eps", [1.0, 1e-1, 1e-2, 1e-3])
def test_gradient_is_exact_near_rank_one(eps: float) -> None:
    """Where training goes, float32 Gram matrices and SVDs lose the gradient; the bar is 1e-6."""
    rows = (random_rows(1, 1, 512) + eps * random_rows(1, 10, 512, seed=1)).float()
    truth = gradient(rows.double(), backend="reference")
    found = gradient(rows, backend="closed_form").double()
    assert (found - truth).norm() / truth.norm() < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_order_of_prompts_and_languages_does_not_matter(backend: str) -> None:
    rows, mask = random_rows(4, 6, 9), random_mask(4, 6)
    prompts, languages = torch.tensor([2, 0, 3, 1]), torch.tensor([5, 3, 0, 1, 4, 2])
    losses = mlc_loss(rows, mask, reduction="none", backend=backend)
    moved = mlc_loss(rows[prompts][:, languages], mask[prompts][:, languages], reduction="none", backend=backend)
    torch.testing.assert_close(moved, losses[prompts], rtol=1e-12, atol=1e-13)
    grad = gradient(rows, mask, backend=backend)
    moved_grad = gradient(rows[prompts][:, languages], mask[prompts][:, languages], backend=backend)
    torch.testing.assert_close(moved_grad, grad[prompts][:, languages], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_length_of_a_row_does_not_matter(backend: str) -> None:
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
        (torch.float16, 6e-8, 6e4),  # smallest subnormal, near the largest number
        (torch.bfloat16, 1e-38, 1e38),
        (torch.float32, 1e-38, 1e38),
        (torch.float64, 1e-200, 1e200),  # squares leave float64's range
    ],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_lengths(backend: str, dtype: torch.dtype, tiny: float, huge: float) -> None:
    rows = torch.zeros(1, 3, 3, dtype=dtype)
    rows[0, 0, 0], rows[0, 1, 1], rows[0, 2, 2] = tiny, huge, 1.0
    loss = mlc_loss(rows, backend=backend)  # three orthogonal rows: three equal singular values
    assert loss.item() == pytest.approx(math.log(3), rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("signs", [[1, 1, 1], [1, -1, 1]])
def test_rows_on_one_line_reach_the_floor(backend: str, signs: list[int]) -> None:
    """Duplicates and opposite rows alike: the loss knows lines, not directions."""
    row = random_rows(1, 1, 5)
    rows = row * torch.tensor(signs, dtype=torch.float64)[None, :, None]
    floor = math.log(1 + 2 * math.exp(-1 / 0.2))
    # A singular value of 0 comes out of a float64 eigenvalue of up to 1e-16 as up to 1e-8.
    assert mlc_loss(rows, backend=backend).item() == pytest.approx(floor, abs=1e-8)
    assert float(loss_floor(3)) == pytest.approx(floor, rel=1e-12)


def test_zero_singular_values_get_the_zero_subgradient() -> None:
    rows = random_rows(1, 1, 5).repeat(1, 3, 1)
    assert gradient(rows, backend="closed_form").abs().max() < 1e-12


def test_floor_without_scaling() -> None:
    assert float(loss_floor(4, 0.5, "none")) == pytest.approx(math.log(1 + 3 * math.exp(-2 / 0.5)))
    assert loss_floor(torch.tensor([0, 1, 2])).tolist() == pytest.approx([0, 0, math.log(1 + math.exp(-5))])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("content", [0.0, 5.0, float("nan"), float("inf")])
def test_a_masked_row_takes_no_part(backend: str, content: float) -> None:
    rows = random_rows(1, 4, 6)
    rows[0, 2] = content
    mask = torch.tensor([[True, True, False, True]])
    kept = rows[:, [0, 1, 3]]
    torch.testing.assert_close(mlc_loss(rows, mask, backend=backend), mlc_loss(kept, backend=backend))
    grad = gradient(rows, mask, backend=backend)
    assert torch.equal(grad[0, 2], torch.zeros(6, dtype=torch.float64))
    torch.testing.assert_close(grad[:, [0, 1, 3]], gradient(kept, backend=backend), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_zero_row_counts_as_masked(backend: str) -> None:
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
def test_prompts_with_fewer_than_two_rows_are_left_out(backend: str) -> None:
    rows = random_rows(4, 3, 5)
    mask = torch.tensor([[True] * 3, [True, False, False], [False] * 3, [True, True, False]])
    losses = mlc_loss(rows, mask, reduction="none", backend=backend)
    assert losses[1] == 0
    assert losses[2] == 0
    torch.testing.assert_close(mlc_loss(rows, mask, backend=backend), (losses[0] + losses[3]) / 2)
    grad = gradient(rows, mask, backend=backend)
    assert grad[1:3].abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 1, 4)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_to_compare_is_zero_with_a_zero_gradient(
    backend: str, shape: tuple[int, int, int], reduction: str
) -> None:
    rows = torch.ones(shape, requires_grad=True)
    loss = mlc_loss(rows, reduction=reduction, backend=backend)  # type: ignore[arg-type]
    loss.backward()
    assert loss.item() == 0
    assert rows.grad is not None
    assert rows.grad.abs().sum() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_input_is_written_to(backend: str) -> None:
    rows, mask = random_rows(2, 4, 5), random_mask(2, 4)
    copies = rows.clone(), mask.clone()
    gradient_input = rows.requires_grad_()
    mlc_loss(gradient_input, mask, backend=backend).backward()
    assert torch.equal(rows.detach(), copies[0])
    assert torch.equal(mask, copies[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_expanded_inputs(backend: str) -> None:
    wide = random_rows(6, 3, 10)
    view = wide.transpose(0, 1)[:, ::2, 1::3]
    torch.testing.assert_close(mlc_loss(view, backend=backend), mlc_loss(view.contiguous(), backend=backend))
    one = random_rows(1, 4, 5)
    expanded = one.expand(3, 4, 5)
    torch.testing.assert_close(mlc_loss(expanded, backend=backend), mlc_loss(one, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend: str) -> None:
    rows = random_rows(2, 5, 16, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = mlc_loss(rows, backend=backend)
    mixed.backward()  # outside, as PyTorch asks for
    assert mixed.dtype == torch.float32
    assert rows.grad is not None
    assert torch.equal(mixed, mlc_loss(rows, backend=backend))
    assert torch.equal(rows.grad, gradient(rows, backend=backend))


def test_compiles_into_one_graph() -> None:
    compiled = torch.compile(mlc_loss, fullgraph=True, backend="aot_eager")
    rows, mask = random_rows(2, 4, 8).requires_grad_(), random_mask(2, 4)
    compiled(rows, mask).backward()
    assert rows.grad is not None
    torch.testing.assert_close(rows.grad, gradient(rows, mask))


@pytest.mark.slow
def test_compiles_with_inductor() -> None:
    compiled = torch.compile(mlc_loss, fullgraph=True)
    rows, mask = random_rows(2, 4, 8).requires_grad_(), random_mask(2, 4)
    loss = compiled(rows, mask)
    loss.backward()
    torch.testing.assert_close(loss, mlc_loss(rows, mask))
    assert rows.grad is not None
    torch.testing.assert_close(rows.grad, gradient(rows, mask))


def test_never_waits_for_the_device() -> None:
    """On the meta device there are no values, so anything that reads one on the host fails."""
    rows = torch.empty(3, 4, 5, device="meta", requires_grad=True)
    mask = torch.empty(3, 4, device="meta", dtype=torch.bool)
    mlc_loss(rows, mask, backend="closed_form").backward()
    assert rows.grad is not None
    assert rows.grad.shape == rows.shape
    assert singular_values(rows, mask).shape == (3, 4)


def test_double_backward_is_refused() -> None:
    rows = random_rows(1, 3, 4).requires_grad_()
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.grad(mlc_loss(rows, backend="closed_form"), rows, create_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_singular_values(backend: str) -> None:
    rows, mask = random_rows(3, 6, 4), random_mask(3, 6, seed=3)
    found = singular_values(rows, mask, backend=backend)
    assert found.shape == (3, 6)
    assert not found.requires_grad
    for row, present, values in zip(rows, mask, found, strict=True):
        unit = (row[present] / row[present].norm(dim=1, keepdim=True)).numpy()
        expected = np.linalg.svd(unit, compute_uv=False)
        np.testing.assert_allclose(values[: len(expected)].numpy(), expected, atol=1e-12)
        assert values[len(expected) :].abs().max() < 1e-7 if len(expected) < 6 else True


def test_module_is_the_function_with_options() -> None:
    rows = random_rows(2, 3, 4)
    module = MLCLoss(temperature=0.5, scale="none", reduction="sum")
    assert torch.equal(module(rows), mlc_loss(rows, temperature=0.5, scale="none", reduction="sum"))
    assert "temperature=0.5" in repr(module)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"representations": torch.ones(2, 3)}, ValueError, "representations must be"),
        ({"representations": torch.ones(2, 3, 0)}, ValueError, "representations must have"),
        ({"representations": torch.ones(2, 3, 4, dtype=torch.int64)}, TypeError, "representations must be"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, ValueError, "mask must be"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask must be bool"),
        ({"temperature": 0.0}, ValueError, "temperature must be"),
        ({"temperature": float("nan")}, ValueError, "temperature must be"),
        ({"scale": "bottom"}, ValueError, "scale must be"),
        ({"reduction": "max"}, ValueError, "reduction must be"),
        ({"backend": "cuda"}, ValueError, "backend must be"),
    ],
)
def test_bad_arguments(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mlc_loss(**{"representations": torch.ones(2, 3, 4), **change})  # type: ignore[arg-type]
