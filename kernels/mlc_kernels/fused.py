"""The Triton backend: launches the kernels of ``loss_kernels``, registers them as operators, connects them to autograd.

This module and Triton are imported when the backend is first used. In eager mode the kernels are launched directly,
because the dispatcher costs time; under ``torch.compile`` they are the operators ``mlc_kernels::prompt_*``.
The autograd function includes the reductions, so the backward pass is one launch, without a node for each
reduction.
"""

from __future__ import annotations

import struct
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor

from mlc_kernels import loss_kernels

# For each padded L: (warps, features in a step) of the forward and of the backward kernel. Chosen so that the compiler
# reports no spills. Fixed, so that the same input gives the same bits on the same kind of device.
FORWARD = {16: (4, 128), 32: (8, 64), 64: (8, 64)}
BACKWARD = {16: (4, 128), 32: (4, 64), 64: (8, 32)}
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
    forward = prompt_losses if torch.compiler.is_compiling() else _losses
    return _reduced(forward(rows, mask, table, temperature, divide_by_top, False)[0], reduction)[0]


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
        forward = prompt_losses if torch.compiler.is_compiling() else _losses
        losses, saved = forward(rows, mask, table, temperature, divide_by_top, True)
        result, count = _reduced(losses, reduction)
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


def _reduced(losses: Tensor, reduction: str) -> tuple[Tensor, Tensor | None]:
    """The reduced loss, and the number of prompts if it is a mean; ``losses`` (2, B): losses, and whether they count.

    The result is never a view, because users divide losses in place, and autograd refuses that for a returned view.
    """
    if reduction == "none":
        return losses[0].clone(), None
    if reduction == "sum" or losses.shape[1] == 1:  # one prompt is the usual case, and its loss is the mean
        return losses[0].sum(), None
    total, count = losses.sum(1).unbind()
    count = count.clamp(min=1)
    return total / count, count


def tile_of(languages: int) -> int:
    """L, padded to 16, 32 or 64."""
    return 16 if languages <= 16 else 32 if languages <= 32 else 64


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """A context in which kernels run on the tensor's device. On a CPU, Triton's interpreter runs them."""
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def _strides(rows: Tensor) -> tuple[int, int, bool]:
    """Stride of prompts (0 with a table) and of rows, in elements; whether both and D are multiples of 16."""
    prompt, row = (rows.stride(0), rows.stride(1)) if rows.dim() == 3 else (0, rows.stride(0))
    return prompt, row, (prompt | row | rows.shape[-1]) % 16 == 0


def _launch_forward(
    rows: Tensor,
    mask: Tensor | None,
    table: Tensor | None,
    out: Tensor,
    saved: Tensor | None,
    temperature: float,
    divide_by_top: bool,
    output: str,
) -> None:
    prompts, languages = rows.shape[:2] if table is None else table.shape
    if prompts == 0 or languages == 0:
        out.zero_()
        return
    tile = tile_of(languages)
    warps, block = FORWARD[tile]
    prompt_stride, row_stride, aligned = _strides(rows)
    with on_device_of(rows):
        loss_kernels.prompt_forward[(prompts,)](
            rows,
            rows if mask is None else mask,
            rows if table is None else table,
            out,
            out if saved is None else saved,
            struct.unpack("q", struct.pack("d", temperature))[0],
            prompts,
            languages,
            rows.shape[-1],
            prompt_stride,
            row_stride,
            0 if mask is None else mask.stride(0),
            0 if mask is None else mask.stride(1),
            OUTPUT=output,
            HAS_MASK=mask is not None,
            HAS_TABLE=table is not None,
            DIVIDE_BY_TOP=divide_by_top,
            RESCALE=rows.dtype == torch.float64,
            ALIGNED=aligned,
            DOT=DOT,
            TILE=tile,
            BLOCK=block,
            num_warps=warps,
            **COMPILER,
        )


def _out_dtype(rows: Tensor) -> torch.dtype:
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def _new_losses(
    rows: Tensor,
    mask: Tensor | None,
    table: Tensor | None,
    temperature: float,
    divide_by_top: bool,
    with_gradient: bool,
) -> tuple[Tensor, Tensor]:
    prompts, languages = rows.shape[:2] if table is None else table.shape
    losses = rows.new_empty((2, prompts), dtype=_out_dtype(rows))
    shape = (prompts, languages + 1, languages) if with_gradient else (0,)
    return losses, rows.new_empty(shape, dtype=torch.float64)


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
    _launch_forward(rows, mask, table, losses, saved, temperature, divide_by_top, output)
    return losses, saved


def _new_values(rows: Tensor, mask: Tensor | None) -> Tensor:
    return rows.new_empty(rows.shape[:2], dtype=_out_dtype(rows))


def _values(rows: Tensor, mask: Tensor | None) -> Tensor:
    """(B, L) singular values."""
    found = _new_values(rows, mask)
    _launch_forward(rows, mask, None, found, None, 1.0, True, "values")
    return found


def _new_gradient(rows: Tensor, table: Tensor | None, saved: Tensor, grad: Tensor, count: Tensor | None) -> Tensor:
    # Without a table the kernel writes every element; with a table, only the table's rows.
    return rows.new_empty(rows.shape) if table is None else rows.new_zeros(rows.shape)


def _gradient(rows: Tensor, table: Tensor | None, saved: Tensor, grad: Tensor, count: Tensor | None) -> Tensor:
    """Gradient of the rows, given the gradient of each loss, (B,), or of their sum or mean, ()."""
    found = _new_gradient(rows, table, saved, grad, count)
    if saved.numel() == 0:
        return found
    languages, features = saved.shape[2], rows.shape[-1]
    tile = tile_of(languages)
    warps, block = BACKWARD[tile]
    prompt_stride, row_stride, aligned = _strides(rows)
    with on_device_of(rows):
        loss_kernels.prompt_backward[(saved.shape[0], triton.cdiv(features, block))](
            rows,
            saved if table is None else table,
            saved,
            grad,
            saved if count is None else count,
            found,
            languages,
            features,
            prompt_stride,
            row_stride,
            grad.stride(0) if grad.dim() else 0,
            MEAN=count is not None,
            HAS_TABLE=table is not None,
            ALIGNED=aligned,
            TILE=tile,
            BLOCK=block,
            num_warps=warps,
            **COMPILER,
        )
    return found


prompt_losses = torch.library.custom_op("mlc_kernels::prompt_losses", _losses, mutates_args=())
prompt_values = torch.library.custom_op("mlc_kernels::prompt_values", _values, mutates_args=())
prompt_gradient = torch.library.custom_op("mlc_kernels::prompt_gradient", _gradient, mutates_args=())
prompt_losses.register_fake(_new_losses)
prompt_values.register_fake(_new_values)
prompt_gradient.register_fake(_new_gradient)
