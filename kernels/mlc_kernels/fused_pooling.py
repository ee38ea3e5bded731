"""Launches the kernels of ``pooling_kernels``, registers them as operators, connects them to autograd, as ``fused``."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor

from mlc_kernels import pooling_kernels
from mlc_kernels.fused import tile_of
from mlc_kernels.launch import Call, launch

# Tokens and features in a step, and number of warps. A warp reads 512 contiguous bytes of 16-bit states.
TOKENS, FEATURES, WARPS = 16, 256, 4


def table(
    hidden: Tensor,
    attention_mask: Tensor | None,
    offsets: Tensor | None,
    group: Tensor,
    language: Tensor,
    prompts: int,
    languages: int,
    of_tokens: bool,
) -> Tensor:
    """The same as :func:`mlc_kernels.pooling.table`, in one launch."""
    find = find_rows if torch.compiler.is_compiling() else _find
    tokens = hidden.shape[0] if offsets is not None else hidden.shape[1]
    return find(
        group.contiguous(), language.contiguous(), attention_mask, offsets, tokens, prompts, languages, of_tokens
    )


def pool(hidden: Tensor, attention_mask: Tensor | None, offsets: Tensor | None, mean: bool) -> Tensor:
    """The same as :func:`mlc_kernels.pooling.pool`, in one launch forward and one backward."""
    if hidden.stride(-1) != 1:
        hidden = hidden.contiguous()
    if torch.is_grad_enabled() and hidden.requires_grad:
        pooled: Tensor = _Pool.apply(hidden, attention_mask, offsets, mean)  # type: ignore[no-untyped-call]
        return pooled
    return (pool_rows if torch.compiler.is_compiling() else _pool)(hidden, attention_mask, offsets, mean)[0]


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, attention_mask: Tensor | None, offsets: Tensor | None, mean: bool) -> Tensor:
        forward = pool_rows if torch.compiler.is_compiling() else _pool
        pooled, count = forward(hidden, attention_mask, offsets, mean)
        ctx.save_for_backward(attention_mask, offsets, count)
        ctx.shape, ctx.dtype, ctx.mean = hidden.shape, hidden.dtype, mean
        return pooled

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if torch.is_grad_enabled():
            raise RuntimeError("mlc_loss: double backward is not implemented; use backend='reference'")
        attention_mask, offsets, count = ctx.saved_tensors
        backward = spread_rows if torch.compiler.is_compiling() else _spread
        found = backward(grad.contiguous(), attention_mask, offsets, count, list(ctx.shape), ctx.dtype, ctx.mean)
        return found, None, None, None


def ids_in_a_step(tile: int) -> int:
    """Number of ids, or of mask entries, in one step: this many times ``tile`` fit into registers."""
    return 2048 // tile


class _Spans(NamedTuple):
    """What tells where rows begin and end, without its values: the part of a layout that all three kernels have."""

    mask_dtype: torch.dtype | None
    mask_strides: tuple[int, ...]
    offsets_dtype: torch.dtype | None

    @classmethod
    def of(cls, attention_mask: Tensor | None, offsets: Tensor | None) -> _Spans:
        return cls(
            None if attention_mask is None else attention_mask.dtype,
            (0, 0) if attention_mask is None else attention_mask.stride(),
            None if offsets is None else offsets.dtype,
        )

    @property
    def constants(self) -> dict[str, bool]:
        return {"HAS_MASK": self.mask_dtype is not None, "PACKED": self.offsets_dtype is not None}


def _new_table(
    group: Tensor,
    language: Tensor,
    attention_mask: Tensor | None,
    offsets: Tensor | None,
    tokens: int,
    prompts: int,
    languages: int,
    of_tokens: bool,
) -> Tensor:
    return group.new_empty((prompts, languages))


def _find(
    group: Tensor,
    language: Tensor,
    attention_mask: Tensor | None,
    offsets: Tensor | None,
    tokens: int,
    prompts: int,
    languages: int,
    of_tokens: bool,
) -> Tensor:
    found = group.new_empty((prompts, languages))
    if found.numel():
        tensors = (
            group,
            language,
            group if attention_mask is None else attention_mask,
            group if offsets is None else offsets,
            found,
        )
        rows = len(group)
        layout = (rows, tokens, prompts, languages, _Spans.of(attention_mask, offsets), of_tokens)
        launch(_find_call, layout, tensors)
    return found


def _find_call(
    rows: int,
    tokens: int,
    prompts: int,
    languages: int,
    spans: _Spans,
    of_tokens: bool,
) -> Call:
    tile = tile_of(languages)
    return Call(
        pooling_kernels.find_rows,
        (prompts, 1, 1),
        (rows, tokens, languages, *spans.mask_strides),
        {
            "OF_TOKENS": of_tokens,
            **spans.constants,
            "TILE": tile,
            "BLOCK": ids_in_a_step(tile),
        },
        {"num_warps": 4},
    )


def _new_pooled(
    hidden: Tensor, attention_mask: Tensor | None, offsets: Tensor | None, mean: bool
) -> tuple[Tensor, Tensor]:
    rows = len(hidden) if offsets is None else len(offsets) - 1
    wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    pooled = hidden.new_empty((rows, hidden.shape[-1]), dtype=wide if mean else hidden.dtype)
    return pooled, hidden.new_empty((rows,), dtype=torch.float64 if mean else torch.int64)


def _pool(hidden: Tensor, attention_mask: Tensor | None, offsets: Tensor | None, mean: bool) -> tuple[Tensor, Tensor]:
    """(N, H) rows; (N,) number of tokens that a row is the mean of, or index of its last token."""
    pooled, count = _new_pooled(hidden, attention_mask, offsets, mean)
    if pooled.numel() == 0:
        return pooled, count
    tensors = (
        hidden,
        hidden if attention_mask is None else attention_mask,
        hidden if offsets is None else offsets,
        pooled,
        count,
    )
    layout = (pooled.shape, hidden.shape, hidden.stride(), hidden.dtype, _Spans.of(attention_mask, offsets), mean)
    launch(_pool_call, layout, tensors)
    return pooled, count


def _pool_call(
    pooled_shape: tuple[int, int],
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    spans: _Spans,
    mean: bool,
) -> Call:
    rows, features = pooled_shape
    row_stride, token_stride = strides[0], strides[0] if len(shape) == 2 else strides[1]
    return Call(
        pooling_kernels.pool_rows,
        (rows, triton.cdiv(features, FEATURES), 1),
        (shape[-2], features, row_stride, token_stride, *spans.mask_strides),
        {
            "MEAN": mean,
            **spans.constants,
            "ALIGNED": (row_stride | token_stride | features) % 16 == 0,
            "TOKENS": TOKENS,
            "BLOCK": FEATURES,
        },
        {"num_warps": WARPS},
    )


def _new_spread(
    grad: Tensor,
    attention_mask: Tensor | None,
    offsets: Tensor | None,
    count: Tensor,
    shape: list[int],
    dtype: torch.dtype,
    mean: bool,
) -> Tensor:
    return grad.new_empty(shape, dtype=dtype)


def _spread(
    grad: Tensor,
    attention_mask: Tensor | None,
    offsets: Tensor | None,
    count: Tensor,
    shape: list[int],
    dtype: torch.dtype,
    mean: bool,
) -> Tensor:
    """Gradient of the tokens, of ``shape``, given the gradient of the rows, (N, H)."""
    if grad.numel() == 0:
        return grad.new_zeros(shape, dtype=dtype)
    found = grad.new_empty(shape, dtype=dtype)
    tensors = (
        grad,
        grad if attention_mask is None else attention_mask,
        grad if offsets is None else offsets,
        count,
        found,
    )
    launch(_spread_call, (len(grad), found.shape, grad.dtype, dtype, _Spans.of(attention_mask, offsets), mean), tensors)
    return found


def _spread_call(
    rows: int, shape: tuple[int, ...], grad_dtype: torch.dtype, dtype: torch.dtype, spans: _Spans, mean: bool
) -> Call:
    tokens, features = shape[-2:]
    return Call(
        pooling_kernels.spread_rows,
        (rows, triton.cdiv(features, FEATURES), 1),
        (rows, tokens, features, *spans.mask_strides),
        {
            "MEAN": mean,
            **spans.constants,
            "ALIGNED": features % 16 == 0,
            "TOKENS": TOKENS,
            "BLOCK": FEATURES,
        },
        {"num_warps": WARPS},
    )


find_rows = torch.library.custom_op("mlc_kernels::find_rows", _find, mutates_args=())
pool_rows = torch.library.custom_op("mlc_kernels::pool_rows", _pool, mutates_args=())
spread_rows = torch.library.custom_op("mlc_kernels::spread_rows", _spread, mutates_args=())
find_rows.register_fake(_new_table)
pool_rows.register_fake(_new_pooled)
spread_rows.register_fake(_new_spread)
