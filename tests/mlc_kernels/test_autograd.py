"""The loss within autograd, autocast and torch.compile, and on a device without values."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from mlc_kernels import closed_form, mlc_loss, reference, singular_values
from mlc_kernels.functional import Backend

BACKENDS: list[Backend] = ["closed_form", "reference"]


def random_rows(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()


def random_mask(batch: int, languages: int) -> Tensor:
    return torch.rand(batch, languages, generator=torch.Generator().manual_seed(0)) > 0.3


def gradient(
    rows: Tensor,
    mask: Tensor | None = None,
    loss: Callable[..., Tensor] = mlc_loss,
    **options: object,
) -> Tensor:
    (found,) = torch.autograd.grad(loss(rows, mask, **options), rows)
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_is_scaled_by_the_incoming_one_and_can_be_asked_for_twice(backend: Backend) -> None:
    rows = random_rows(3, 4, 5)
    losses = mlc_loss(rows, reduction="none", backend=backend)
    weights = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    (once,) = torch.autograd.grad(losses, rows, torch.ones_like(losses), retain_graph=True)
    (weighted,) = torch.autograd.grad(losses, rows, weights, retain_graph=True)
    (again,) = torch.autograd.grad(losses, rows, torch.ones_like(losses))
    expected = once * weights[:, None, None]
    torch.testing.assert_close(weighted, expected, rtol=1e-12, atol=1e-15)  # float64 rounding
    assert torch.equal(once, again)


@pytest.mark.parametrize("backend", BACKENDS)
def test_micro_batches_add_up(backend: Backend) -> None:
    rows, mask = random_rows(6, 4, 5), random_mask(6, 4)
    parts = [gradient(rows, part, reduction="sum", backend=backend) for part in _halves(mask)]
    whole = gradient(rows, mask, reduction="sum", backend=backend)
    torch.testing.assert_close(parts[0] + parts[1], whole, rtol=1e-12, atol=1e-15)  # float64 rounding


def _halves(mask: Tensor) -> tuple[Tensor, Tensor]:
    first = torch.arange(len(mask))[:, None] < len(mask) // 2
    return mask & first, mask & ~first


def test_double_backward_is_refused_by_the_closed_form() -> None:
    rows = random_rows(1, 3, 4)
    with pytest.raises(RuntimeError, match="double backward is not implemented; use backend='reference'"):
        torch.autograd.grad(mlc_loss(rows, backend="closed_form"), rows, create_graph=True)


def test_double_backward_of_the_reference() -> None:
    """The message above promises this. scale="none", because finite differences cannot see a stop-gradient."""
    assert torch.autograd.gradgradcheck(
        lambda rows: mlc_loss(rows, scale="none", backend="reference"), (random_rows(1, 3, 5),)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_value_without_gradient_is_the_same(backend: Backend, reduction: str) -> None:
    rows, mask = random_rows(3, 4, 5, dtype=torch.float32), random_mask(3, 4)
    with_gradient = mlc_loss(rows, mask, reduction=reduction, backend=backend)  # type: ignore[arg-type]
    assert with_gradient.requires_grad
    with torch.no_grad():
        without = mlc_loss(rows, mask, reduction=reduction, backend=backend)  # type: ignore[arg-type]
    detached = mlc_loss(rows.detach(), mask, reduction=reduction, backend=backend)  # type: ignore[arg-type]
    assert not without.requires_grad
    assert not detached.requires_grad
    assert torch.equal(without, with_gradient)
    assert torch.equal(detached, with_gradient)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(backend: Backend, dtype: torch.dtype) -> None:
    rows = random_rows(2, 5, 16, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = mlc_loss(rows, backend=backend)
        values = singular_values(rows, backend=backend)
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, mlc_loss(rows, backend=backend))
    assert torch.equal(values, singular_values(rows, backend=backend))
    (grad,) = torch.autograd.grad(mixed, rows)  # outside of autocast, as PyTorch demands
    assert torch.equal(grad, gradient(rows, backend=backend))


@pytest.mark.parametrize("module", [closed_form, reference])
@pytest.mark.parametrize("name", ["prompt_losses", "values"])
def test_backends_run_without_autocast(
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    name: str,
) -> None:
    """Values cannot show this on a CPU, because autocast does not affect any operation that the backends use today."""
    seen = []
    original = getattr(module, name)

    def spy(*arguments: object) -> object:
        seen.append(torch.is_autocast_enabled("cpu"))
        return original(*arguments)

    monkeypatch.setattr(module, name, spy)
    operator: Callable[..., Tensor] = mlc_loss if name == "prompt_losses" else singular_values
    with torch.autocast("cpu", dtype=torch.bfloat16):
        operator(random_rows(2, 3, 4), backend=module.__name__.split(".")[-1])
    assert seen == [False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_never_waits_for_the_device(backend: Backend) -> None:
    """The meta device has no values, so anything that reads a value on the host fails.

    This does not show that ``eigh`` and ``svdvals`` themselves read their error code on a GPU.
    """
    rows = torch.empty(3, 4, 5, device="meta", requires_grad=True)
    mask = torch.empty(3, 4, device="meta", dtype=torch.bool)
    for given in (mask, None):
        assert gradient(rows, given, backend=backend).shape == rows.shape
        assert singular_values(rows, given, backend=backend).shape == (3, 4)


@pytest.mark.parametrize("masked", [True, False])
def test_compiles_into_one_graph(masked: bool) -> None:
    rows, mask = random_rows(2, 4, 8), random_mask(2, 4) if masked else None
    compiled = torch.compile(mlc_loss, fullgraph=True, backend="aot_eager")
    # The same PyTorch kernels in the same order, except for a contraction or two: float64 rounding.
    torch.testing.assert_close(compiled(rows, mask), mlc_loss(rows, mask), rtol=1e-12, atol=1e-14)
    found = gradient(rows, mask, compiled)
    torch.testing.assert_close(found, gradient(rows, mask), rtol=1e-10, atol=1e-14)


def test_compiles_under_autocast() -> None:
    rows = random_rows(2, 4, 8, dtype=torch.float32)
    compiled = torch.compile(mlc_loss, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = compiled(rows)
    assert loss.dtype == torch.float32
    # bfloat16 in any place would cost 1e-3.
    torch.testing.assert_close(torch.autograd.grad(loss, rows)[0], gradient(rows), rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_compiles_for_shapes_and_temperatures_that_change() -> None:
    compiled = torch.compile(mlc_loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape, temperature in [((2, 4, 8), 0.2), ((3, 5, 8), 0.3), ((4, 7, 4), 0.5)]:
        rows, mask = random_rows(*shape), random_mask(*shape[:2])
        found = gradient(rows, mask, compiled, temperature=temperature)
        expected = gradient(rows, mask, temperature=temperature)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.slow
def test_compiles_with_inductor() -> None:
    rows, mask = random_rows(2, 4, 8), random_mask(2, 4)
    compiled = torch.compile(mlc_loss, fullgraph=True)
    # Inductor orders sums differently: float64 rounding.
    torch.testing.assert_close(compiled(rows, mask), mlc_loss(rows, mask), rtol=1e-12, atol=1e-14)
    found = gradient(rows, mask, compiled)
    torch.testing.assert_close(found, gradient(rows, mask), rtol=1e-10, atol=1e-14)
