"""The Triton backend: launches the kernels of ``loss_kernels``, registers them as operators, connects them to autograd.

This module and Triton are imported when the backend is first used. In eager mode the kernels are launched directly,
because the dispatcher costs time; under ``torch.compile`` they are the operators ``mlc_kernels::prompt_*`` and
``mlc_kernels::sum_losses``. The autograd function includes the reductions, so the backward pass is one launch, without
a node for each reduction.
"""

from __future__ import annotations

import struct
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor

from mlc_kernels import loss_kernels, split
from mlc_kernels.launch import Call, launch

# For each padded L: (warps, features in a step) of the forward and of the backward kernel. Chosen so that the compiler
# reports no spills. Fixed, so that the same input gives the same bits on the same kind of device.
FORWARD = {16: (4, 128), 32: (8, 64), 64: (8, 64)}
ONE_WARP = {16: (1, 64)}  # the same for a forward kernel that has one warp (split.py)
BACKWARD = {16: (4, 128), 32: (4, 64), 64: (8, 32)}
SUMMED = 256  # losses that are added at once, by one warp
# By default ptxas spills registers, to make room for more programs on a multiprocessor than will ever run there.
COMPILER = {"maxnreg": 255} if torch.version.hip is None else {}
# LLVM's AMD backend has no float64 matrix product (Triton 3.7).
DOT = torch.version.hip is None


def loss(
    rows: Tensor,
    mask: Tensor | None,
    table: Tensor | None,
    temperature: float,
    divide_by_top: bool,
    reduction: str,
) -> Tensor:
    """Return the reduced MLC loss of ``rows``.

    Args:
        rows: (B, L, D), or (R, D) with a ``table``.
        mask: (B, L) bool or None. Only without a table.
        table: (B, L) int64: index of each translation's row, -1 where it is missing. No row occurs twice.

    Returns:
        () or (B,), float32; float64 for float64 rows.
    """
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    if torch.is_grad_enabled() and rows.requires_grad:
        result: Tensor = _Loss.apply(rows, mask, table, temperature, divide_by_top, reduction)  # type: ignore[no-untyped-call]
        return result
    return _forward(rows, mask, table, temperature, divide_by_top, reduction, False)[0]


def values(rows: Tensor, mask: Tensor | None) -> Tensor:
    """(B, L) singular values of the unit rows of (B, L, D), in descending order, with zeros at the end."""
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    return (prompt_values if torch.compiler.is_compiling() else _values)(rows, mask)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        mask: Tensor | None,
        table: Tensor | None,
        temperature: float,
        divide_by_top: bool,
        reduction: str,
    ) -> Tensor:
        result, saved, count = _forward(rows, mask, table, temperature, divide_by_top, reduction, True)
        ctx.save_for_backward(rows, table, saved, count)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        if torch.is_grad_enabled():
            # autograd would differentiate this backward pass as if the bracket were constant: a wrong answer.
            raise RuntimeError("mlc_loss: double backward is not implemented; use backend='reference'")
        rows, table, saved, count = ctx.saved_tensors
        backward = prompt_gradient if torch.compiler.is_compiling() else _gradient
        return backward(rows, table, saved, grad, count), None, None, None, None, None


def _forward(
    rows: Tensor,
    mask: Tensor | None,
    table: Tensor | None,
    temperature: float,
    divide_by_top: bool,
    reduction: str,
    with_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The reduced loss, what the backward pass needs, and the number of prompts if it is a mean.

    The loss is never a view, because users divide losses in place, and autograd refuses that for a returned view.
    """
    compiling = torch.compiler.is_compiling()
    prompts = len(rows) if table is None else len(table)
    # One prompt is the usual case. Its loss is the sum, and the mean: if it does not count, it is 0.
    if reduction != "none" and prompts != 1:
        compute, add = (prompt_losses, sum_losses) if compiling else (_losses, _sum)
        losses, saved = compute(rows, mask, table, temperature, divide_by_top, with_gradient)
        result, count = add(losses, reduction == "mean")
        return result, saved, count if reduction == "mean" else None
    shape = (prompts,) if reduction == "none" else ()
    if compiling:
        losses, saved = prompt_losses(rows, mask, table, temperature, divide_by_top, with_gradient)
        return losses[0].clone() if reduction == "none" else losses[0].sum(), saved, None
    result, saved = rows.new_empty(shape, dtype=_out_dtype(rows)), _new_saved(rows, table, with_gradient)
    output = "gradient" if with_gradient else "loss"
    _launch_forward(rows, mask, table, result, saved, temperature, divide_by_top, output, 0)
    return result, saved, None


def tile_of(languages: int) -> int:
    """L, padded to 16, 32 or 64."""
    return 16 if languages <= 16 else 32 if languages <= 32 else 64


def _row_strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, int, bool]:
    """Stride of prompts (0 with a table) and of rows, in elements; whether both and D are multiples of 16."""
    prompt, row = strides[:2] if len(shape) == 3 else (0, strides[0])
    return prompt, row, (prompt | row | shape[-1]) % 16 == 0


def _launch_forward(
    rows: Tensor,
    mask: Tensor | None,
    table: Tensor | None,
    out: Tensor,
    saved: Tensor,
    temperature: float,
    divide_by_top: bool,
    output: str,
    counted_at: int,
) -> None:
    if (rows if table is None else table).numel() == 0:
        out.zero_()
        return
    layout: tuple[Any, ...] = (
        rows.shape,
        rows.stride(),
        rows.dtype,
        None if mask is None else mask.stride(),
        None if table is None else table.shape,
        temperature,
        divide_by_top,
        output,
        counted_at,
    )
    gathered = rows if mask is None else mask, rows if table is None else table
    chosen = _split_of(rows, table) if split.SPLITS else None  # no time for an empty table
    if chosen is not None:
        if chosen.parts > 1:
            prompts, languages = _sizes(rows, table)
            parts = rows.new_empty(prompts, chosen.parts, languages + 1, languages, dtype=torch.float64)
            launch(_parts_call, (*layout[:5], chosen.parts), (rows, *gathered, parts))
            rows, gathered = parts, (parts, parts)
        layout = *layout, chosen.parts, chosen.one_warp
    launch(_forward_call, layout, (rows, *gathered, out, saved))


def _sizes(rows: Tensor, table: Tensor | None) -> tuple[int, int]:
    """B and L."""
    prompts, languages = rows.shape[:2] if table is None else table.shape
    return prompts, languages


def _split_of(rows: Tensor, table: Tensor | None) -> split.Split | None:
    prompts, languages = _sizes(rows, table)
    return split.split_of(tile_of(languages), rows.shape[-1], prompts)


def _parts_call(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    mask_strides: tuple[int, int] | None,
    table_shape: tuple[int, int] | None,
    parts: int,
) -> Call:
    prompts, languages = shape[:2] if table_shape is None else table_shape
    tile = tile_of(languages)
    warps, block = FORWARD[tile]
    prompt_stride, row_stride, aligned = _row_strides(shape, strides)
    steps = triton.cdiv(triton.cdiv(shape[-1], block), parts)
    return Call(
        loss_kernels.gram_parts,
        (prompts, parts, 1),
        (languages, shape[-1], steps, prompt_stride, row_stride, *(mask_strides or (0, 0))),
        {
            "HAS_MASK": mask_strides is not None,
            "HAS_TABLE": table_shape is not None,
            "RESCALE": dtype == torch.float64,
            "ALIGNED": aligned,
            "DOT": DOT,
            "TILE": tile,
            "BLOCK": block,
        },
        {"num_warps": warps, **COMPILER},
    )


def _forward_call(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    mask_strides: tuple[int, int] | None,
    table_shape: tuple[int, int] | None,
    temperature: float,
    divide_by_top: bool,
    output: str,
    counted_at: int,
    parts: int = 1,
    one_warp: bool = False,
) -> Call:
    prompts, languages = shape[:2] if table_shape is None else table_shape
    tile = tile_of(languages)
    warps, block = (ONE_WARP if one_warp else FORWARD)[tile]
    prompt_stride, row_stride, aligned = _row_strides(shape, strides)
    bits = struct.unpack("q", struct.pack("d", temperature))[0]
    return Call(
        loss_kernels.prompt_forward,
        (prompts, 1, 1),
        (bits, counted_at, languages, shape[-1], prompt_stride, row_stride, *(mask_strides or (0, 0))),
        {
            "OUTPUT": output,
            # The parts know which rows are missing: their products are 0.
            "HAS_MASK": parts == 1 and mask_strides is not None,
            "HAS_TABLE": parts == 1 and table_shape is not None,
            "DIVIDE_BY_TOP": divide_by_top,
            "RESCALE": dtype == torch.float64,
            "ALIGNED": parts == 1 and aligned,
            "DOT": DOT,
            "TILE": tile,
            "BLOCK": block,
            "PARTS": parts,
        },
        {"num_warps": warps, **COMPILER},
    )


def _out_dtype(rows: Tensor) -> torch.dtype:
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def _new_saved(rows: Tensor, table: Tensor | None, with_gradient: bool) -> Tensor:
    """For the backward pass: (B, L + 1, L) float64, or empty."""
    if not with_gradient:
        return rows.new_empty((0,), dtype=torch.float64)
    prompts, languages = _sizes(rows, table)
    return rows.new_empty(prompts, languages + 1, languages, dtype=torch.float64)


def _new_losses(
    rows: Tensor,
    mask: Tensor | None,
    table: Tensor | None,
    temperature: float,
    divide_by_top: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    prompts = rows.shape[0] if table is None else table.shape[0]
    return rows.new_empty((2, prompts), dtype=_out_dtype(rows)), _new_saved(rows, table, with_gradient)


def _losses(
    rows: Tensor,
    mask: Tensor | None,
    table: Tensor | None,
    temperature: float,
    divide_by_top: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """(2, B): losses, and whether they count; (B, L + 1, L) float64 for the backward pass, or empty."""
    losses, saved = _new_losses(rows, mask, table, temperature, divide_by_top, with_gradient)
    output = "gradient" if with_gradient else "loss"
    _launch_forward(rows, mask, table, losses, saved, temperature, divide_by_top, output, losses.shape[1])
    return losses, saved


def _new_sum(losses: Tensor, mean: bool) -> tuple[Tensor, Tensor]:
    return losses.new_empty(()), losses.new_empty((), dtype=torch.float64)


def _sum(losses: Tensor, mean: bool) -> tuple[Tensor, Tensor]:
    """() sum or mean of (2, B), losses and whether they count; () float64 number of those that count, at least 1."""
    result, count = _new_sum(losses, mean)
    launch(_sum_call, (losses.shape[1], losses.dtype, mean), (losses, result, count))
    return result, count


def _sum_call(prompts: int, dtype: torch.dtype, mean: bool) -> Call:
    constants = {"MEAN": mean, "BLOCK": SUMMED}
    return Call(loss_kernels.sum_losses, (1, 1, 1), (prompts,), constants, {"num_warps": 1})


def _new_values(rows: Tensor, mask: Tensor | None) -> Tensor:
    return rows.new_empty(rows.shape[:2], dtype=_out_dtype(rows))


def _values(rows: Tensor, mask: Tensor | None) -> Tensor:
    """(B, L) singular values."""
    found = _new_values(rows, mask)
    _launch_forward(rows, mask, None, found, found, 1.0, True, "values", 0)
    return found


def _new_gradient(rows: Tensor, table: Tensor | None, saved: Tensor, grad: Tensor, count: Tensor | None) -> Tensor:
    # Without a table the kernel writes every element; with a table, only the table's rows.
    if table is not None:
        return rows.new_zeros(rows.shape)
    return torch.empty_like(rows, memory_format=torch.contiguous_format)  # half the time of new_empty


def _gradient(rows: Tensor, table: Tensor | None, saved: Tensor, grad: Tensor, count: Tensor | None) -> Tensor:
    """Gradient of the rows, given the gradient of each loss, (B,), or of their sum or mean, ()."""
    found = _new_gradient(rows, table, saved, grad, count)
    if saved.numel() == 0:
        return found
    layout = (
        saved.shape,
        rows.shape,
        rows.stride(),
        rows.dtype,
        table is not None,
        grad.stride(),
        grad.dtype,
        count is not None,
    )
    tensors = (rows, saved if table is None else table, saved, grad, saved if count is None else count, found)
    launch(_backward_call, layout, tensors)
    return found


def _backward_call(
    saved_shape: tuple[int, int, int],
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    has_table: bool,
    grad_strides: tuple[int, ...],
    grad_dtype: torch.dtype,
    mean: bool,
) -> Call:
    prompts, _, languages = saved_shape
    tile = tile_of(languages)
    warps, block = BACKWARD[tile]
    prompt_stride, row_stride, aligned = _row_strides(shape, strides)
    return Call(
        loss_kernels.prompt_backward,
        (prompts, triton.cdiv(shape[-1], block), 1),
        (languages, shape[-1], prompt_stride, row_stride, grad_strides[0] if grad_strides else 0),
        {"MEAN": mean, "HAS_TABLE": has_table, "ALIGNED": aligned, "DOT": DOT, "TILE": tile, "BLOCK": block},
        {"num_warps": warps, **COMPILER},
    )


prompt_losses = torch.library.custom_op("mlc_kernels::prompt_losses", _losses, mutates_args=())
prompt_values = torch.library.custom_op("mlc_kernels::prompt_values", _values, mutates_args=())
sum_losses = torch.library.custom_op("mlc_kernels::sum_losses", _sum, mutates_args=())
prompt_gradient = torch.library.custom_op("mlc_kernels::prompt_gradient", _gradient, mutates_args=())
prompt_losses.register_fake(_new_losses)
prompt_values.register_fake(_new_values)
sum_losses.register_fake(_new_sum)
prompt_gradient.register_fake(_new_gradient)
