"""The operator's public functions (arXiv 2602.16660): argument checks, choice of a backend, reduction.

The checks look at types, dtypes and shapes, never at values: values are on the device, and reading one would
make the host wait.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from mlc_kernels import backends, closed_form, reference

Scale = Literal["top", "none"]
Reduction = Literal["mean", "sum", "none"]
Backend = Literal["auto", "triton", "closed_form", "reference"]

_SCALES = ("top", "none")
_REDUCTIONS = ("mean", "sum", "none")
_BACKENDS = ("auto", "triton", "closed_form", "reference")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def mlc_loss(
    representations: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 0.2,
    scale: Scale = "top",
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """Return the MLC loss of B prompts in up to L languages.

    Each row is scaled to unit length. With the singular values ``s_1 >= s_2 >= ...`` of a prompt's rows,
    ``loss = cross_entropy(s / (stopgrad(s_1) * temperature), target=0)``. The loss is lowest where all rows lie
    on one line (see :func:`loss_floor`).

    Args:
        representations: (B, L, D) float16, bfloat16, float32 or float64.
        mask: (B, L) bool, False where a translation is missing. The values there are ignored and get a zero
            gradient. A row of zeros counts as missing too. NaN or an infinity in a row that is not missing
            makes the loss and the gradient of its own prompt NaN, and of no other prompt.
        temperature: Temperature of the softmax over singular values.
        scale: ``top`` divides the singular values by the largest one (the authors' code), ``none`` does
            not (the paper's equation). No gradient flows through that division.
        reduction: ``mean`` over the prompts with two or more rows, ``sum``, or ``none`` for one loss per prompt.
            A prompt with fewer rows contributes 0. The mean over no prompts is 0.
        backend: ``triton`` (the fused kernel: CUDA or ROCm, up to 64 languages), ``closed_form`` (the same
            mathematics in PyTorch: float64 Gram matrix, explicit gradient), ``reference`` (the definition: SVD
            and autograd), or ``auto``: ``triton`` on a GPU that can run it, otherwise ``closed_form``, and the
            reason is logged once. Only ``reference`` can be differentiated twice.

    Returns:
        () or, for ``reduction="none"``, (B,); float32, but float64 for float64 input.

    Raises:
        TypeError: ``representations`` or ``mask`` is not a tensor, is a DTensor, or has the wrong dtype.
        ValueError: Another argument is invalid. Both messages start with the argument's name.
    """
    check_options(temperature, scale, reduction, backend)
    _check_tensors(representations, mask)
    chosen = backends.choose(backend, representations.device, representations.shape[1])
    if chosen == "triton":
        from mlc_kernels import fused  # Triton is loaded when it is first needed

        return fused.loss(representations, mask, None, float(temperature), scale == "top", reduction)
    compute = reference.prompt_losses if chosen == "reference" else closed_form.prompt_losses
    device = representations.device
    rows, present = _where_float64_exists(representations, mask)
    with _full_precision(rows.device.type):
        losses, counted = compute(rows, present, float(temperature), scale == "top")
        if reduction == "none":
            return losses.to(device)
        if reduction == "sum":
            return losses.sum().to(device)
        mean = losses.mean() if counted is None else losses.sum() / counted.sum().clamp(min=1)
        return mean.to(device)


def singular_values(
    representations: Tensor,
    mask: Tensor | None = None,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Return the singular values of each prompt's rows, after scaling each row to unit length.

    Not differentiable: this is for metrics and runs under ``no_grad``.

    Args:
        representations: (B, L, D), as in :func:`mlc_loss`.
        mask: (B, L) bool, as in :func:`mlc_loss`.
        backend: As in :func:`mlc_loss`.

    Returns:
        (B, L) float32 (float64 for float64 input), in descending order. The end is exactly 0 for missing rows,
        and where L exceeds D. Only ``reference`` can distinguish a value below 1e-8 from 0.

    Raises:
        TypeError, ValueError: As in :func:`mlc_loss`.
    """
    check_options(backend=backend)
    _check_tensors(representations, mask)
    chosen = backends.choose(backend, representations.device, representations.shape[1])
    if chosen == "triton":
        from mlc_kernels import fused

        return fused.values(representations.detach(), mask)
    compute = reference.values if chosen == "reference" else closed_form.values
    rows, present = _where_float64_exists(representations, mask)
    with torch.no_grad(), _full_precision(rows.device.type):
        return compute(rows, present).to(representations.device)


def loss_floor(languages: int | Tensor, temperature: float = 0.2, scale: Scale = "top") -> Tensor:
    """Return the lowest value that the loss can take for a prompt in ``languages`` languages.

    If all rows lie on one line, ``s = (sqrt(L), 0, ..., 0)``, and the loss is ``log(1 + (L - 1) exp(-t))`` with
    ``t = 1 / temperature`` (``scale="top"``) or ``sqrt(L) / temperature`` (``scale="none"``). This holds for
    D >= L. The floor is 0 for fewer than two languages.

    Args:
        languages: L, as a number or as a tensor of any shape.
        temperature: As in :func:`mlc_loss`.
        scale: As in :func:`mlc_loss`.

    Returns:
        A tensor of the shape and on the device of ``languages``, float64 (float32 on devices without float64).

    Raises:
        ValueError: ``temperature`` or ``scale`` is invalid.
    """
    check_options(temperature, scale)
    count = torch.as_tensor(languages)
    count = count.to(torch.float32 if count.device.type == "mps" else torch.float64)
    top = count.sqrt() if scale == "none" else torch.ones_like(count)
    return torch.log1p((count - 1).clamp(min=0) * torch.exp(-top / temperature))


def check_options(
    temperature: float = 0.2,
    scale: str = "top",
    reduction: str = "mean",
    backend: str = "auto",
) -> None:
    """Raise ValueError, with the argument's name, for a value that :func:`mlc_loss` does not accept."""
    # `not (0 < t)` and not `t <= 0`, so that NaN is refused too.
    if not (isinstance(temperature, int | float) and 0 < temperature < math.inf):
        raise ValueError(f"temperature must be a positive number, got {temperature!r}")
    _check_choice("scale", scale, _SCALES)
    _check_choice("reduction", reduction, _REDUCTIONS)
    _check_choice("backend", backend, _BACKENDS)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_tensors(representations: Tensor, mask: Tensor | None) -> None:
    check_is_tensor("representations", representations)
    if representations.dtype not in DTYPES:
        raise TypeError(f"representations must be a floating-point tensor, got {representations.dtype}")
    shape = tuple(representations.shape)
    if len(shape) != 3:
        raise ValueError(f"representations must be (prompts, languages, features), got shape {shape}")
    if shape[2] == 0:
        raise ValueError(f"representations must have at least one feature, got shape {shape}")
    if mask is not None:
        check_is_tensor("mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask must be bool, got {mask.dtype}")
        if tuple(mask.shape) != shape[:2]:
            raise ValueError(f"mask must be {shape[:2]} as representations are, got {tuple(mask.shape)}")
        if mask.device != representations.device:
            raise ValueError(f"mask is on {mask.device}, representations on {representations.device}")


def check_is_tensor(name: str, value: object) -> None:
    """Raise TypeError, with the argument's name, unless ``value`` is a tensor and not a DTensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if hasattr(value, "to_local"):
        raise TypeError(f"{name} must not be a DTensor: pass its .to_local() or .full_tensor()")


def _full_precision(device_type: str) -> AbstractContextManager[Any]:
    """A context without autocast."""
    # torch.compile (2.11) cannot trace this query. It need not: all devices that it compiles for have autocast.
    available = torch.compiler.is_compiling() or torch.amp.is_autocast_available(device_type)
    if available and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type=device_type, enabled=False)
    return nullcontext()


def _where_float64_exists(representations: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Both tensors, on the CPU if their device has no float64."""
    if representations.device.type == "mps":
        return representations.cpu(), None if mask is None else mask.cpu()
    return representations, mask
