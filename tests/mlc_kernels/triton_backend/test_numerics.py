"""Loss, gradient and singular values of the kernel against a float64 SVD and against the other backends.

"Error" means that of the largest entry, relative to the largest entry.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mlc_kernels import fused, launch, mlc_loss, singular_values
from mlc_kernels.functional import Reduction, Scale

pytestmark = pytest.mark.usefixtures("poisoned")

LANGUAGES = (2, 3, 7, 10, 16, 17, 31, 32, 64)
FEATURES = (1, 60, 123, 512, 4096)
CLOSENESS = (1.0, 1e-1, 1e-2, 1e-3)
FLOAT32 = torch.finfo(torch.float32).eps


def close_rows(batch: int, languages: int, features: int, eps: float, seed: int = 0) -> Tensor:
    """Rows that differ by ``eps`` from a shared row, as they do in the course of training."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(batch, 1, features, generator=generator, dtype=torch.float64)
    return base + eps * torch.randn(batch, languages, features, generator=generator, dtype=torch.float64)


def random_mask(batch: int, languages: int, seed: int = 0) -> Tensor:
    return torch.rand(batch, languages, generator=torch.Generator().manual_seed(seed)) > 0.3


def loss_and_gradient(rows: Tensor, mask: Tensor | None = None, **options: object) -> tuple[Tensor, Tensor]:
    rows = rows.detach().clone().requires_grad_()
    loss = mlc_loss(rows, mask, **options)  # type: ignore[arg-type]
    weights = torch.arange(1.0, loss.numel() + 1, device=rows.device)
    (grad,) = torch.autograd.grad(loss, rows, weights.to(loss.dtype).reshape(loss.shape))
    return loss.detach(), grad


def error(found: Tensor, truth: Tensor) -> float:
    # If all rows lie on one line, the true gradient is 0, and so is its scale.
    scale = truth.double().abs().max().clamp(min=1e-6)
    return float((found.double() - truth.double()).abs().max() / scale)


def assert_accurate(rows: Tensor, ceiling: float, rounding: float) -> None:
    """Assert errors below ``ceiling``, and at most those of an eager float32 SVD plus rounding of the result."""
    loss, grad = loss_and_gradient(rows, backend="triton", reduction="none")
    true_loss, true_grad = loss_and_gradient(rows.double(), backend="reference", reduction="none")
    eager_loss, eager_grad = loss_and_gradient(rows, backend="reference", reduction="none")
    assert error(grad, true_grad) < ceiling
    assert error(grad, true_grad) <= max(error(eager_grad, true_grad), rounding)
    assert error(loss, true_loss) <= max(error(eager_loss, true_loss), FLOAT32)


def sizes() -> list[tuple[int, int]]:
    """Each number of languages with each number of features; only two of these where a case takes seconds."""
    both = [(languages, features) for languages in LANGUAGES for features in FEATURES]
    if torch.cuda.is_available():
        return both
    few = {31: (60, 123), 32: (1, 4096), 64: (1, 123)}
    return [(languages, features) for languages, features in both if features in few.get(languages, FEATURES)]


# Each size has one closeness, chosen so that every language count and every feature count meets all of them. The full
# product takes four times as long.
@pytest.mark.parametrize(("languages", "features"), sizes())
def test_float32_accuracy(device: str, languages: int, features: int) -> None:
    eps = CLOSENESS[(LANGUAGES.index(languages) + FEATURES.index(features)) % len(CLOSENESS)]
    rows = close_rows(1, languages, features, eps).float().to(device)
    # Float32 arithmetic in any place would exceed the bound of 1e-5 by far. Rounding the result costs 6e-8.
    assert_accurate(rows, 1e-5, FLOAT32)


@pytest.mark.parametrize("eps", CLOSENESS)
@pytest.mark.parametrize("languages", [2, 10, 32])
def test_float32_accuracy_at_every_closeness(device: str, languages: int, eps: float) -> None:
    assert_accurate(close_rows(2, languages, 512, eps, seed=1).float().to(device), 1e-5, FLOAT32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("languages", "features"), [(3, 123), (10, 512), (17, 60), (2, 4096)])
@pytest.mark.parametrize("eps", [1.0, 1e-1])
def test_16_bit_accuracy(device: str, dtype: torch.dtype, languages: int, features: int, eps: float) -> None:
    """The true result is that of the rows after rounding to 16 bits; the gradient is rounded to 16 bits again."""
    rows = close_rows(2, languages, features, eps).to(dtype).to(device)
    # Half a unit for rounding to nearest, a whole unit in the interpreter, which truncates to bfloat16.
    assert_accurate(rows, 2 * torch.finfo(dtype).eps, torch.finfo(dtype).eps)


@pytest.mark.parametrize("eps", CLOSENESS)
@pytest.mark.parametrize(("languages", "features"), [(3, 5), (10, 60), (17, 40)])
def test_float64_accuracy(device: str, languages: int, features: int, eps: float) -> None:
    rows = close_rows(2, languages, features, eps).to(device)
    loss, grad = loss_and_gradient(rows, backend="triton", reduction="none")
    true_loss, true_grad = loss_and_gradient(rows, backend="reference", reduction="none")
    assert loss.dtype == grad.dtype == torch.float64
    # Squares in the Gram matrix: float64 rounding over the square of the closeness, times a small factor for the sums.
    assert error(grad, true_grad) < 1e-14 / eps**2 + 1e-13
    assert error(loss, true_loss) < 1e-14 / eps + 1e-14


SPECTRA = ["orthogonal", "repeated", "two lines", "few features", "two tight clusters", "one apart"]


def spectrum(kind: str, languages: int) -> Tensor:
    """(1, L, 128) rows whose Gram matrix is hard for an eigen-solver: clustered or rank-deficient."""
    generator = torch.Generator().manual_seed(languages)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = normal(1, languages, 128)
    if kind == "orthogonal":  # L nearly equal eigenvalues
        rows = torch.linalg.qr(rows.mT)[0].mT + 1e-3 * rows
    elif kind == "repeated":  # a third of the rank, in no order
        rows = rows[:, torch.randint(0, max(1, languages // 3), (languages,), generator=generator)]
    elif kind == "two lines":
        rows = rows[:, torch.arange(languages) % 2]
    elif kind == "few features":
        rows[:, :, 5:] = 0
    elif kind == "two tight clusters":
        rows = rows[:, torch.arange(languages) % 2] + 1e-4 * rows
    else:
        rows[:, 1:] = rows[:, :1] + 1e-2 * rows[:, 1:]
    return rows


@pytest.mark.parametrize("kind", SPECTRA)
@pytest.mark.parametrize("languages", [3, 10, 16, 31])
def test_hard_spectra(device: str, kind: str, languages: int) -> None:
    rows = spectrum(kind, languages).to(device)
    found = singular_values(rows, backend="triton").cpu()
    unit = (rows / rows.norm(dim=2, keepdim=True)).cpu()
    # A singular value of 0 comes from a float64 eigenvalue of up to 1e-16 L, so it may be as large as 1e-8 sqrt(L).
    torch.testing.assert_close(found, torch.linalg.svdvals(unit), rtol=1e-10, atol=1e-7)
    loss, grad = loss_and_gradient(rows, backend="triton", reduction="none")
    expected_loss, expected = loss_and_gradient(rows, backend="closed_form", reduction="none")
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=1e-7)  # the same bound as for the singular values
    # Both backends compute in float64. Two clusters of width 1e-4 magnify rounding by 1e8, in closed_form itself too.
    assert error(grad, expected) < (1e-6 if kind == "two tight clusters" else 1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["repeated", "two tight clusters"])
def test_hard_spectra_of_the_largest_size(device: str, kind: str) -> None:
    test_hard_spectra(device, kind, 64)


@pytest.mark.parametrize("scale", ["top", "none"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_agrees_with_closed_form_with_masks(
    device: str, scale: Scale, reduction: Reduction, dtype: torch.dtype
) -> None:
    rows, mask = close_rows(5, 7, 33, 1.0).to(dtype).to(device), random_mask(5, 7, seed=4).to(device)
    mask[1] = False
    mask[2, 1:] = False
    rows = torch.where(mask[:, :, None], rows, float("nan"))  # must not be read
    options = {"scale": scale, "reduction": reduction, "temperature": 0.31}
    loss, grad = loss_and_gradient(rows, mask, backend="triton", **options)
    expected_loss, expected = loss_and_gradient(rows, mask, backend="closed_form", **options)
    # One rounding to the dtype of the result, and one of the incoming gradient.
    tolerance = 4 * torch.finfo(dtype).eps if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=0)
    assert error(grad, expected) < tolerance
    assert (grad[~mask] == 0).all()
    without = mlc_loss(rows, mask, backend="triton", **options)  # type: ignore[arg-type]
    assert torch.equal(without, loss)


@pytest.mark.parametrize("tile_of_one", [16, 32, 64])
def test_sums_instead_of_a_matrix_product(device: str, monkeypatch: pytest.MonkeyPatch, tile_of_one: int) -> None:
    """The variant for devices without a float64 matrix product, in every tile."""
    monkeypatch.setattr(launch, "_plans", {})  # plans assume that these do not change
    monkeypatch.setattr(fused, "DOT", False)
    monkeypatch.setattr(fused, "tile_of", lambda languages: tile_of_one)
    rows = close_rows(1, 5, 70, 1e-2).to(device)
    loss, grad = loss_and_gradient(rows, backend="triton")
    expected_loss, expected = loss_and_gradient(rows, backend="closed_form")
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    assert error(grad, expected) < 1e-10  # float64 rounding over the square of 1e-2


@pytest.mark.parametrize(
    ("dtype", "lengths"),
    [
        (torch.float16, [6e-8, 1.0, 6e4]),  # smallest subnormal, and near the largest number
        (torch.bfloat16, [1e-38, 1.0, 1e38]),
        (torch.float32, [1e-38, 1.0, 1e38]),
        (torch.float64, [1e-200, 1.0, 1e200]),  # squares leave the range of float64
        (torch.float64, [5e-324, 1e-310, 1e-300]),  # subnormal
    ],
)
def test_loss_of_extreme_lengths(device: str, dtype: torch.dtype, lengths: list[float]) -> None:
    rows = torch.diag(torch.tensor(lengths, dtype=torch.float64))[None].to(dtype).to(device)
    loss = mlc_loss(rows, backend="triton")
    assert loss.item() == pytest.approx(math.log(3), rel=1e-6)  # three equal singular values, in float32


@pytest.mark.parametrize(
    ("dtype", "lengths"),
    [
        (torch.float16, [1.0, 8.0, 6e4]),
        (torch.bfloat16, [1e-30, 1.0, 1e30]),
        (torch.float32, [1e-30, 1.0, 1e30]),
        (torch.float64, [1e-200, 1.0, 1e200]),
    ],
)
def test_gradients_of_extreme_lengths(device: str, dtype: torch.dtype, lengths: list[float]) -> None:
    """The gradient of a row is the gradient of its direction, divided by the row's length."""
    scales = torch.tensor(lengths, dtype=torch.float64)[None, :, None]
    rows = (close_rows(1, 3, 4, 1.0) / 3 * scales).to(dtype)
    norms = rows.double().abs().amax(2, keepdim=True)
    _, expected = loss_and_gradient(rows.double() / norms, backend="closed_form")
    _, found = loss_and_gradient(rows.to(device), backend="triton")
    # One rounding to the dtype, relative to the largest entry of the row, or one step of float16's subnormals where the
    # entry is smaller: at a length of 6e4, gradients are about 1e-5.
    tolerance = 1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps
    allowed = tolerance * expected.abs().amax(2, keepdim=True)
    if dtype == torch.float16:
        allowed = allowed + 2**-24 * norms
    assert ((found.cpu().double() * norms - expected).abs() <= allowed).all()


@pytest.mark.parametrize("signs", [[1, 1, 1, 1], [1, -1, 1, -1]])
@pytest.mark.parametrize("features", [1, 5, 512])
def test_rows_on_one_line(device: str, signs: list[int], features: int) -> None:
    """All rows equal or opposite: the floor of the loss, and the zero subgradient."""
    rows = close_rows(1, 1, features, 1.0).to(device) * torch.tensor(signs, device=device)[None, :, None]
    loss, grad = loss_and_gradient(rows, backend="triton")
    expected = math.log(1 + 3 * math.exp(-5)) if features > 1 else 0.0
    # A singular value of 0 comes from a float64 eigenvalue of up to 1e-16, so it may be as large as 1e-8.
    assert loss.item() == pytest.approx(expected, abs=1e-8)
    assert float(grad.abs().max()) < 1e-12  # an arbitrary subgradient would be 1e-3 to 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("content", [float("nan"), float("inf"), float("-inf")])
def test_a_row_that_is_not_finite_spoils_its_prompt_only(device: str, dtype: torch.dtype, content: float) -> None:
    rows = close_rows(3, 4, 20, 1.0).to(dtype).to(device)
    expected_loss, expected = loss_and_gradient(rows, backend="triton", reduction="none")
    rows[1, 2, 3] = content
    loss, grad = loss_and_gradient(rows, backend="triton", reduction="none")
    assert loss.isfinite().tolist() == [True, False, True]
    assert loss[1].isnan()
    assert grad[1].isnan().all()
    assert torch.equal(loss[[0, 2]], expected_loss[[0, 2]])
    assert torch.equal(grad[[0, 2]], expected[[0, 2]])
    assert singular_values(rows, backend="triton").isfinite().all(1).tolist() == [True, False, True]


def test_zero_rows_masked_rows_and_prompts_that_do_not_count(device: str) -> None:
    rows = close_rows(5, 4, 6, 1.0).to(device)
    mask = torch.ones(5, 4, dtype=torch.bool, device=device)
    rows[0, 1] = 0  # counts as missing
    rows[1] = 0
    mask[2, 1:] = False  # one row
    mask[3] = False  # no rows, ...
    rows[3] = float("nan")  # ... whatever they hold
    mask[4, 2] = False
    rows[4, 2] = float("inf")
    loss, grad = loss_and_gradient(rows, mask, backend="triton", reduction="none")
    expected_loss, expected = loss_and_gradient(rows, mask, backend="closed_form", reduction="none")
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-14)
    assert loss[1:4].tolist() == [0, 0, 0]
    assert (grad[1:4] == 0).all()
    assert (grad[0, 1] == 0).all()
    mean = mlc_loss(rows, mask, backend="triton")
    torch.testing.assert_close(mean, (loss[0] + loss[4]) / 2)
    values = singular_values(rows, mask, backend="triton")
    torch.testing.assert_close(values, singular_values(rows, mask, backend="closed_form"), rtol=1e-10, atol=1e-14)
    assert values[0, 3] == values[4, 3] == 0


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (0, 0, 4), (2, 1, 4), (2, 1, 1)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_nothing_to_compare(device: str, shape: tuple[int, int, int], reduction: Reduction) -> None:
    rows = torch.ones(shape, requires_grad=True, device=device)
    loss = mlc_loss(rows, reduction=reduction, backend="triton")
    assert loss.shape == (shape[:1] if reduction == "none" else ())
    loss.sum().backward()
    assert rows.grad is not None
    assert loss.abs().sum() == 0
    assert rows.grad.abs().sum() == 0
    assert singular_values(rows, backend="triton").shape == shape[:2]


def test_strided_and_expanded_rows(device: str) -> None:
    wide = close_rows(8, 3, 64, 1.0).to(device)
    transposed = wide.transpose(0, 1)[:, ::2]  # strides, but contiguous rows
    gaps = wide[:, :, 1::3]  # rows with gaps
    shifted = wide[:, :, 1:33]  # rows that do not begin at multiples of 16 elements
    expanded = wide[:1].expand(3, 3, 64)
    for view in (transposed, gaps, shifted, expanded):
        leaf = view.detach().requires_grad_()
        loss = mlc_loss(leaf, backend="triton")
        (grad,) = torch.autograd.grad(loss, leaf)
        expected_loss, expected = loss_and_gradient(view.contiguous(), backend="closed_form")
        torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(grad, expected, rtol=1e-10, atol=1e-14)
    mask = random_mask(3, 8).to(device).T  # a mask with strides
    loss, _ = loss_and_gradient(wide, mask, backend="triton")
    torch.testing.assert_close(loss, mlc_loss(wide, mask, backend="closed_form"), rtol=1e-12, atol=0)


def test_order_of_prompts_and_languages_does_not_matter(device: str) -> None:
    rows, mask = close_rows(4, 6, 9, 1.0).to(device), random_mask(4, 6).to(device)
    prompts, languages = torch.tensor([2, 0, 3, 1]), torch.tensor([5, 3, 0, 1, 4, 2])
    loss, grad = loss_and_gradient(rows, mask, backend="triton", reduction="sum")
    moved_loss, moved = loss_and_gradient(
        rows[prompts][:, languages], mask[prompts][:, languages], backend="triton", reduction="sum"
    )
    torch.testing.assert_close(moved_loss, loss, rtol=1e-12, atol=1e-13)  # float64 rounding
    torch.testing.assert_close(moved, grad[prompts][:, languages], rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_same_input_same_bits(device: str, dtype: torch.dtype) -> None:
    rows = close_rows(3, 10, 123, 1e-1).to(dtype).to(device)
    loss, grad = loss_and_gradient(rows, backend="triton")
    again, grad_again = loss_and_gradient(rows, backend="triton")
    assert torch.equal(loss, again)
    assert torch.equal(grad, grad_again)
    # Nor does a prompt's result depend on the rest of the batch.
    alone, _ = loss_and_gradient(rows[2:3], backend="triton", reduction="none")
    among, _ = loss_and_gradient(rows, backend="triton", reduction="none")
    assert torch.equal(alone[0], among[2])


def test_gradcheck(device: str) -> None:
    rows, mask = close_rows(2, 3, 4, 1.0).to(device).requires_grad_(), random_mask(2, 3, seed=2).to(device)
    # Only scale="none": "top" has a stop-gradient, which finite differences cannot see.
    assert torch.autograd.gradcheck(lambda x: mlc_loss(x, mask, scale="none", backend="triton"), (rows,))
