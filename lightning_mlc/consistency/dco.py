"""Direct consistency optimisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_mlc.consistency.base import ConsistencyTerm, Needs, Observed
from lightning_mlc.data.rows import CHOSEN, REJECTED
from lightning_mlc.models.forward import Grid


@dataclass(frozen=True)
class DCO(ConsistencyTerm):
    """Direct consistency optimisation (arXiv 2603.04678; code: Betswish/ConsistencyRL).

    The reward of a response in one language is how likely the reference holds its translation in another. Under it
    the best policy has ``r_i = (gamma_i / kl) o_j``, where ``o`` is by how much the reference holds the first of two
    responses for likelier than the second, and ``r`` by how much more than that the policy does:

        o = log ref(w) - log ref(l),   r = log pi(w) - log pi(l) - o

    and two languages then rank responses alike if ``gamma_1 gamma_2 = kl^2``. As in the authors' code, which has 1 and
    ``beta^2`` for the gammas and ``beta`` for the strength of the KL penalty, the loss of the source language s and
    another one t is

        |r_s - o_t / beta| + |r_t - beta o_s|

    and that of two languages other than the source the same with 1 in the place of ``beta``. The authors draw two
    languages for each example; here the losses of each two languages of a prompt are averaged.

    Nothing in it knows which response was chosen: it makes languages agree, on the worse response too where the
    reference prefers that one.

    Args:
        weight: What the loss is multiplied by; 0 turns it off.
        beta: How much the source language counts beside another one. Above 1 it moves less, and moves the others
            more; 1, the published value, treats all languages alike.
    """

    name: ClassVar[str] = "dco"

    weight: float = 0.0
    beta: float = 1.0

    def __post_init__(self) -> None:
        self.check("weight", least=0)
        self.check("beta", least=0.01)

    @property
    def needs(self) -> Needs:
        return Needs(responses=True, reference=True, reference_translations=True)

    def losses(self, observed: Observed) -> Tensor:
        assert observed.reference is not None
        offsets = _gaps(observed.reference)
        margins = _gaps(observed.policy) - offsets
        influence = 1 + (self.beta - 1) * observed.is_source.to(offsets.dtype)
        # (B, L, L): what language i, in the rows, should take over from j.
        wanted = (influence / influence[:, None]) * offsets[:, None, :]
        distances = (margins[:, :, None] - wanted).abs()
        pairs = _pairs(observed.present)
        both = distances + distances.transpose(1, 2)
        return torch.where(pairs, both, 0.0).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)

    def metrics(self, observed: Observed) -> dict[str, Tensor]:
        prefers = _gaps(observed.policy) > 0
        pairs = _pairs(observed.present)
        agree = (prefers[:, :, None] == prefers[:, None, :]) & pairs
        return {"agreement": agree.sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)}


def _pairs(present: Tensor) -> Tensor:
    """(B, L, L) bool, each two languages that are both there, once."""
    return (present[:, :, None] & present[:, None, :]).triu(1)


def _gaps(grid: Grid) -> Tensor:
    """(B, L) log-probability of the chosen response, less that of the rejected one."""
    return grid.scores(CHOSEN).logps - grid.scores(REJECTED).logps
