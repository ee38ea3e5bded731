"""Multilingual reward gap optimisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_mlc.consistency.base import ConsistencyTerm, Needs, Observed
from lightning_mlc.data.rows import CHOSEN, REJECTED
from lightning_mlc.models.forward import Grid


@dataclass(frozen=True)
class MPO(ConsistencyTerm):
    """Multilingual reward gap optimisation (arXiv 2505.16869; code: circle-hit/MPO).

    The reward gap of a language is how much likelier the chosen response is than the rejected one, per token:
    ``RG = log pi(w) / |w| - log pi(l) / |l|``. The policy's gap in each target language t is drawn to the gap that
    the reference has in the source language s, and the policy is held where it is in the source language:

        mean over t of (beta * RG_t - RG_ref_s)^2  +  constraint * mean over y, H of (h(y) - h_ref(y))^2

    with ``h(y)`` the hidden state after the last layer and the final norm (H wide), averaged over the tokens of
    the source-language prompt and response y, which is the chosen or the rejected one. The authors train on one
    target language per example and average over examples; so are the targets here averaged within a prompt.

    It differs from the authors' code in one point: there the average of ``h`` takes in the padding, and so depends
    on what else is in the batch. The paper has neither DPO nor another objective beside it: that is
    ``model.objective: null`` and ``weight`` 1.

    Args:
        weight: What the loss is multiplied by; 0 turns it off.
        beta: Scale of the target languages' gap. Published: 1.5 for Qwen2.5 and Gemma 2, 1.0 for Llama 3.1. Above 1,
            the gap asked for is smaller than the source language's.
        constraint: Weight of the representation constraint; published is 1, and 0 leaves it out.
    """

    name: ClassVar[str] = "mpo"

    weight: float = 0.0
    beta: float = 1.0
    constraint: float = 1.0

    def __post_init__(self) -> None:
        self.check("weight", least=0)
        self.check("beta", least=0.01)
        self.check("constraint", least=0)

    @property
    def needs(self) -> Needs:
        return Needs(responses=True, reference=True, pooled_states=self.constraint > 0)

    def losses(self, observed: Observed) -> Tensor:
        losses = self._gap(observed)
        if self.constraint > 0:
            losses = losses + self.constraint * self._constraint(observed)
        return losses

    def metrics(self, observed: Observed) -> dict[str, Tensor]:
        parts = {"gap": self._gap(observed)}
        return parts | ({"constraint": self._constraint(observed)} if self.constraint > 0 else {})

    def _gap(self, observed: Observed) -> Tensor:
        """(B,) mean squared difference of reward gaps."""
        assert observed.reference is not None
        wanted = _reward_gaps(observed.reference)[:, observed.source, None]
        targets = observed.present & ~observed.is_source
        squares = (self.beta * _reward_gaps(observed.policy) - wanted).square()
        return torch.where(targets, squares, 0.0).sum(1) / targets.sum(1).clamp(min=1)

    def _constraint(self, observed: Observed) -> Tensor:
        """(B,) mean squared distance of pooled states."""
        assert observed.reference is not None
        ours, theirs = observed.policy.pooled, observed.reference.pooled
        assert ours is not None
        assert theirs is not None
        return torch.where(observed.is_group, (ours - theirs).square().mean((1, 2)), 0.0)


def _reward_gaps(grid: Grid) -> Tensor:
    """(B, L) log-probability per token of the chosen response, less that of the rejected one."""
    return grid.scores(CHOSEN).mean_logps - grid.scores(REJECTED).mean_logps
