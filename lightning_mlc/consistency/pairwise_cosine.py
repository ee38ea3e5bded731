"""Cosine distance between each pair of languages: the plain baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_mlc.consistency.base import ConsistencyTerm, Needs, Observed
from lightning_mlc.consistency.measures import pair_cosines


@dataclass(frozen=True)
class PairwiseCosine(ConsistencyTerm):
    """The mean of ``1 - cos(r_i, r_j)`` over all pairs of languages i < j of a prompt.

    ``r_i`` (D,) is the prompt's representation in language i. The loss is 0 if all representations have the same
    direction. Unlike MLC it distinguishes opposite directions from equal ones. It equals the variance of the
    representations scaled to unit length: the sum of their squared distances from their mean, divided by L - 1, where
    L is the number of languages. A representation of zeros has no direction and counts as missing.

    Args:
        weight: Factor of the loss. 0 turns the term off.
        rows: Rows of the data that the term compares: ``all``, those of kind ``ordinary``, or the others (``harmful``).
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
        # In float64: if cos is near 1, 1 - cos keeps few digits.
        cosines, usable = pair_cosines(rows, observed.present)
        pairs = (usable[:, :, None] & usable[:, None, :]).triu(1)
        distances = torch.where(pairs, 1 - cosines, 0.0).sum((1, 2))
        return (distances / pairs.sum((1, 2)).clamp(min=1)).to(torch.promote_types(rows.dtype, torch.float32))
