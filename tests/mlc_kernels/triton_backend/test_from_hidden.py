"""Pooling in the kernels against pooling in plain PyTorch, which test_hidden.py compares with arithmetic by hand."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from mlc_kernels import mlc_loss_from_hidden
from mlc_kernels.hidden import Pooling

pytestmark = pytest.mark.usefixtures("poisoned")

ROWS, TOKENS, WIDTH, PROMPTS, LANGUAGES = 13, 9, 20, 4, 4


def states(layout: str, dtype: torch.dtype, device: str) -> tuple[Tensor, dict[str, Any]]:
    """Token states, and the arguments that separate rows from padding. Some rows have no tokens."""
    generator = torch.Generator().manual_seed(1)
    if layout.startswith("packed"):
        lengths = torch.tensor([3, 0, 5, 3, 8, 2, 3, 5, 3, 3, 4, 1, 4])
        # The tokens before the first row and after the last one belong to no row.
        offsets = torch.cat([torch.tensor([2]), 2 + lengths.cumsum(0)])
        hidden = torch.randn(50, WIDTH, generator=generator, dtype=torch.float64)
        kind = torch.int32 if layout == "packed int32" else torch.int64
        return hidden.to(dtype).to(device), {"offsets": offsets.to(kind).to(device)}
    hidden = torch.randn(ROWS, TOKENS, WIDTH, generator=generator, dtype=torch.float64)
    if layout == "all tokens":
        return hidden.to(dtype).to(device), {}
    position = torch.arange(TOKENS)
    length = torch.tensor([9, 1, 5, 0, 3, 2, 7, 4, 4, 8, 6, 9, 1])[:, None]
    real = {
        "padded right": position < length,
        "padded left": position >= TOKENS - length,
        "holes": torch.rand(ROWS, TOKENS, generator=generator) > 0.5,
    }[layout]
    hidden[~real] = float("nan")  # padding must not be read
    mask = real if layout == "holes" else real.long()
    return hidden.to(dtype).to(device), {"attention_mask": mask.to(device)}


def ids(device: str) -> tuple[Tensor, Tensor]:
    """Ids in no order: some out of range, some missing and some twice."""
    generator = torch.Generator().manual_seed(2)
    return tuple(  # type: ignore[return-value]
        torch.randint(-1, bound + 1, (ROWS,), generator=generator).to(device) for bound in (PROMPTS, LANGUAGES)
    )


LAYOUTS = ["padded right", "padded left", "holes", "all tokens", "packed", "packed int32"]


@pytest.mark.parametrize("extractor", [False, True])
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_agrees_with_plain_pytorch(
    device: str, dtype: torch.dtype, layout: str, pooling: Pooling, extractor: bool
) -> None:
    hidden, spans = states(layout, dtype, device)
    generator = torch.Generator().manual_seed(3)
    leaves = [hidden]
    if extractor:
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        weight = torch.randn(7, WIDTH, generator=generator, dtype=torch.float64)
        bias = torch.randn(7, generator=generator, dtype=torch.float64)
        leaves += [weight.to(kind).to(device), bias.to(kind).to(device)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    results = []
    for backend in ("triton", "closed_form"):
        loss = mlc_loss_from_hidden(
            leaves[0],
            *ids(device),
            PROMPTS,
            LANGUAGES,
            pooling=pooling,
            weight=leaves[1] if extractor else None,
            bias=leaves[2] if extractor else None,
            backend=backend,  # type: ignore[arg-type]
            **spans,
        )
        results.append((loss.detach(), *torch.autograd.grad(loss * 3, leaves)))
    (loss, *grads), (expected_loss, *expected) = results
    assert loss.dtype == expected_loss.dtype
    assert expected_loss > 0
    # Both sum in float64 and round at the same places: to float32 (pooled rows, results), where a tie may go either
    # way, and to the dtype of the gradient, where the interpreter truncates to bfloat16.
    tolerance = 1e-11 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=0)
    for found, wanted in zip(grads, expected, strict=True):
        step = torch.finfo(found.dtype).eps if found.dtype == torch.bfloat16 else 0.0
        scale = float(wanted.double().abs().max())
        assert scale > 0
        torch.testing.assert_close(found.double(), wanted.double(), rtol=step, atol=tolerance * scale)
        assert found.isfinite().all()


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_nobody_to_pool(device: str, pooling: Pooling) -> None:
    nobody = torch.zeros(0, dtype=torch.int64, device=device)
    for shape, spans in (
        ((0, 5, 4), {}),
        ((0, 0, 4), {}),
        ((0, 4), {"offsets": torch.zeros(1, dtype=torch.int64, device=device)}),
        ((6, 4), {"offsets": torch.zeros(1, dtype=torch.int64, device=device)}),
    ):
        hidden = torch.ones(shape, device=device, requires_grad=True)
        loss = mlc_loss_from_hidden(hidden, nobody, nobody, 2, 3, pooling=pooling, backend="triton", **spans)
        loss.backward()
        assert loss == 0
        assert hidden.grad is not None
        assert (hidden.grad == 0).all()
    hidden = torch.ones(2, 0, 4, device=device, requires_grad=True)  # rows, but without tokens
    some = torch.arange(2, device=device)
    loss = mlc_loss_from_hidden(hidden, some, some, 2, 2, pooling=pooling, backend="triton")
    loss.backward()
    assert loss == 0


def test_large_tables_and_long_rows(device: str) -> None:
    """More rows and tokens than one step of any loop handles, and more than one block of features."""
    generator = torch.Generator().manual_seed(0)
    prompts, languages, tokens, width = 9, 33, 150, 300
    hidden = torch.randn(prompts * languages, tokens, width, generator=generator)
    order = torch.randperm(prompts * languages, generator=generator)
    group, language = (order // languages).to(device), (order % languages).to(device)
    real = torch.arange(tokens) < torch.randint(1, tokens + 1, (len(order), 1), generator=generator)
    from mlc_kernels import fused_pooling, pooling

    # Only the parts: 297 rows through the loss take minutes in the interpreter, and show nothing new.
    hidden, real = hidden.to(device), real.to(device)
    for of_tokens in (True, False):
        arguments = (hidden, real, None, group, language, prompts, languages, of_tokens)
        assert torch.equal(fused_pooling.table(*arguments), pooling.table(*arguments))
    few, kept = hidden[:5].requires_grad_(), real[:5]
    for mean, (one, other) in itertools.product((True, False), [(fused_pooling, pooling)]):
        found, expected = one.pool(few, kept, None, mean), other.pool(few, kept, None, mean)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)  # rounded to float32 from float64
        weights = torch.rand(found.shape, generator=generator).to(device)
        (grad,), (wanted,) = (torch.autograd.grad(pooled, few, weights) for pooled in (found, expected))
        torch.testing.assert_close(grad, wanted, rtol=1e-6, atol=0)
