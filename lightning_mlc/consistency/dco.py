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

    The reward of a response in one language is the reference's log-probability of its translation in another
    language. For each language,

        o = log ref(w) - log ref(l)
        r = log pi(w) - log pi(l) - o

    where

    - ``w`` and ``l`` are the chosen and the rejected response,
    - ``pi(y)`` and ``ref(y)`` are the probability of response ``y`` under the policy and under the reference,
    - ``o`` says how much more likely the reference finds ``w`` than ``l``,
    - ``r`` is what the policy adds to that difference.

    The best policy for languages i and j has ``r_i = (gamma_i / kl) o_j``, where ``kl`` is the strength of the KL
    penalty and ``gamma_i`` the weight of language i. Both languages then rank responses alike if
    ``gamma_i gamma_j = kl^2``. Like the authors' code, this one sets ``gamma_s = 1``, ``gamma_t = beta^2`` and
    ``kl = beta`` for the source language s and another language t, which gives the loss

        |r_s - o_t / beta| + |r_t - beta o_s|

    For two languages other than the source, ``beta`` is replaced by 1. The authors draw two languages for each
    example; here the losses of all pairs of languages of a prompt are averaged.

    The loss does not use which response was chosen. It makes languages agree, on the worse response too if the
    reference prefers that one.

    Args:
        weight: Factor of the loss. 0 turns the term off.
        rows: Rows of the data that the term compares: ``all``, those of kind ``ordinary``, or the others (``harmful``).
        beta: How much the source language counts compared with another one. Above 1 it moves less, and the others
            move more. The published value is 1, which treats all languages alike.
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
        # (B, L, L): the value that r of language i (rows) should have according to language j (columns).
        wanted = (influence / influence[:, None]) * offsets[:, None, :]
        distances = (margins[:, :, None] - wanted).abs()
        pairs = _pairs(observed.present)
        both = distances + distances.transpose(1, 2)
        return torch.where(pairs, both, 0.0).sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)

    def metrics(self, observed: Observed) -> dict[str, Tensor]:
        """Return ``agreement``: the share of a prompt's pairs of languages that prefer the same response."""
        prefers = _gaps(observed.policy) > 0
        pairs = _pairs(observed.present)
        agree = (prefers[:, :, None] == prefers[:, None, :]) & pairs
        return {"agreement": agree.sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)}


def _pairs(present: Tensor) -> Tensor:
    """(B, L, L) bool: each pair of languages i < j that the prompt exists in."""
    return (present[:, :, None] & present[:, None, :]).triu(1)


def _gaps(grid: Grid) -> Tensor:
    """(B, L): log-probability of the chosen response minus that of the rejected one."""
    return grid.scores(CHOSEN).logps - grid.scores(REJECTED).logps
