"""Multi-lingual consistency: the published term."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_mlc.consistency.base import ConsistencyTerm, Needs, Observed
from lightning_mlc.consistency.measures import collinearity
from mlc_kernels import mlc_loss


@dataclass(frozen=True)
class MLC(ConsistencyTerm):
    """The multi-lingual consistency loss (arXiv 2602.16660), which pulls representations towards one line.

    The loss of a prompt is ``-log softmax(s / (stopgrad(s_1) * temperature))_1``, where

    - ``s_1 >= s_2 >= ... >= s_L`` are the singular values of ``Z``,
    - ``Z`` (L, D) has the prompt's representation in each of its L languages as rows, each scaled to unit length,
    - ``stopgrad`` lets no gradient through.

    It is lowest, but not 0, if all rows of Z lie on one line (rank one).

    Args:
        weight: Factor of the loss. 0 turns the term off.
        rows: Rows of the data that the term compares: ``all``, those of kind ``ordinary``, or the others (``harmful``).
        temperature: Temperature of the softmax over the singular values, from 0.01 to 100.
        scale: ``top`` divides the singular values by the largest one, as the authors' code does. ``none`` does not
            (it leaves out ``stopgrad(s_1)``), as in the paper's equation.
    """

    name: ClassVar[str] = "mlc"

    weight: float = 0.8
    temperature: float = 0.2
    scale: Literal["top", "none"] = "top"

    def __post_init__(self) -> None:
        self.check("weight", least=0)
        self.check("temperature", least=0.01, most=100)

    @property
    def needs(self) -> Needs:
        return Needs(representations=True)

    def losses(self, observed: Observed) -> Tensor:
        assert observed.representations is not None
        return mlc_loss(
            observed.representations,
            observed.present,
            temperature=self.temperature,
            scale=self.scale,
            reduction="none",
        )

    def metrics(self, observed: Observed) -> dict[str, Tensor]:
        """Return the collinearity of the representations and, as ``raw/...``, of the hidden states themselves."""
        assert observed.representations is not None
        assert observed.policy.states is not None
        metrics = {}
        for prefix, rows in (("", observed.representations), ("raw/", observed.policy.states)):
            found = collinearity(rows.detach(), observed.present, self.temperature, self.scale)
            for name in ("excess", "explained_variance", "min_cosine"):
                metrics[prefix + name] = torch.where(found["valid"], found[name], 0.0)
        del metrics["raw/excess"]  # the loss is computed after the extractor
        return metrics
