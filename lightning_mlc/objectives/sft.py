"""Supervised fine-tuning."""

from __future__ import annotations

from torch import Tensor

from lightning_mlc.objectives.base import MeanOver, Objective, Scores


class SFT(Objective):
    """Supervised fine-tuning: the negative log-likelihood of the response, averaged over its tokens.

    On preference data the chosen response is learned and, alone, the rejected one is not run.
    """

    needs_rejected: bool = False
    needs_reference: bool = False
    mean_over: MeanOver = "tokens"

    def losses(self, chosen: Scores, rejected: Scores | None) -> Tensor:
        return -chosen.logps
