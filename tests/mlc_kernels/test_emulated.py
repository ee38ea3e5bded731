"""An emulator runs the kernels as compiled for GPUs that are not present, and the results must match the definition.

The interpreter shows that a kernel is correct. The compiler comes between that and a GPU: it fuses products and sums,
lays data out over threads, and sets barriers. Every test asserts that no two warps race for shared memory.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

import ptx
from emulated_gpu import EmulatedGpu

from mlc_kernels import backends, mlc_loss, mlc_loss_from_hidden, singular_values
from mlc_kernels.hidden import Pooling

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"
)

# Errors of rounding the result to its type (for float32 a little more than half of this), and for float64 rows the
# error of an eigenvalue in a sum of this size.
TOLERANCE = {
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,
    torch.float32: torch.finfo(torch.float32).eps,
    torch.float64: 1e-12,
}


def install(gpu: EmulatedGpu, monkeypatch: pytest.MonkeyPatch) -> EmulatedGpu:
    """Make ``backend="triton"`` run on the emulated GPU, with CPU tensors."""
    gpu.install(monkeypatch)
    monkeypatch.setitem(backends._reasons, ("cpu", None), None)
    return gpu


# One GPU per capability for all tests, so that each kernel is compiled once.
made = functools.cache(EmulatedGpu)
Use = Callable[[int], EmulatedGpu]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch, poisoned: None) -> Iterator[Use]:
    """Installs a GPU of a compute capability. In the end, no kernel on it may have had a race."""
    used: list[EmulatedGpu] = []

    def use(capability: int) -> EmulatedGpu:
        used.append(install(made(capability), monkeypatch))
        return used[-1]

    yield use
    for gpu in used:
        assert gpu.launches
        assert gpu.races == set()


def some_rows(prompts: int, languages: int, features: int, dtype: torch.dtype) -> Tensor:
    """(B, L, D) rows: a shared row plus a third of noise."""
    generator = torch.Generator().manual_seed(languages)
    shape = prompts, languages, features
    shared = torch.randn(prompts, 1, features, generator=generator, dtype=torch.float64)
    return (shared + 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


def loss_and_gradient(rows: Tensor, mask: Tensor | None, backend: Any) -> tuple[Tensor, Tensor]:
    """(B,) losses, and the gradient of their sum, weighted by 1, 2, ..., in the dtype of the rows."""
    rows = rows.detach().clone().requires_grad_()
    loss = mlc_loss(rows, mask, reduction="none", backend=backend)
    (grad,) = torch.autograd.grad(loss, rows, torch.arange(1, len(loss) + 1).to(loss.dtype))
    return loss.detach(), grad


def assert_rounded(found: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    """Check closeness relative to the largest entry, because small entries of a gradient are differences of large
    numbers."""
    scale = float(truth.abs().max())
    assert scale > 1e-4
    torch.testing.assert_close(found.double(), truth, rtol=0.0, atol=TOLERANCE[dtype] * scale)


F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


@pytest.mark.parametrize(
    ("capability", "languages", "features", "dtype"),
    [
        (90, 2, 5, F32),
        (90, 3, 130, BF16),  # more than one block of features, of which the last is not full
        (90, 10, 64, BF16),  # all strides are multiples of 16, which gives wide loads
        (90, 16, 24, F64),
        pytest.param(90, 17, 40, F32, marks=pytest.mark.slow),
        pytest.param(90, 33, 72, BF16, marks=pytest.mark.slow),
        # Fewer features than languages, and fewer than any block in the kernel; few sweeps.
        pytest.param(90, 64, 3, F32, marks=pytest.mark.slow),
        pytest.param(80, 10, 130, F32, marks=pytest.mark.slow),
        pytest.param(80, 17, 16, BF16, marks=pytest.mark.slow),
        pytest.param(80, 33, 4, F64, marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradient(use: Use, capability: int, languages: int, features: int, dtype: torch.dtype) -> None:
    gpu = use(capability)
    rows = some_rows(1 if languages > 16 else 2, languages, features, dtype)
    loss, grad = loss_and_gradient(rows, None, "triton")
    assert gpu.launches == ["prompt_forward", "prompt_backward"]
    true_loss, true_grad = loss_and_gradient(rows.double(), None, "reference")
    assert_rounded(loss, true_loss, loss.dtype)
    assert_rounded(grad, true_grad, dtype)


PARTS = ["gram_parts", "prompt_forward", "prompt_backward"]


@pytest.mark.parametrize(
    ("capability", "languages", "features", "parts", "one_warp", "dtype"),
    [
        (90, 10, 144, 2, True, BF16),  # a full block and a part of one; wide loads
        (80, 3, 130, 3, True, F32),  # the last part is empty
        pytest.param(90, 16, 140, 2, True, F64, marks=pytest.mark.slow),
        pytest.param(80, 10, 130, 2, False, BF16, marks=pytest.mark.slow),
        (90, 3, 130, 1, True, F32),
        pytest.param(80, 10, 24, 1, True, F64, marks=pytest.mark.slow),
        pytest.param(90, 17, 72, 2, False, F32, marks=pytest.mark.slow),
        pytest.param(80, 32, 72, 2, False, BF16, marks=pytest.mark.slow),
    ],
)
def test_split(
    use: Use,
    monkeypatch: pytest.MonkeyPatch,
    capability: int,
    languages: int,
    features: int,
    parts: int,
    one_warp: bool,
    dtype: torch.dtype,
) -> None:
    """Parts of the Gram matrix, and one warp. The second prompt has a missing row."""
    from mlc_kernels import fused, split

    every = range(1, features + 1)
    chosen = split.Split(fused.tile_of(languages), every, every, parts, one_warp)
    monkeypatch.setattr(split, "SPLITS", (chosen,))
    gpu = use(capability)
    rows = some_rows(1 if languages > 16 else 2, languages, features, dtype)
    mask = torch.ones(rows.shape[:2], dtype=torch.bool)
    mask[-1, 1] = False
    rows[~mask] = float("nan")  # must not be read
    loss, grad = loss_and_gradient(rows, mask, "triton")
    assert gpu.launches == PARTS[parts == 1 :]
    true_loss, true_grad = loss_and_gradient(rows.double(), mask, "reference")
    assert_rounded(loss, true_loss, loss.dtype)
    assert_rounded(grad, true_grad, dtype)


@pytest.mark.parametrize(("capability", "languages"), [(90, 10), (80, 3)])
def test_missing_rows_and_nan(use: Use, capability: int, languages: int) -> None:
    """Prompts with all rows, with some rows, with NaN in one row, and with too few rows to count."""
    use(capability)
    rows = some_rows(4, languages, 19, torch.float32)
    mask = torch.ones(rows.shape[:2], dtype=torch.bool)
    mask[1, 1] = mask[2, 0] = False
    mask[3, 1:] = False
    rows[~mask] = float("nan")  # must not be read
    rows[2, 1, 7] = float("nan")
    loss, grad = loss_and_gradient(rows, mask, "triton")
    assert loss.isnan().tolist() == [False, False, True, False]
    assert loss[3] == 0
    assert grad[2][mask[2]].isnan().all()
    assert (grad[~mask] == 0).all()
    assert (grad[3] == 0).all()
    true_loss, true_grad = loss_and_gradient(rows.double(), mask, "reference")
    assert_rounded(loss[:2], true_loss[:2], torch.float32)
    assert_rounded(grad[:2], true_grad[:2], torch.float32)


@pytest.mark.parametrize(("languages", "features"), [(10, 6), (3, 16)])
def test_singular_values(use: Use, languages: int, features: int) -> None:
    use(90)
    rows = some_rows(2, languages, features, torch.float32)
    mask = torch.ones(rows.shape[:2], dtype=torch.bool)
    mask[1, 0] = False
    found = singular_values(rows, mask, backend="triton")
    assert_rounded(found, singular_values(rows.double(), mask, backend="reference"), torch.float32)


def token_states(packed: bool, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """States of 7 rows of up to 5 tokens, one without tokens, in more features than one program has; their layout."""
    generator = torch.Generator().manual_seed(4)
    lengths = torch.tensor([5, 1, 3, 0, 2, 4, 5])
    features = 264
    if packed:
        offsets = torch.cat([torch.tensor([1]), 1 + lengths.cumsum(0)])
        hidden = torch.randn(23, features, generator=generator)
        return hidden.to(dtype), {"offsets": offsets}
    hidden = torch.randn(7, 5, features, generator=generator)
    real = torch.arange(5) < lengths[:, None]
    hidden[~real] = float("nan")  # must not be read
    return hidden.to(dtype), {"attention_mask": real}


# Launches: if a row is a token's state, the kernel reads it directly.
LOOKED_UP = ["find_rows", "prompt_forward", "sum_losses", "prompt_backward"]
POOLED = ["find_rows", "pool_rows", "prompt_forward", "sum_losses", "prompt_backward", "spread_rows"]


@pytest.mark.parametrize(
    ("capability", "packed", "pooling", "extractor", "dtype", "kernels"),
    [
        (90, False, "last", False, F32, LOOKED_UP),
        (90, True, "last", False, BF16, LOOKED_UP),
        pytest.param(90, True, "mean", False, F32, POOLED, marks=pytest.mark.slow),
        (90, False, "mean", False, BF16, POOLED),
        (90, False, "last", True, BF16, POOLED),
        pytest.param(80, False, "mean", False, BF16, POOLED, marks=pytest.mark.slow),
        (80, True, "last", True, F32, POOLED),
    ],
)
def test_from_token_states(
    use: Use,
    capability: int,
    packed: bool,
    pooling: Pooling,
    extractor: bool,
    dtype: torch.dtype,
    kernels: list[str],
) -> None:
    gpu = use(capability)
    hidden, spans = token_states(packed, dtype)
    group, language = torch.tensor([1, 0, 1, 0, 0, 1, 7]), torch.tensor([0, 2, 1, 1, 0, 2, 0])
    weight = torch.randn(6, hidden.shape[-1], generator=torch.Generator().manual_seed(5))

    def run(hidden: Tensor, weight: Tensor, backend: Any) -> tuple[Tensor, Tensor]:
        hidden = hidden.detach().clone().requires_grad_()
        loss = mlc_loss_from_hidden(
            hidden,
            group,
            language,
            2,
            3,
            pooling=pooling,
            weight=weight if extractor else None,
            reduction="sum",
            backend=backend,
            **spans,
        )
        (grad,) = torch.autograd.grad(loss, hidden)
        return loss.detach(), grad

    loss, grad = run(hidden, weight, "triton")
    assert gpu.launches == kernels
    true_loss, true_grad = run(hidden.double(), weight.double(), "reference")
    # Between pooling and loss, rows are rounded to float32, and the extractor computes in float32: a few roundings
    # each, and there sums over 264 features.
    few = 16 if extractor else 4
    torch.testing.assert_close(loss.double(), true_loss, rtol=few * TOLERANCE[torch.float32], atol=0.0)
    scale = float(true_grad.abs().max())
    assert scale > 1e-4
    atol = (few * TOLERANCE[torch.float32] + (TOLERANCE[dtype] if dtype == BF16 else 0.0)) * scale
    torch.testing.assert_close(grad.double(), true_grad, rtol=0.0, atol=atol)


def test_ids_to_rows_exactly(use: Use) -> None:
    """More languages and rows than one step of the loops handles."""
    from mlc_kernels import fused_pooling, pooling

    use(90)
    generator = torch.Generator().manual_seed(0)
    group = torch.randint(-1, 3, (150,), generator=generator)
    language = torch.randint(-1, 35, (150,), generator=generator)
    hidden = torch.zeros(150, 40, 1)
    real = torch.rand(150, 40, generator=generator) > 0.9
    for of_tokens in (True, False):
        arguments = (hidden, real, None, group, language, 2, 34, of_tokens)
        assert torch.equal(fused_pooling.table(*arguments), pooling.table(*arguments))


@pytest.mark.parametrize(("prompts", "dtype"), [(1, F32), (3, BF16)])
def test_a_launch_by_a_plan_gives_the_same_bits(
    use: Use, monkeypatch: pytest.MonkeyPatch, prompts: int, dtype: torch.dtype
) -> None:
    from mlc_kernels import launch

    gpu = use(90)
    rows = some_rows(prompts, 3, 16, dtype)
    mask = torch.ones(prompts, 3, dtype=torch.bool)
    mask[-1, 1] = False

    def run() -> tuple[Tensor, Tensor]:
        leaf = rows.clone().requires_grad_()
        loss = mlc_loss(leaf, mask, backend="triton")
        return loss.detach(), torch.autograd.grad(loss * 3, leaf)[0]

    launch.forget()
    first = run()
    by_triton = list(gpu.launches)

    def refuse(*_: object) -> None:
        raise AssertionError("launched by Triton")

    with monkeypatch.context() as patched:
        patched.setattr(launch, "_launch_by_triton", refuse)
        again = run()
    assert gpu.launches == by_triton * 2
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_barriers_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counterpart of "no races": without its barriers, a kernel has races."""
    whole = ptx.Program

    def without_barriers(text: str, shared: int) -> ptx.Program:
        assert "bar.sync" in text
        return whole(text.replace("bar.sync", "// bar.sync"), shared)

    monkeypatch.setattr(ptx, "Program", without_barriers)
    gpu = install(EmulatedGpu(90), monkeypatch)
    mlc_loss(some_rows(1, 3, 5, torch.float32), backend="triton")
    assert gpu.launches == ["prompt_forward"]
    assert any(race.startswith("read after another warp's write") for race in gpu.races)
    assert any(race.startswith("write after another warp's read") for race in gpu.races)
