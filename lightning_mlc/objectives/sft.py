"""Supervised fine-tuning."""

from __future__ import annotations

from torch import Tensor

from lightning_mlc.objectives.base import MeanOver, Objective, Responses


class SFT(Objective):
    """Supervised fine-tuning: the negative log-likelihood of the response, averaged over its tokens.

    On preference data the chosen response is learned and, alone, the rejected one is not run. Of responses with a
    label the desirable ones are learned, and the other examples add nothing.
    """

    needs_rejected: bool = False
    needs_reference: bool = False
    accepts_unpaired: bool = True
    mean_over: MeanOver = "tokens"

    def losses(self, responses: Responses) -> Tensor:
        return -responses.chosen.logps
