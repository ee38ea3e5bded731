"""Cosine distance from the source language."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_mlc.consistency.base import ConsistencyTerm, Needs, Observed
from lightning_mlc.metrics.cosines import pair_cosines


@dataclass(frozen=True)
class SourceCosine(ConsistencyTerm):
    """The mean over the translations t of a prompt of ``1 - cos(r_t, r_s)``, with s the source language.

    Args:
        weight: What the loss is multiplied by; 0 turns it off.
        detach_source: Take ``r_s`` as given. What is to be carried to the other languages is learned in the source
            language, by the objective; a source representation that is pulled too meets them half-way, and gives up
            some of what it has learned. False pulls both ends.
    """

    name: ClassVar[str] = "source_cosine"

    weight: float = 0.0
    detach_source: bool = True

    def __post_init__(self) -> None:
        self.check("weight", least=0)

    @property
    def needs(self) -> Needs:
        return Needs(representations=True)

    def losses(self, observed: Observed) -> Tensor:
        rows = observed.representations
        assert rows is not None
        if self.detach_source:
            rows = torch.where(observed.is_source[:, None], rows.detach(), rows)
        # In float64: near consistency little is left of 1 - cos.
        cosines, usable = pair_cosines(rows, observed.present)
        targets = usable & usable[:, observed.source, None] & ~observed.is_source
        distances = torch.where(targets, 1 - cosines[:, observed.source], 0.0).sum(1)
        return (distances / targets.sum(1).clamp(min=1)).to(torch.promote_types(rows.dtype, torch.float32))
