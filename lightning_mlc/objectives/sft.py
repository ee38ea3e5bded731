"""Supervised fine-tuning."""

from __future__ import annotations

from torch import Tensor

from lightning_mlc.objectives.base import MeanOver, Objective, Responses


class SFT(Objective):
    """Supervised fine-tuning: ``-log pi(y)`` of the response ``y`` under the policy ``pi``, averaged over tokens.

    On preference data it learns the chosen response; the rejected one is not run unless something else needs it. On
    responses with a label it learns the desirable ones; the other examples add nothing.
    """

    needs_rejected: bool = False
    needs_reference: bool = False
    accepts_unpaired: bool = True
    mean_over: MeanOver = "tokens"

    def losses(self, responses: Responses) -> Tensor:
        return -responses.chosen.logps
