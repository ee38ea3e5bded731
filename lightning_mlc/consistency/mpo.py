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

    It pulls the policy's reward gap in each target language towards the reference's gap in the source language, and
    keeps the policy's hidden states in the source language where they were. The loss of a prompt is

        mean over t of (beta * RG_t - RG_ref_s)^2  +  constraint * mean over y, H of (h(y) - h_ref(y))^2

    where

    - ``s`` is the source language, ``t`` each other language of the prompt,
    - ``RG = log pi(w) / |w| - log pi(l) / |l|`` is the policy's reward gap in a language, ``RG_ref`` the reference's,
    - ``w`` and ``l`` are the chosen and the rejected response, ``|w|`` and ``|l|`` their numbers of tokens,
    - ``pi(y)`` is the probability of response ``y`` under the policy,
    - ``h(y)`` (H,) is the policy's hidden state after the last layer and the final norm, averaged over the tokens of
      the prompt and response ``y`` (``w`` or ``l``) in the source language; ``h_ref(y)`` is the reference's.

    The authors train on one target language per example and average over examples; here the targets of a prompt are
    averaged. One point differs from the authors' code: there the average of ``h`` includes padding, and so depends on
    the rest of the batch. The paper uses no objective in addition: set ``model.objective: null`` and ``weight`` 1.

    Args:
        weight: Factor of the loss. 0 turns the term off.
        rows: Rows of the data that the term compares: ``all``, those of kind ``ordinary``, or the others (``harmful``).
        beta: Factor of the target languages' gap. Published: 1.5 for Qwen2.5 and Gemma 2, 1.0 for Llama 3.1. Above 1,
            the target languages' gap should become smaller than the source language's.
        constraint: Weight of the second part. The published value is 1; 0 turns this part off.
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
        """Return the two parts of the loss: ``gap`` and, if it is on, ``constraint``, without their weights."""
        parts = {"gap": self._gap(observed)}
        return parts | ({"constraint": self._constraint(observed)} if self.constraint > 0 else {})

    def _gap(self, observed: Observed) -> Tensor:
        """(B,): mean squared difference of reward gaps."""
        assert observed.reference is not None
        wanted = _reward_gaps(observed.reference)[:, observed.source, None]
        targets = observed.present & ~observed.is_source
        squares = (self.beta * _reward_gaps(observed.policy) - wanted).square()
        return torch.where(targets, squares, 0.0).sum(1) / targets.sum(1).clamp(min=1)

    def _constraint(self, observed: Observed) -> Tensor:
        """(B,): mean squared distance between the averaged hidden states of policy and reference."""
        assert observed.reference is not None
        ours, theirs = observed.policy.pooled, observed.reference.pooled
        assert ours is not None
        assert theirs is not None
        return torch.where(observed.is_group, (ours - theirs).square().mean((1, 2)), 0.0)


def _reward_gaps(grid: Grid) -> Tensor:
    """(B, L): log-probability per token of the chosen response minus that of the rejected one."""
    return grid.scores(CHOSEN).mean_logps - grid.scores(REJECTED).mean_logps
