"""Keeps the model near the reference on ordinary prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_mlc.consistency.base import ConsistencyTerm, Needs, Observed, Rows
from lightning_mlc.consistency.divergence import divergences
from lightning_mlc.consistency.measures import unit_rows, widen


@dataclass(frozen=True)
class Retain(ConsistencyTerm):
    """Keeps the model at the end of ordinary prompts near the reference, in every language.

    The loss of a prompt is the mean over its languages of

    - ``squared``: ``|h - h_ref|^2 / |h_ref|^2``,
    - ``cosine``: ``1 - cos(h, h_ref)``, which leaves the length free,
    - ``kl``: ``KL(p_ref || p)``, which ignores whatever has no influence on the next token,

    where ``h`` and ``h_ref`` (H,) are the hidden states of policy and reference after layer
    ``model.consistency.layer`` at the last token of the prompt, and ``p`` and ``p_ref`` (V,) are their distributions of
    the next token there, the first of the response, over the whole vocabulary. After the last layer (-1) the
    distribution follows from the state, so it is kept, too, as long as the head does not change. ``kl`` keeps it
    also if the head changes, and does not depend on the layer.

    Extractor and running mean have no part in it: it is about the model.

    Args:
        weight: Factor of the loss. 0 turns the term off.
        rows: Rows of the data that the term keeps: those of kind ``ordinary``, the others (``harmful``), or ``all``.
        distance: What is compared: ``squared`` is the distance of hidden states, relative to their length; ``cosine``
            ignores their length; ``kl`` compares the distributions of the first token of the response.
    """

    name: ClassVar[str] = "retain"

    weight: float = 0.0
    distance: Literal["squared", "cosine", "kl"] = "squared"
    rows: Rows = field(default="ordinary", kw_only=True)

    def __post_init__(self) -> None:
        self.check("weight", least=0)

    @property
    def needs(self) -> Needs:
        if self.distance == "kl":
            return Needs(reference=True, positions=1, reference_positions=1)
        return Needs(representations=True, reference=True, reference_states=True)

    def losses(self, observed: Observed) -> Tensor:
        # A prompt that exists in one language is in no mean, as in every term.
        there = observed.present & observed.is_group[:, None]
        distances = self._of_distributions(observed) if self.distance == "kl" else self._of_states(observed, there)
        return torch.where(there, distances, 0.0).sum(1) / there.sum(1).clamp(min=1)

    def _of_distributions(self, observed: Observed) -> Tensor:
        """(B, L): divergences at the ends of the prompts. What a prompt that is missing has is not used."""
        assert observed.reference is not None
        ours, theirs = observed.policy.next_tokens, observed.reference.next_tokens
        assert ours is not None
        assert theirs is not None
        table = ours.table[:, :, 0]
        taught_by = theirs.table[:, :, 0].clamp(min=0).flatten()
        student = ours.logits.index_select(0, table.clamp(min=0).flatten())
        return divergences(theirs.logits, taught_by, student).view_as(table)

    def _of_states(self, observed: Observed, there: Tensor) -> Tensor:
        """(B, L): distances of the hidden states of the prompts that are ``there`` (B, L)."""
        ours = observed.policy.states
        assert ours is not None
        assert observed.reference is not None
        assert observed.reference.states is not None
        theirs = observed.reference.states
        if self.distance == "cosine":
            unit, other = unit_rows(ours, there)[0], unit_rows(theirs, there)[0]
            # Half the squared distance of unit vectors: near 0 it has more digits than 1 minus the cosine.
            distances = (unit - other).square().sum(2) / 2
        else:
            wanted = widen(torch.where(there[:, :, None], theirs, 1.0))
            distances = (widen(torch.where(there[:, :, None], ours, 1.0)) - wanted).square().sum(2)
            distances = distances / wanted.square().sum(2)
        return distances.to(torch.promote_types(ours.dtype, torch.float32))
