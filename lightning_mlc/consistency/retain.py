"""Keeps ordinary prompts where they were."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_mlc.consistency.base import ConsistencyTerm, Needs, Observed, Rows
from lightning_mlc.consistency.measures import unit_rows, widen


@dataclass(frozen=True)
class Retain(ConsistencyTerm):
    """Keeps the hidden states at the end of ordinary prompts near the reference's, in every language.

    The loss of a prompt is the mean over its languages of

    - ``squared``: ``|h - h_ref|^2 / |h_ref|^2``,
    - ``cosine``: ``1 - cos(h, h_ref)``, which leaves the length free,

    where ``h`` and ``h_ref`` (H,) are the hidden states of policy and reference after layer
    ``model.consistency.layer`` at the last token of the prompt. After the last layer (-1) the distribution of the first
    token of the response follows from that state, so it is kept, too, as long as the head does not move.

    Extractor and running mean have no part in it: it is about the model.

    Args:
        weight: Factor of the loss. 0 turns the term off.
        rows: Rows of the data that the term keeps: those of kind ``ordinary``, the others (``harmful``), or ``all``.
        distance: How far a state has moved: ``squared``, relative to its length, or ``cosine``, which leaves that free.
    """

    name: ClassVar[str] = "retain"

    weight: float = 0.0
    distance: Literal["squared", "cosine"] = "squared"
    rows: Rows = field(default="ordinary", kw_only=True)

    def __post_init__(self) -> None:
        self.check("weight", least=0)

    @property
    def needs(self) -> Needs:
        return Needs(representations=True, reference=True, reference_states=True)

    def losses(self, observed: Observed) -> Tensor:
        ours = observed.policy.states
        assert ours is not None
        assert observed.reference is not None
        assert observed.reference.states is not None
        # A prompt that exists in one language is in no mean, as in every term.
        there = observed.present & observed.is_group[:, None]
        theirs = observed.reference.states
        if self.distance == "cosine":
            unit, other = unit_rows(ours, there)[0], unit_rows(theirs, there)[0]
            # Half the squared distance of unit vectors: near 0 it has more digits than 1 minus the cosine.
            distances = (unit - other).square().sum(2) / 2
        else:
            wanted = widen(torch.where(there[:, :, None], theirs, 1.0))
            distances = (widen(torch.where(there[:, :, None], ours, 1.0)) - wanted).square().sum(2)
            distances = distances / wanted.square().sum(2)
        losses = torch.where(there, distances, 0.0).sum(1) / there.sum(1).clamp(min=1)
        return losses.to(torch.promote_types(ours.dtype, torch.float32))
