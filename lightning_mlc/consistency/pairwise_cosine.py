"""Cosine distance between each two languages: the plain baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_mlc.consistency.base import ConsistencyTerm, Needs, Observed
from lightning_mlc.metrics.cosines import pair_cosines


@dataclass(frozen=True)
class PairwiseCosine(ConsistencyTerm):
    """The mean over each two languages i < j of a prompt of ``1 - cos(r_i, r_j)``.

    It is 0 where all representations r point the same way, and unlike MLC tells opposite directions from equal
    ones. It equals the variance of the representations brought to unit length: the sum of their squared distances
    from their mean, divided by L - 1. A representation of zeros has no direction and counts as missing.

    Args:
        weight: What the loss is multiplied by; 0 turns it off.
    """

    name: ClassVar[str] = "pairwise_cosine"

    weight: float = 0.0

    def __post_init__(self) -> None:
        self.check("weight", least=0)

    @property
    def needs(self) -> Needs:
        return Needs(representations=True)

    def losses(self, observed: Observed) -> Tensor:
        rows = observed.representations
        assert rows is not None
        # In float64: near consistency little is left of 1 - cos.
        cosines, usable = pair_cosines(rows, observed.present)
        pairs = (usable[:, :, None] & usable[:, None, :]).triu(1)
        distances = torch.where(pairs, 1 - cosines, 0.0).sum((1, 2))
        return (distances / pairs.sum((1, 2)).clamp(min=1)).to(torch.promote_types(rows.dtype, torch.float32))
