"""The definition: eager PyTorch, ``torch.linalg.svdvals`` and autograd through it.

Where a singular value is exactly 0 (rows that repeat, or point opposite ways) it has no gradient, and
autograd takes an arbitrary subgradient; the closed form takes the zero one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def prompt_losses(
    representations: Tensor, mask: Tensor, temperature: float, divide_by_top: bool
) -> tuple[Tensor, Tensor]:
    """(B,) loss of each prompt, and whether it has the two rows it takes to count."""
    unit, count = _unit_rows(representations, mask)
    batch, languages, features = unit.shape
    if batch == 0 or languages == 0:
        return unit.sum((1, 2)), torch.zeros(batch, dtype=torch.bool, device=unit.device)
    values = torch.linalg.svdvals(unit)
    top = values[:, :1]
    # A prompt without rows has s_1 = 0, and no loss either way.
    safe_top = torch.where(top > 0, top, 1.0).detach()
    logits = values / (temperature * safe_top if divide_by_top else temperature)
    # A missing row adds a singular value of 0, which is no part of the softmax.
    positions = torch.arange(values.shape[1], device=unit.device)
    taken = positions < count.clamp(max=features)[:, None]
    taken = taken | (positions == 0)
    losses = logits.masked_fill(~taken, float("-inf")).logsumexp(1) - logits[:, 0]
    counted = count >= 2
    return torch.where(counted, losses, 0.0), counted


def values(representations: Tensor, mask: Tensor) -> Tensor:
    """(B, L) singular values of the unit rows, descending."""
    unit, _ = _unit_rows(representations, mask)
    found = torch.linalg.svdvals(unit)
    missing = unit.shape[1] - found.shape[1]
    return torch.nn.functional.pad(found, (0, missing))


def _unit_rows(representations: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of length 1 (0 where missing), and (B,) how many there are."""
    wide = torch.float64 if representations.dtype == torch.float64 else torch.float32
    # `where`, not a product: a missing row may hold NaN.
    rows = torch.where(mask[:, :, None], representations, 0.0).to(wide)
    largest = rows.detach().abs().amax(2, keepdim=True)
    present = largest != 0
    rows = rows / torch.where(present, largest, 1.0)  # so that no square over- or underflows
    norms = torch.where(present, rows, 1.0).norm(dim=2, keepdim=True)
    return torch.where(present, rows / norms, 0.0), present.sum((1, 2))
