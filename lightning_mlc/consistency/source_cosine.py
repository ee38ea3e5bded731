"""Cosine distance from the source language."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_mlc.consistency.base import ConsistencyTerm, Needs, Observed
from lightning_mlc.consistency.measures import pair_cosines


@dataclass(frozen=True)
class SourceCosine(ConsistencyTerm):
    """The mean of ``1 - cos(r_t, r_s)`` over the translations t of a prompt.

    ``r_t`` (D,) is the prompt's representation in language t, and ``s`` is the source language.

    Args:
        weight: Factor of the loss. 0 turns the term off.
        rows: Rows of the data that the term compares: ``all``, those of kind ``ordinary``, or the others (``harmful``).
        detach_source: Whether ``r_s`` is a fixed target, without a gradient. The objective teaches the source
            language, and the other languages should follow it. With false, ``r_s`` also moves towards the other
            languages, and the source language loses some of what it has learned.
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
        # In float64: if cos is near 1, 1 - cos keeps few digits.
        cosines, usable = pair_cosines(rows, observed.present)
        targets = usable & usable[:, observed.source, None] & ~observed.is_source
        distances = torch.where(targets, 1 - cosines[:, observed.source], 0.0).sum(1)
        return (distances / targets.sum(1).clamp(min=1)).to(torch.promote_types(rows.dtype, torch.float32))
