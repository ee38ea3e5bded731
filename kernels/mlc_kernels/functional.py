"""The operator's public functions: argument checks, choice of a backend, reduction."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from mlc_kernels import closed_form, reference

Scale = Literal["top", "none"]
Reduction = Literal["mean", "sum", "none"]
Backend = Literal["auto", "closed_form", "reference"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def mlc_loss(
    representations: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 0.2,
    scale: Scale = "top",
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """MLC loss of B prompts in up to L languages.

    Each row is brought to unit length; of the singular values ``s_1 >= s_2 >= ...`` of a prompt's rows,
    ``loss = cross_entropy(s / (stopgrad(s_1) * temperature), target=0)``. It is lowest where all rows lie
    on one line (see :func:`loss_floor`).

    Args:
        representations: (B, L, D) float16, bfloat16, float32 or float64.
        mask: (B, L) bool, False where a translation is missing; what stands there is not looked at and
            gets a zero gradient. A row of zeros counts as missing too.
        temperature: Of the softmax over singular values.
        scale: ``top`` divides the singular values by the largest one (the authors' code), ``none`` does
            not (the paper's equation).
        reduction: ``mean`` over the prompts with two or more rows, ``sum``, or ``none``: (B,). A prompt
            with fewer rows contributes 0. The mean over no prompt is 0.
        backend: ``closed_form`` (float64 Gram matrix and written-out gradient), ``reference`` (SVD and
            autograd: the definition), or ``auto`` for the fastest that runs here.

    Returns:
        () or (B,), float32; float64 for float64 input.

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: Any other argument is out of place; the message starts with its name.
    """
    _check(representations, mask, backend)
    if not (isinstance(temperature, int | float) and 0 < temperature < math.inf):
        raise ValueError(f"temperature must be a positive number, got {temperature}")
    if scale not in ("top", "none"):
        raise ValueError(f"scale must be 'top' or 'none', got {scale!r}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")

    compute = reference.prompt_losses if backend == "reference" else closed_form.prompt_losses
    device = representations.device
    rows, present = _where_float64_exists(representations, mask)
    with _full_precision(rows.device.type):
        losses, counted = compute(rows, present, float(temperature), scale == "top")
        if reduction == "none":
            return losses.to(device)
        total = losses.sum()
        return (total if reduction == "sum" else total / counted.sum().clamp(min=1)).to(device)


def singular_values(representations: Tensor, mask: Tensor | None = None, *, backend: Backend = "auto") -> Tensor:
    """Singular values of each prompt's rows, brought to unit length. Not differentiable.

    Args:
        representations: (B, L, D), as in :func:`mlc_loss`.
        mask: (B, L) bool, as in :func:`mlc_loss`.
        backend: As in :func:`mlc_loss`.

    Returns:
        (B, L) float32 (float64 for float64 input), descending, with zeros for missing rows at the end.

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: Any other argument is out of place.
    """
    _check(representations, mask, backend)
    compute = reference.values if backend == "reference" else closed_form.values
    rows, present = _where_float64_exists(representations, mask)
    with torch.no_grad(), _full_precision(rows.device.type):
        return compute(rows, present).to(representations.device)


def loss_floor(languages: int | Tensor, temperature: float = 0.2, scale: Scale = "top") -> Tensor:
    """The lowest value that the loss can take for a prompt in so many ``languages``.

    All rows on one line: ``s = (sqrt(L), 0, ..., 0)``, hence ``log(1 + (L - 1) exp(-t))`` with
    ``t = 1 / temperature`` (``scale="top"``) or ``sqrt(L) / temperature`` (``scale="none"``). It holds for
    D >= L; 0 for fewer than two languages.
    """
    count = torch.as_tensor(languages, dtype=torch.float64)
    top = count.sqrt() if scale == "none" else torch.ones_like(count)
    return torch.log1p((count - 1).clamp(min=0) * torch.exp(-top / temperature))


def _check(representations: Tensor, mask: Tensor | None, backend: str) -> None:
    if representations.dtype not in _DTYPES:
        raise TypeError(f"representations must be a floating-point tensor, got {representations.dtype}")
    if representations.dim() != 3:
        raise ValueError(
            f"representations must be (prompts, languages, features), got shape {tuple(representations.shape)}"
        )
    if representations.shape[2] == 0:
        raise ValueError("representations must have at least one feature, got shape (..., 0)")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, got {mask.dtype}")
        if mask.shape != representations.shape[:2]:
            raise ValueError(
                f"mask must be {tuple(representations.shape[:2])} as representations are, got {tuple(mask.shape)}"
            )
        if mask.device != representations.device:
            raise ValueError(f"mask is on {mask.device}, representations on {representations.device}")
    if backend not in ("auto", "closed_form", "reference"):
        raise ValueError(f"backend must be 'auto', 'closed_form' or 'reference', got {backend!r}")


def _full_precision(device_type: str) -> AbstractContextManager[Any]:
    """Autocast off, on devices that have it."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type=device_type, enabled=False)
    return nullcontext()


def _where_float64_exists(representations: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Both tensors, on the CPU if their device has no float64, with the mask made explicit."""
    if mask is None:
        mask = torch.ones(representations.shape[:2], dtype=torch.bool, device=representations.device)
    if representations.device.type == "mps":
        return representations.cpu(), mask.cpu()
    return representations, mask
