"""The definition (arXiv 2602.16660): eager PyTorch, ``torch.linalg.svdvals`` and autograd through it.

float16 and bfloat16 rows are computed in float32, float64 ones in float64. Where this autograd is not to be
compared with:

- A singular value of exactly 0 (rows that repeat, or point opposite ways) has no gradient. Autograd takes
  whichever singular vectors LAPACK returned, a finite but arbitrary subgradient; the closed form takes the
  zero one. The surplus zeros of missing rows are no such case: they are outside of the softmax.
- If the two largest singular values are equal, either may be the target, and the gradient depends on it.
- Near rank one a float32 SVD loses digits: 4e-5 relative error of the gradient where the rows differ by
  1e-2 of their length, 4e-3 at 1e-4. Pass float64 rows to use it as the truth.
- A second derivative exists only where no two singular values are equal and none is 0.
"""

from __future__ import annotations

import torch
from torch import Tensor


def prompt_losses(
    representations: Tensor, mask: Tensor | None, temperature: float, divide_by_top: bool
) -> tuple[Tensor, Tensor]:
    """(B,) loss of each prompt, and whether it has the two rows it takes to count."""
    batch, languages, features = representations.shape
    present = _present(representations, mask)
    count = present.sum(1)
    counted = count >= 2
    # A prompt that does not count has no gradient, whatever stands in it: its rows go as missing.
    unit = _unit_rows(representations, present & counted[:, None])
    if batch == 0 or languages == 0:
        return unit.sum((1, 2)), counted
    values = _singular_values(unit)
    top = values[:, :1]
    # A prompt without rows has s_1 = 0, and no loss either way.
    safe_top = torch.where(top != 0, top, 1.0).detach()
    logits = values / (temperature * safe_top if divide_by_top else temperature)
    # A missing row adds a singular value of 0, which is no part of the softmax.
    positions = torch.arange(values.shape[1], device=unit.device)
    taken = positions < count.clamp(max=features)[:, None]
    taken = taken | (positions == 0)
    losses = logits.masked_fill(~taken, float("-inf")).logsumexp(1) - logits[:, 0]
    return torch.where(counted, losses, 0.0), counted


def values(representations: Tensor, mask: Tensor | None) -> Tensor:
    """(B, L) singular values of the unit rows, descending, zeros at the end."""
    present = _present(representations, mask)
    found = _singular_values(_unit_rows(representations, present))
    # Past the rank there is rounding of 0, of 1e-8 in float32.
    positions = torch.arange(found.shape[1], device=found.device)
    found = found.masked_fill(positions >= present.sum(1)[:, None], 0.0)
    return torch.nn.functional.pad(found, (0, representations.shape[1] - found.shape[1]))


def _present(representations: Tensor, mask: Tensor | None) -> Tensor:
    """(B, L) where there is a row with a direction."""
    has_direction = (representations != 0).any(2)
    return has_direction if mask is None else mask & has_direction  # NaN != 0: it must reach the loss and not vanish


def _unit_rows(representations: Tensor, present: Tensor) -> Tensor:
    """Rows of length 1 (0 where missing)."""
    wide = torch.float64 if representations.dtype == torch.float64 else torch.float32
    # `where`, not a product: a missing row may hold NaN. Ones, because they have a length to divide by.
    rows = torch.where(present[:, :, None], representations, 1.0).to(wide)
    rows = rows / rows.detach().abs().amax(2, keepdim=True)  # so that no square over- or underflows
    return torch.where(present[:, :, None], rows / rows.norm(dim=2, keepdim=True), 0.0)


def _singular_values(unit: Tensor) -> Tensor:
    """(B, min(L, D)), NaN for a prompt whose rows are not finite."""
    # LAPACK refuses a whole batch for one NaN in it. The product brings the NaN back, and its gradient.
    finite = unit.isfinite().all(2).all(1)
    found: Tensor = torch.linalg.svdvals(torch.where(finite[:, None, None], unit, 0.0))
    return found + 0.0 * unit.sum((1, 2))[:, None]
