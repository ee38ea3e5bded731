"""The loss from a layer's token states: pooling, an optional linear extractor, and the loss."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mlc_kernels import backends
from mlc_kernels import pooling as plain
from mlc_kernels.functional import DTYPES, Backend, Reduction, Scale, check_is_tensor, check_options, mlc_loss

Pooling = Literal["last", "mean"]
_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def mlc_loss_from_hidden(
    hidden: Tensor,
    group: Tensor,
    language: Tensor,
    prompts: int,
    languages: int,
    *,
    attention_mask: Tensor | None = None,
    offsets: Tensor | None = None,
    pooling: Pooling = "last",
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 0.2,
    scale: Scale = "top",
    reduction: Reduction = "mean",
    backend: Backend = "auto",
) -> Tensor:
    """Return the MLC loss of ``prompts`` prompts in up to ``languages`` languages, from the states of their tokens.

    The N rows come in any order, and a prompt need not have a row in every language: ``group`` and ``language``
    say which translation a row is. A row whose ids are out of range is ignored. If several rows have the same ids,
    the last one counts. Neither is an error, because the host would have to wait for the device to detect it.
    A row without tokens counts as missing.

    Args:
        hidden: (N, T, H) padded on either side, or (tokens, H) packed, one row after the other. float16,
            bfloat16, float32 or float64.
        group: (N,) int64, index of the prompt that each row is a translation of: 0 to ``prompts - 1``.
        language: (N,) int64, index of the row's language: 0 to ``languages - 1``.
        prompts: B. A Python number, as is ``languages``, so that nothing waits for the device.
        languages: L.
        attention_mask: (N, T) bool or integer, 0 for padding, whose states are ignored. For padded states
            only. None: every token counts.
        offsets: (N + 1,) int32 or int64: row n has the tokens ``offsets[n]`` to ``offsets[n + 1] - 1``. Needed if
            ``hidden`` is packed.
        pooling: ``last`` takes each row's last token, ``mean`` the mean over its tokens, which is summed in float64
            and returned as float32 (float64 for float64 states).
        weight: (D, H): weight of a linear extractor, applied to the pooled rows in the weight's dtype. This is
            PyTorch's matrix product, to which autocast applies.
        bias: (D,), only with a weight.
        temperature, scale, reduction, backend: As in :func:`~mlc_kernels.functional.mlc_loss`.

    Returns:
        () or (B,), float32; float64 if ``weight`` is float64, or, without a weight, if ``hidden`` is.

    Raises:
        TypeError: An argument is not a tensor, is a DTensor, or has the wrong dtype.
        ValueError: Another argument is invalid. Both messages start with the argument's name.
    """
    check_options(temperature, scale, reduction, backend)
    _check(hidden, group, language, prompts, languages, attention_mask, offsets, pooling, weight, bias)
    chosen = backends.choose(backend, hidden.device, languages)
    # Nothing is computed between the tokens and the loss, so the loss reads them, and writes their gradients, in place.
    direct = pooling == "last" and weight is None
    find, pool = plain.table, plain.pool
    if chosen == "triton":
        from mlc_kernels import fused, fused_pooling  # Triton is loaded when it is first needed

        find, pool = fused_pooling.table, fused_pooling.pool
    table = find(hidden, attention_mask, offsets, group, language, prompts, languages, direct)
    rows = hidden.reshape(-1, hidden.shape[-1]) if direct else pool(hidden, attention_mask, offsets, pooling == "mean")
    if weight is not None:
        rows = torch.nn.functional.linear(rows.to(weight.dtype), weight, bias)
    if chosen == "triton":
        return fused.loss(rows, None, table, float(temperature), scale == "top", reduction)
    if len(rows) == 0:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, 1))  # missing translations need a row to point to
    return mlc_loss(
        rows[table.clamp(min=0)],
        table >= 0,
        temperature=temperature,
        scale=scale,
        reduction=reduction,
        backend="reference" if chosen == "reference" else "closed_form",
    )


def _check(
    hidden: Tensor,
    group: Tensor,
    language: Tensor,
    prompts: int,
    languages: int,
    attention_mask: Tensor | None,
    offsets: Tensor | None,
    pooling: str,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    if pooling not in ("last", "mean"):
        raise ValueError(f"pooling must be one of 'last', 'mean', got {pooling!r}")
    if prompts < 0:
        raise ValueError(f"prompts must be 0 or more, got {prompts}")
    if languages < 0:
        raise ValueError(f"languages must be 0 or more, got {languages}")
    _check_tensor("hidden", hidden, DTYPES, None, hidden)
    shape = tuple(hidden.shape)
    if offsets is None:
        if len(shape) != 3:
            raise ValueError(f"hidden must be (rows, tokens, features), or packed with offsets, got shape {shape}")
        if attention_mask is not None:
            _check_tensor("attention_mask", attention_mask, _INTEGERS, shape[:2], hidden)
        rows = shape[0]
    else:
        _check_tensor("offsets", offsets, (torch.int32, torch.int64), None, hidden)
        if offsets.dim() != 1 or len(offsets) == 0:
            raise ValueError(f"offsets must be (rows + 1,), got shape {tuple(offsets.shape)}")
        if len(shape) != 2:
            raise ValueError(f"hidden must be (tokens, features) with offsets, got shape {shape}")
        if attention_mask is not None:
            raise ValueError("attention_mask is for padded states, and offsets for packed ones: pass one of them")
        rows = len(offsets) - 1
    if shape[-1] == 0:
        raise ValueError(f"hidden must have at least one feature, got shape {shape}")
    _check_tensor("group", group, (torch.int64,), (rows,), hidden)
    _check_tensor("language", language, (torch.int64,), (rows,), hidden)
    if weight is not None:
        _check_tensor("weight", weight, DTYPES, None, hidden)
        if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != shape[-1]:
            raise ValueError(f"weight must be (features out, {shape[-1]}), got shape {tuple(weight.shape)}")
        if bias is not None:
            _check_tensor("bias", bias, (weight.dtype,), tuple(weight.shape[:1]), hidden)
    elif bias is not None:
        raise ValueError("bias needs a weight")


def _check_tensor(
    name: str, value: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...] | None, hidden: Tensor
) -> None:
    check_is_tensor(name, value)
    if value.dtype not in dtypes:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be one of {wanted}, got {value.dtype}")
    if shape is not None and tuple(value.shape) != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(value.shape)}")
    if value.device != hidden.device:
        raise ValueError(f"{name} is on {value.device}, hidden on {hidden.device}")
