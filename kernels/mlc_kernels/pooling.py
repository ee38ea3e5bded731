"""Pool token states to one row per translation, in plain PyTorch. ``fused_pooling`` does the same with Triton.

Tokens are padded, (N, T, H) with a mask, or packed, (tokens, H) with offsets. In both cases a row has a span of
tokens, and a table says which row holds which translation of which prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


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
    """(B, L) int64: index of each translation's row, or of its last token over all rows; -1 where it is missing.

    If several rows have the same ids, the last one counts. Rows whose ids are out of range are ignored.
    """
    last = _last_tokens(hidden, attention_mask, offsets)
    known = (group >= 0) & (group < prompts) & (language >= 0) & (language < languages)
    slot = torch.where(known, group * languages + language, prompts * languages)
    row = torch.arange(len(group), device=hidden.device)
    found = torch.full((prompts * languages + 1,), -1, dtype=torch.int64, device=hidden.device)
    found = found.scatter_reduce(0, slot, row, "amax")[:-1].view(prompts, languages)
    if len(group) == 0:
        return found
    last_of_found = last[found.clamp(min=0)]
    return torch.where((found >= 0) & (last_of_found >= 0), last_of_found if of_tokens else found, -1)


def pool(hidden: Tensor, attention_mask: Tensor | None, offsets: Tensor | None, mean: bool) -> Tensor:
    """(N, H) mean of each row's tokens (float32; float64 for float64 states) or its last token; 0 without tokens."""
    if not mean:
        last = _last_tokens(hidden, attention_mask, offsets)
        if hidden.numel() == 0:
            return hidden.new_zeros(len(last), hidden.shape[-1])
        tokens = hidden.reshape(-1, hidden.shape[-1])[last.clamp(min=0)]
        return torch.where((last >= 0)[:, None], tokens, 0.0)
    # Summed in float64, so that the order of summation does not change the result.
    wide = torch.float32 if hidden.device.type == "mps" else torch.float64
    if offsets is None:
        if attention_mask is None:
            total, count = hidden.sum(1, dtype=wide), hidden.new_full((len(hidden),), hidden.shape[1], dtype=wide)
        else:
            real = attention_mask != 0
            total = _MaskedSum.apply(hidden, real, wide)  # type: ignore[no-untyped-call]
            count = real.sum(1).to(wide)
    else:
        first, end = _bounds(offsets, len(hidden))
        position = torch.arange(len(hidden), device=hidden.device)
        row = torch.searchsorted(end, position, right=True)
        row = torch.where(position < first[:1], len(end), row) if len(end) else row
        total = torch.zeros(len(end) + 1, hidden.shape[1], dtype=wide, device=hidden.device)
        total = total.index_add(0, row, hidden.to(wide))[:-1]
        count = (end - first).to(wide)
    mean_of_row = total / count.clamp(min=1)[:, None]
    return mean_of_row.to(torch.float64 if hidden.dtype == torch.float64 else torch.float32)


class _MaskedSum(torch.autograd.Function):
    """(N, H) sum over the tokens of (N, T, H) where a (N, T) mask is True.

    It saves memory: on a CPU it sums one row at a time, so that it never copies all states, and its backward pass
    writes their gradient once.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, real: Tensor, wide: torch.dtype) -> Tensor:
        ctx.save_for_backward(real)
        ctx.dtype = hidden.dtype
        # torch.compile fuses mask and sum itself, and would compile again for every number of rows.
        whole = hidden.device.type != "cpu" or torch.compiler.is_compiling() or len(hidden) == 0
        rows_at_once = len(hidden) if whole else 1
        blocks = zip(torch.split(hidden, rows_at_once), torch.split(real, rows_at_once), strict=True)
        # `where`, not a product: padding may hold NaN.
        return torch.cat([torch.where(kept[:, :, None], rows, 0.0).sum(1, dtype=wide) for rows, kept in blocks])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (real,) = ctx.saved_tensors
        return torch.where(real[:, :, None], grad.to(ctx.dtype)[:, None, :], 0.0), None, None


def _last_tokens(hidden: Tensor, attention_mask: Tensor | None, offsets: Tensor | None) -> Tensor:
    """(N,) int64: index of each row's last token over all rows; -1 for a row without tokens."""
    if offsets is not None:
        first, end = _bounds(offsets, len(hidden))
        return torch.where(end > first, end - 1, -1)
    rows, tokens = hidden.shape[:2]
    before = torch.arange(rows, device=hidden.device) * tokens
    if tokens == 0:
        return torch.full_like(before, -1)
    if attention_mask is None:
        return before + tokens - 1
    position = torch.arange(tokens, device=hidden.device)
    last = torch.where(attention_mask != 0, position, -1).amax(1)
    return torch.where(last >= 0, before + last, -1)


def _bounds(offsets: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """(N,) first token of each row, and (N,) one past its last token, both clamped to the number of tokens."""
    inside = offsets.long().clamp(0, tokens)
    return inside[:-1], torch.maximum(inside[:-1], inside[1:])
