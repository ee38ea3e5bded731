"""The Triton backend: launches of ``loss_kernels``, their registration as operators, their place in autograd.

Imported at the first use of the backend, as Triton is. In eager mode the kernels are launched directly, to spare the
cost of the dispatcher; under ``torch.compile`` they are the operators ``mlc_kernels::prompt_*``.
The reductions are part of the autograd function: the backward pass is then one launch, without a node for each
of them.
"""

from __future__ import annotations

import struct
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor

from mlc_kernels import loss_kernels

# Padded L: (warps, features in a step) of the forward and of the backward kernel. Chosen from what the compiler
# reports (no spills); fixed, so that the same input gives the same bits on the same kind of device.
FORWARD = {16: (4, 128), 32: (8, 64), 64: (8, 64)}
BACKWARD = {16: (4, 128), 32: (4, 64), 64: (8, 32)}
# Left alone, ptxas spills to make room for more programs on a multiprocessor than there will ever be.
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
    """MLC loss of ``rows``, reduced.

    Args:
        rows: (B, L, D), or (R, D) with a ``table``.
        mask: (B, L) bool or None. Only without a table.
        table: (B, L) int64, the row of each translation, -1 where it is missing; no row twice.

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
    """(B, L) singular values of the unit rows of (B, L, D), descending, zeros at the end."""
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
            # autograd would differentiate what follows as if the bracket were constant: a wrong answer.
            raise RuntimeError("mlc_loss: double backward is not implemented; use backend='reference'")
        rows, table, saved, count = ctx.saved_tensors
        backward = prompt_gradient if torch.compiler.is_compiling() else _gradient
        return backward(rows, table, saved, grad, count), None, None, None, None, None


def _reduced(losses: Tensor, reduction: str) -> tuple[Tensor, Tensor | None]:
    """Of (2, B) losses and whether they count: the result, and the number of prompts if it is a mean over them.

    No result is a view: users divide a loss in place, which autograd refuses for the view that a function returns.
    """
    if reduction == "none":
        return losses[0].clone(), None
    if reduction == "sum" or losses.shape[1] == 1:  # one prompt is the usual case, and its own mean
        return losses[0].sum(), None
    total, count = losses.sum(1).unbind()
    count = count.clamp(min=1)
    return total / count, count


def tile_of(languages: int) -> int:
    """L, padded to a power of two."""
    return 16 if languages <= 16 else 32 if languages <= 32 else 64


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """A kernel goes to the current device, which need not be the tensor's. On the CPU there is the interpreter."""
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def _strides(rows: Tensor) -> tuple[int, int, bool]:
    """Elements from prompt to prompt (0 with a table) and from row to row; whether all is in sixteens."""
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
    """(2, B) losses and whether they count; (B, L + 1, L) float64 for the backward pass, or nothing."""
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
    # Without a table the kernel writes every element; with one, only the table's rows.
    return rows.new_empty(rows.shape) if table is None else rows.new_zeros(rows.shape)


def _gradient(rows: Tensor, table: Tensor | None, saved: Tensor, grad: Tensor, count: Tensor | None) -> Tensor:
    """Gradient of the rows, given that of each loss (B,) or of their sum or mean ()."""
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
