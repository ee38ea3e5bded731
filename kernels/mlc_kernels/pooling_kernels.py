# mypy: ignore-errors
# (A kernel is written in Triton's language, which only looks like Python.)
"""Triton kernels of pooling: find each translation's row, pool tokens to rows, spread gradients of rows to tokens.

Pooling moves many bytes and computes little. It runs over rows times blocks of features, whereas the loss runs over
prompts. The sums are float64, as in ``pooling``.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _bounds(offsets_ptr, row, tokens):
    """First token of a packed row, and one past its last token, both clamped to the number of tokens."""
    first = tl.load(offsets_ptr + row).to(tl.int64)
    end = tl.load(offsets_ptr + row + 1).to(tl.int64)
    first = tl.minimum(tl.maximum(first, 0), tokens)
    return first, tl.minimum(tl.maximum(end, first), tokens)


@triton.jit(do_not_specialize=["rows", "tokens", "languages", "mask_row_stride", "mask_token_stride"])
def find_rows(
    group_ptr,  # (N,) int64
    language_ptr,  # (N,) int64
    mask_ptr,  # (N, T) bool or integer by strides; any pointer if there is no mask
    offsets_ptr,  # (N + 1,) int32 or int64; any pointer if the states are padded
    table_ptr,  # (B, L) int64
    rows,
    tokens,  # number of tokens in a row (padded) or in all rows (packed)
    languages,
    mask_row_stride,
    mask_token_stride,
    OF_TOKENS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per prompt: the row of each translation, or the row's last token."""
    prompt = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, TILE)
    inside = slot < languages
    found = tl.full([TILE], -1, tl.int32)
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        mine = tl.load(group_ptr + row, mask=row < rows, other=-1) == prompt
        language = tl.load(language_ptr + row, mask=row < rows, other=-1)
        hit = mine[None, :] & (language[None, :] == slot[:, None])
        # Of several rows with the same ids, always the last one.
        found = tl.maximum(found, tl.max(tl.where(hit, row[None, :], -1), axis=1))
    there = inside & (found >= 0)
    row = tl.where(there, found, 0).to(tl.int64)
    last = tl.full([TILE], -1, tl.int64)
    if PACKED:
        first = tl.load(offsets_ptr + row, mask=there, other=0).to(tl.int64)
        end = tl.load(offsets_ptr + row + 1, mask=there, other=0).to(tl.int64)
        first = tl.minimum(tl.maximum(first, 0), tokens)
        end = tl.minimum(end, tokens)
        last = tl.where(end > first, end - 1, -1)
    elif HAS_MASK:
        position = tl.full([TILE], -1, tl.int32)
        for first in range(0, tokens, BLOCK):
            token = first + tl.arange(0, BLOCK)
            pointers = mask_ptr + row[:, None] * mask_row_stride + token[None, :] * mask_token_stride
            real = tl.load(pointers, mask=there[:, None] & (token < tokens)[None, :], other=0) != 0
            position = tl.maximum(position, tl.max(tl.where(real, token[None, :], -1), axis=1))
        last = tl.where(position >= 0, row * tokens + position, -1)
    else:
        last = row * tokens + tokens - 1
        there = there & (last >= row * tokens)
    result = last if OF_TOKENS else row
    tl.store(table_ptr + prompt * languages + slot, tl.where(there & (last >= 0), result, -1), mask=inside)


@triton.jit
def _last_token(mask, first, end, mask_token_stride, HAS_MASK: tl.constexpr, BLOCK: tl.constexpr):
    """Last token of a span that the mask keeps, -1 if it keeps none. Without a mask, all tokens count."""
    if HAS_MASK:
        last = tl.full([BLOCK], -1, tl.int64)
        for start in range(first, end, BLOCK):
            token = start + tl.arange(0, BLOCK)
            real = tl.load(mask + token * mask_token_stride, mask=token < end, other=0) != 0
            last = tl.maximum(last, tl.where(real, token, -1))
        return tl.max(last, axis=0)
    else:  # noqa: RET505, without it Triton compiles both ways
        return tl.where(end > first, end - 1, -1)


@triton.jit
def _span(
    hidden_ptr,
    mask_ptr,
    offsets_ptr,
    row,
    tokens,
    row_stride,
    mask_row_stride,
    PACKED: tl.constexpr,
):
    """A row's tokens: pointer to token 0, pointer to its mask, first token, one past the last token."""
    zero = row * 0
    if PACKED:
        first, end = _bounds(offsets_ptr, row, tokens)
        return hidden_ptr + zero, mask_ptr, first, end
    else:  # noqa: RET505
        return hidden_ptr + row * row_stride, mask_ptr + row * mask_row_stride, zero, zero + tokens


@triton.jit(
    do_not_specialize=["tokens", "features", "row_stride", "token_stride", "mask_row_stride", "mask_token_stride"]
)
def pool_rows(
    hidden_ptr,  # (N, T, H) by strides, or (tokens, H)
    mask_ptr,  # as in find_rows
    offsets_ptr,  # as in find_rows
    out_ptr,  # (N, H)
    count_ptr,  # MEAN: (N,) float64 number of tokens. Else (N,) index of the last token, -1 if there is none
    tokens,
    features,
    row_stride,
    token_stride,
    mask_row_stride,
    mask_token_stride,
    MEAN: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row and BLOCK features: their mean over the row's tokens, or their values at the last token."""
    if ALIGNED:
        features = features // 16 * 16
        row_stride = row_stride // 16 * 16
        token_stride = token_stride // 16 * 16
    row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = feature < features
    hidden, mask, first, end = _span(
        hidden_ptr, mask_ptr, offsets_ptr, row, tokens, row_stride, mask_row_stride, PACKED
    )
    if MEAN:
        total = tl.zeros([TOKENS, BLOCK], tl.float64)
        count = tl.zeros([TOKENS], tl.int32)
        for start in range(first, end, TOKENS):
            token = start + tl.arange(0, TOKENS)
            real = token < end
            if HAS_MASK:
                real = tl.load(mask + token * mask_token_stride, mask=real, other=0) != 0
            pointers = hidden + (token * token_stride)[:, None] + feature[None, :]
            # Do not load padding: this saves bytes, and padding may hold NaN.
            total += tl.load(pointers, mask=real[:, None] & within[None, :], other=0.0).to(tl.float64)
            count += real.to(tl.int32)
        number = tl.sum(count, axis=0).to(tl.float64)
        result = tl.sum(total, axis=0) / tl.maximum(number, 1.0)
    else:
        last = _last_token(mask, first, end, mask_token_stride, HAS_MASK, 128)
        pointers = hidden + tl.maximum(last, 0) * token_stride + feature
        result = tl.load(pointers, mask=feature < tl.where(last >= 0, features, 0), other=0.0)
        number = last
    if out_ptr.dtype.element_ty != tl.float64:
        result = result.to(tl.float32)  # 16-bit types are converted from float32
    tl.store(out_ptr + row * features + feature, result.to(out_ptr.dtype.element_ty), mask=within)
    if tl.program_id(1) == 0:
        tl.store(count_ptr + row, number)


@triton.jit(do_not_specialize=["rows", "tokens", "features", "mask_row_stride", "mask_token_stride"])
def spread_rows(
    grad_ptr,  # (N, H)
    mask_ptr,  # as in find_rows
    offsets_ptr,  # as in find_rows
    count_ptr,  # as in pool_rows
    out_ptr,  # as hidden, contiguous; every element is written, also where a token belongs to no row
    rows,
    tokens,
    features,
    mask_row_stride,
    mask_token_stride,
    MEAN: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PACKED: tl.constexpr,
    ALIGNED: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per row and BLOCK features: spreads the row's gradient to the tokens that it was pooled from."""
    if ALIGNED:
        features = features // 16 * 16
    row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    within = feature < features
    out, mask, first, end = _span(
        out_ptr, mask_ptr, offsets_ptr, row, tokens, features * tokens.to(tl.int64), mask_row_stride, PACKED
    )
    begin, stop = first, end
    if PACKED:  # the first row also fills the tokens before it, and the last row those after it
        begin = tl.where(row == 0, 0, first)
        stop = tl.where(row == rows - 1, tokens, end)
    grad = tl.load(grad_ptr + row * features + feature, mask=within, other=0.0).to(tl.float64)
    number = tl.load(count_ptr + row)
    if MEAN:
        grad = grad / tl.maximum(number, 1.0)
    if out_ptr.dtype.element_ty != tl.float64:
        grad = grad.to(tl.float32)  # 16-bit types are converted from float32
    grad = grad.to(out_ptr.dtype.element_ty)
    for start in range(begin, stop, TOKENS):
        token = start + tl.arange(0, TOKENS)
        if MEAN:
            real = (token >= first) & (token < end)
            if HAS_MASK:
                real = tl.load(mask + token * mask_token_stride, mask=real, other=0) != 0
        else:
            real = token == number
        pointers = out + (token * features)[:, None] + feature[None, :]
        tl.store(pointers, tl.where(real[:, None], grad[None, :], 0.0), mask=(token < stop)[:, None] & within[None, :])
