"""The definition (arXiv 2602.16660): eager PyTorch, ``torch.linalg.svdvals`` and autograd through it.

float16, bfloat16 and float32 rows are computed in float32, float64 rows in float64. Do not compare another gradient
with this one in these cases:

- A singular value is exactly 0, because rows repeat or point in opposite directions. It has no gradient: autograd
  returns an arbitrary finite subgradient, from the singular vectors that LAPACK chose; the closed form returns the
  zero subgradient. The zeros that stand for missing rows do no harm: the softmax leaves them out.
- The two largest singular values are equal. Either may be the target, and the gradient depends on the choice.
- The rows are near rank one. A float32 SVD then loses digits: the relative error of the gradient is 4e-5 where the
  rows differ by 1e-2 of their length, and 4e-3 where they differ by 1e-4. Pass float64 rows to get the true gradient.
- A second derivative is needed. It exists only where no two singular values are equal and none is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def prompt_losses(
    representations: Tensor, mask: Tensor | None, temperature: float, divide_by_top: bool
) -> tuple[Tensor, Tensor]:
    """(B,) loss of each prompt, and (B,) whether the prompt counts: it needs two rows."""
    batch, languages, features = representations.shape
    present = _present(representations, mask)
    count = present.sum(1)
    counted = count >= 2
    # A prompt that does not count has no gradient, whatever its rows hold: they are treated as missing.
    unit = _unit_rows(representations, present & counted[:, None])
    if batch == 0 or languages == 0:
        return unit.sum((1, 2)), counted
    values = _singular_values(unit)
    top = values[:, :1]
    # A prompt without rows has s_1 = 0. Its loss is set to 0 below, so any divisor will do.
    safe_top = torch.where(top != 0, top, 1.0).detach()
    logits = values / (temperature * safe_top if divide_by_top else temperature)
    # A missing row adds a singular value of 0, which the softmax must leave out.
    positions = torch.arange(values.shape[1], device=unit.device)
    taken = positions < count.clamp(max=features)[:, None]
    taken = taken | (positions == 0)
    losses = logits.masked_fill(~taken, float("-inf")).logsumexp(1) - logits[:, 0]
    return torch.where(counted, losses, 0.0), counted


def values(representations: Tensor, mask: Tensor | None) -> Tensor:
    """(B, L) singular values of the unit rows, in descending order, with zeros at the end."""
    present = _present(representations, mask)
    found = _singular_values(_unit_rows(representations, present))
    # Beyond the number of rows the values are zeros up to rounding, about 1e-8 in float32.
    positions = torch.arange(found.shape[1], device=found.device)
    found = found.masked_fill(positions >= present.sum(1)[:, None], 0.0)
    return torch.nn.functional.pad(found, (0, representations.shape[1] - found.shape[1]))


def _present(representations: Tensor, mask: Tensor | None) -> Tensor:
    """(B, L) bool: whether the row exists and is not zero, so that it has a direction."""
    has_direction = (representations != 0).any(2)
    return has_direction if mask is None else mask & has_direction  # NaN != 0: NaN must reach the loss and not vanish


def _unit_rows(representations: Tensor, present: Tensor) -> Tensor:
    """Rows scaled to length 1; zeros where a row is missing."""
    wide = torch.float64 if representations.dtype == torch.float64 else torch.float32
    # `where`, not a product: a missing row may hold NaN. Ones, because their length is not 0.
    rows = torch.where(present[:, :, None], representations, 1.0).to(wide)
    rows = rows / rows.detach().abs().amax(2, keepdim=True)  # so that no square over- or underflows
    return torch.where(present[:, :, None], rows / rows.norm(dim=2, keepdim=True), 0.0)


def _singular_values(unit: Tensor) -> Tensor:
    """(B, min(L, D)) singular values; NaN for a prompt whose rows are not finite."""
    # LAPACK refuses a whole batch if one value is NaN. The product brings the NaN back, for the gradient too.
    finite = unit.isfinite().all(2).all(1)
    found: Tensor = torch.linalg.svdvals(torch.where(finite[:, None, None], unit, 0.0))
    return found + 0.0 * unit.sum((1, 2))[:, None]
