"""The kernel within autograd, autocast, checkpointing, torch.compile and CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mlc_kernels import fused, fused_pooling, launch, mlc_loss, mlc_loss_from_hidden, singular_values


def random_rows(*shape: int, device: str, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).to(device).requires_grad_()


def kernel_loss(rows: Tensor, mask: Tensor | None = None) -> Tensor:
    return mlc_loss(rows, mask, backend="triton")


def gradient(rows: Tensor, mask: Tensor | None = None, loss: Callable[..., Tensor] = kernel_loss) -> Tensor:
    (found,) = torch.autograd.grad(loss(rows, mask), rows)
    return found


def test_gradient_is_scaled_by_the_incoming_one_and_can_be_asked_for_twice(device: str) -> None:
    rows = random_rows(3, 4, 5, device=device)
    losses = mlc_loss(rows, reduction="none", backend="triton")
    weights = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64, device=device)
    ones = torch.ones_like(losses)
    (once,) = torch.autograd.grad(losses, rows, ones, retain_graph=True)
    (weighted,) = torch.autograd.grad(losses, rows, weights, retain_graph=True)
    (again,) = torch.autograd.grad(losses, rows, ones)
    torch.testing.assert_close(weighted, once * weights[:, None, None], rtol=1e-12, atol=1e-15)
    assert torch.equal(once, again)
    # For a mean too, and with an incoming gradient that is a view with zero strides.
    mean = mlc_loss(rows, backend="triton")
    (third,) = torch.autograd.grad(mean * -3.0, rows)
    torch.testing.assert_close(third, once * -1.0, rtol=1e-12, atol=1e-15)


def test_one_input_twice(device: str) -> None:
    rows = random_rows(2, 4, 5, device=device)
    both = mlc_loss(rows, backend="triton") + mlc_loss(rows, temperature=0.5, backend="triton")
    (found,) = torch.autograd.grad(both, rows)
    expected = gradient(rows, loss=lambda x, _: mlc_loss(x, backend="triton"))
    expected = expected + gradient(rows, loss=lambda x, _: mlc_loss(x, temperature=0.5, backend="triton"))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


def test_no_input_is_written_to_and_the_result_may_be(device: str) -> None:
    rows = random_rows(2, 4, 5, device=device)
    mask = torch.tensor([[True, True, False, True]] * 2, device=device)
    copies = rows.detach().clone(), mask.clone()
    for reduction in ("none", "sum", "mean"):
        loss = mlc_loss(rows, mask, reduction=reduction, backend="triton")  # type: ignore[arg-type]
        loss /= 2  # as users do to accumulate gradients
        loss.sum().backward()
    assert torch.equal(rows.detach(), copies[0])
    assert torch.equal(mask, copies[1])


def test_double_backward_is_refused(device: str) -> None:
    rows = random_rows(1, 3, 4, device=device)
    with pytest.raises(RuntimeError, match="double backward is not implemented; use backend='reference'"):
        torch.autograd.grad(kernel_loss(rows), rows, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_changes_nothing(device: str, dtype: torch.dtype) -> None:
    rows = random_rows(2, 5, 16, device=device, dtype=dtype)
    with torch.autocast(device, dtype=torch.bfloat16):
        mixed = kernel_loss(rows)
        values = singular_values(rows, backend="triton")
    assert mixed.dtype == torch.float32
    assert torch.equal(mixed, kernel_loss(rows))
    assert torch.equal(values, singular_values(rows, backend="triton"))
    assert torch.equal(torch.autograd.grad(mixed, rows)[0], gradient(rows))


def test_checkpointing(device: str) -> None:
    rows = random_rows(2, 4, 5, device=device)
    loss = checkpoint(lambda x: kernel_loss(x * 2), rows, use_reentrant=False)
    (found,) = torch.autograd.grad(loss, rows)
    torch.testing.assert_close(found, gradient(rows * 2) * 2, rtol=1e-12, atol=1e-15)


def test_without_gradient_nothing_is_kept(device: str) -> None:
    rows = random_rows(2, 4, 5, device=device)
    with torch.no_grad():
        assert not kernel_loss(rows).requires_grad
    _, saved = fused.prompt_losses(rows.detach(), None, None, 0.2, True, False)
    assert saved.numel() == 0


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
def test_compiles_into_one_graph(device: str, masked: bool, dynamic: bool) -> None:
    compiled = torch.compile(kernel_loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for shape in [(2, 4, 8), (3, 5, 8)] if dynamic else [(2, 4, 8)]:
        rows = random_rows(*shape, device=device)
        mask = torch.arange(shape[1], device=device).expand(shape[:2]) < 3 if masked else None
        assert torch.equal(compiled(rows, mask), kernel_loss(rows, mask))
        assert torch.equal(gradient(rows, mask, compiled), gradient(rows, mask))


def test_compiles_with_pooling(device: str) -> None:
    hidden = random_rows(4, 3, 8, device=device)
    ids = torch.arange(4, device=device) // 2, torch.arange(4, device=device) % 2
    weight = random_rows(5, 8, device=device)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        direct = mlc_loss_from_hidden(hidden, *ids, 2, 2, backend="triton")
        return direct + mlc_loss_from_hidden(hidden, *ids, 2, 2, pooling="mean", weight=weight, backend="triton")

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(hidden, weight), (hidden, weight))
    for one, other in zip(found, torch.autograd.grad(loss(hidden, weight), (hidden, weight)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-15)


def test_operators_are_registered_soundly(device: str) -> None:
    """Schema, fake tensors and dispatch: torch.library.opcheck raises if one is wrong."""
    rows = random_rows(3, 4, 6, device=device).detach()
    mask = torch.ones(3, 4, dtype=torch.bool, device=device)
    table = torch.tensor([[0, 3, -1], [5, 1, 2]], device=device)
    flat = rows.reshape(12, 6)
    for given in ((rows, mask, None), (rows, None, None), (flat, None, table)):
        for with_gradient in (True, False):
            torch.library.opcheck(fused.prompt_losses, (*given, 0.2, True, with_gradient))
    for values, where in ((rows, None), (flat, table)):
        losses, saved = fused.prompt_losses(values, None, where, 0.2, True, True)
        torch.library.opcheck(fused.prompt_gradient, (values, where, saved, losses[0].clone(), None))
    torch.library.opcheck(fused.prompt_values, (rows, mask))
    for mean in (True, False):
        torch.library.opcheck(fused.sum_losses, (torch.ones(2, 3, device=device), mean))
    ids = torch.arange(3, device=device)
    offsets = torch.tensor([0, 2, 3, 7], device=device)
    torch.library.opcheck(fused_pooling.find_rows, (ids, ids, mask, None, 4, 3, 3, True))
    for hidden, real, bounds in ((rows, mask, None), (flat, None, offsets)):
        for mean in (True, False):
            torch.library.opcheck(fused_pooling.pool_rows, (hidden, real, bounds, mean))
            pooled, count = fused_pooling.pool_rows(hidden, real, bounds, mean)
            shape = list(hidden.shape)
            torch.library.opcheck(fused_pooling.spread_rows, (pooled, real, bounds, count, shape, torch.float32, mean))


@pytest.mark.parametrize("prompts", [0, 1, 3, fused.SUMMED, 3 * fused.SUMMED + 1])
def test_sums_are_float64(device: str, prompts: int) -> None:
    """A float32 sum of such losses would be off by its rounding."""
    generator = torch.Generator().manual_seed(prompts)
    losses = torch.rand(2, prompts, generator=generator)
    losses[1] = (losses[1] > 0.3).float()
    total, count = losses.double().sum(1)
    for mean in (True, False):
        found, counted = fused.sum_losses(losses.to(device), mean)
        assert counted.item() == max(count.item(), 1)
        expected = total / counted.cpu() if mean else total
        # One rounding to float32; sums in float64 may differ in their last bit.
        torch.testing.assert_close(found.cpu().double(), expected, rtol=6e-8, atol=0)
        assert torch.equal(found, fused.sum_losses(losses.to(device), mean)[0])


def test_the_interpreter_has_no_plans_and_a_gpu_has(device: str) -> None:
    launch.forget()
    gradient(random_rows(2, 3, 4, device=device))
    assert len(launch._plans) == (0 if device == "cpu" else 3)


def by_triton_and_by_plan(run: Callable[[], tuple[Tensor, ...]]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Results of the first run, which makes plans, and of a second one, in which a launch by Triton raises."""
    launch.forget()
    first = run()
    assert launch._plans

    def refuse(*_: object) -> None:
        raise AssertionError("launched by Triton")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(launch, "_launch_by_triton", refuse)
        return first, run()


def assert_same_bits(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> None:
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("prompts", [1, 9])
def test_a_plan_gives_the_same_bits(device: str, dtype: torch.dtype, reduction: Any, prompts: int) -> None:
    rows = random_rows(prompts, 10, 72, device=device, dtype=dtype)
    mask = torch.ones(prompts, 10, dtype=torch.bool, device=device)
    mask[-1, 4] = False

    def run() -> tuple[Tensor, ...]:
        loss = mlc_loss(rows, mask, reduction=reduction, backend="triton")
        (grad,) = torch.autograd.grad(loss, rows, torch.ones_like(loss))
        return loss.detach(), grad, singular_values(rows, mask, backend="triton")

    assert_same_bits(*by_triton_and_by_plan(run))


@pytest.mark.gpu
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_plan_of_pooling_gives_the_same_bits(device: str, pooling: Any) -> None:
    hidden = random_rows(6, 5, 72, device=device, dtype=torch.float32)
    ids = torch.arange(6, device=device) // 3, torch.arange(6, device=device) % 3

    def run() -> tuple[Tensor, ...]:
        loss = mlc_loss_from_hidden(hidden, *ids, 2, 3, pooling=pooling, backend="triton")
        return loss.detach(), *torch.autograd.grad(loss, hidden)

    assert_same_bits(*by_triton_and_by_plan(run))


@pytest.mark.gpu
def test_a_plan_launches_in_the_current_stream(device: str) -> None:
    """In a side stream, after rows that are still being written there."""
    rows, later = (random_rows(3, 10, 64, device=device, dtype=torch.float32).detach() for _ in range(2))
    later = later.flip(2).contiguous()
    expected = kernel_loss(later)
    kernel_loss(rows)  # plans
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # type: ignore[no-untyped-call]
        torch.cuda._sleep(100_000_000)
        rows.copy_(later)
        found = kernel_loss(rows)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("threaded", [True, False])
def test_plans_of_threads(device: str, threaded: bool) -> None:
    """With autograd's thread for the device, and on the thread of the caller."""
    rows = random_rows(3, 10, 64, device=device, dtype=torch.float32)
    expected = gradient(rows)
    with torch.autograd.set_multithreading_enabled(threaded):
        assert torch.equal(gradient(rows), expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second device")
def test_plans_of_two_devices() -> None:
    here, there = (random_rows(3, 10, 64, device=device, dtype=torch.float32) for device in ("cuda:0", "cuda:1"))

    def run() -> tuple[Tensor, ...]:
        return tuple(found for rows in (here, there, here) for found in (kernel_loss(rows).detach(), gradient(rows)))

    first, again = by_triton_and_by_plan(run)
    assert_same_bits(first, again)
    assert_same_bits(tuple(x.cpu() for x in first[:2]), tuple(x.cpu() for x in first[2:4]))


@pytest.mark.gpu
def test_plans_within_torch_compile(device: str) -> None:
    rows = random_rows(3, 10, 64, device=device, dtype=torch.float32)
    compiled = torch.compile(kernel_loss, fullgraph=True)

    def run() -> tuple[Tensor, ...]:
        loss = compiled(rows)
        return loss.detach(), *torch.autograd.grad(loss, rows)

    assert_same_bits(*by_triton_and_by_plan(run))
    assert_same_bits(run(), (kernel_loss(rows).detach(), gradient(rows)))


@pytest.mark.gpu
@pytest.mark.parametrize("prompts", [1, 3])
def test_cuda_graph_of_plans(device: str, prompts: int) -> None:
    rows = random_rows(prompts, 10, 64, device=device, dtype=torch.float32)
    launch.forget()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # type: ignore[no-untyped-call]
        gradient(rows)  # plans
    torch.cuda.current_stream().wait_stream(stream)
    plans = dict(launch._plans)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = kernel_loss(rows)
        (grad,) = torch.autograd.grad(loss, rows)
    assert launch._plans == plans  # all launches of the capture were by plan
    with torch.no_grad():
        rows.copy_(rows.flip(2))
    graph.replay()
    launch.forget()
    assert torch.equal(loss, kernel_loss(rows))
    assert torch.equal(grad, gradient(rows))


@pytest.mark.gpu
def test_cuda_graph(device: str) -> None:
    rows = random_rows(3, 10, 64, device=device, dtype=torch.float32)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # type: ignore[no-untyped-call]
        gradient(rows)  # compile
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = kernel_loss(rows)
        (grad,) = torch.autograd.grad(loss, rows)
    with torch.no_grad():
        rows.copy_(random_rows(3, 10, 64, device=device, dtype=torch.float32).flip(2))
    graph.replay()
    assert torch.equal(loss, kernel_loss(rows))
    assert torch.equal(grad, gradient(rows))


@pytest.mark.gpu
def test_never_waits_for_the_device(device: str) -> None:
    rows = random_rows(3, 10, 64, device=device, dtype=torch.float32)
    mask = torch.ones(3, 10, dtype=torch.bool, device=device)
    ids = torch.zeros(3, dtype=torch.int64, device=device)
    gradient(rows, mask)  # compile
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradient(rows, mask)
        singular_values(rows, backend="triton")
        mlc_loss_from_hidden(rows, ids, ids, 1, 1, pooling="mean", backend="triton").backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second device")
def test_runs_where_the_tensor_is() -> None:
    rows = random_rows(3, 10, 64, device="cuda:1")
    assert kernel_loss(rows).device == rows.device
    torch.testing.assert_close(gradient(rows).cpu(), gradient(rows.detach().to("cuda:0").requires_grad_()).cpu())


@pytest.mark.gpu
def test_auto_takes_the_kernel(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(fused, "loss", lambda *arguments: seen.append(arguments))
    mlc_loss(random_rows(3, 10, 64, device=device))
    assert len(seen) == 1


@pytest.mark.gpu
def test_one_variant_for_all_batches_lengths_and_numbers_of_languages(device: str) -> None:
    from mlc_kernels import loss_kernels

    def variants() -> int:
        return sum(len(cache[0]) for cache in loss_kernels.prompt_forward.device_caches.values())

    kernel_loss(random_rows(2, 3, 64, device=device, dtype=torch.float32))
    before = variants()
    for shape in [(1, 3, 64), (16, 3, 64), (2, 16, 64), (2, 1, 16), (7, 10, 4096)]:
        kernel_loss(random_rows(*shape, device=device, dtype=torch.float32))
    assert variants() == before
