"""Which of two responses is preferred."""

from __future__ import annotations

import torch
from torch import Tensor


def wins(margins: Tensor) -> Tensor:
    """1 where the chosen response is preferred, 0 where the rejected one is, a half on a tie, NaN for NaN.

    Before training the policy is its own reference and every margin is 0, which is chance.
    """
    return (torch.sign(margins) + 1) / 2
