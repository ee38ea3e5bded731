"""Supervised fine-tuning."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from lightning_mlc.objectives.base import Objective, Scores


class SFT(Objective):
    """Supervised fine-tuning: the negative log-likelihood of the response, averaged over its tokens.

    On preference data the chosen response is learned and the rejected one is not run.
    """

    needs_rejected: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    mean_over: ClassVar[Literal["examples", "tokens"]] = "tokens"

    def losses(self, chosen: Scores, rejected: Scores | None) -> Tensor:
        return -chosen.logps
