"""Multi-lingual consistency: the published term."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_mlc.consistency.base import ConsistencyTerm, Needs, Observed
from lightning_mlc.metrics.collinearity import collinearity
from mlc_kernels import mlc_loss


@dataclass(frozen=True)
class MLC(ConsistencyTerm):
    """The multi-lingual consistency loss (arXiv 2602.16660), which pulls representations towards one line.

    With Z the matrix of a prompt's representations in L languages, each of unit length, and its singular values
    ``s_1 >= s_2 >= ...``, the loss is ``cross_entropy(s / (stopgrad(s_1) * temperature), target = 0)``. It is
    lowest, though not 0, where Z has rank one.

    Args:
        weight: What the loss is multiplied by; 0 turns it off.
        temperature: Temperature of the softmax over singular values.
        scale: ``top`` divides the singular values by the largest one, as the authors' code does; ``none``
            does not, as in the paper's equation.
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
        """Collinearity of the representations and, as ``raw/...``, of the hidden states themselves."""
        assert observed.representations is not None
        assert observed.policy.states is not None
        metrics = {}
        for prefix, rows in (("", observed.representations), ("raw/", observed.policy.states)):
            found = collinearity(rows.detach(), observed.present, self.temperature, self.scale)
            for name in ("excess", "explained_variance", "min_cosine"):
                metrics[prefix + name] = torch.where(found["valid"], found[name], 0.0)
        del metrics["raw/excess"]  # what the extractor is for
        return metrics
