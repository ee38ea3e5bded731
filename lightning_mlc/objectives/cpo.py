"""Contrastive preference optimisation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lightning_mlc.objectives.base import MeanOver, Objective, Responses, Scores, check_not_negative, check_positive


class CPO(Objective):
    """Contrastive preference optimisation (arXiv 2401.08417, equations 3 and 5), averaged over examples.

    The loss of an example is ``-log sigmoid(beta * [log pi(w) - log pi(l)]) - alpha * log pi(w) / |w|``, where

    - ``w`` and ``l`` are the chosen and the rejected response,
    - ``pi(y)`` is the probability of response ``y`` under the policy,
    - ``|w|`` is the number of tokens of ``w``.

    The first term is DPO with a uniform reference. The second keeps the policy near good responses, which the
    reference does in DPO. The paper writes the second term as a sum over tokens with weight 1. The authors' code
    takes the mean over tokens, and so does this one.

    Args:
        beta: Factor of the difference between the two log-probabilities.
        alpha: Weight of the chosen response's mean negative log-likelihood. 0 turns this term off.

    Raises:
        UserError: ``beta`` is not above 0, or ``alpha`` is negative.
    """

    needs_rejected: bool = True
    needs_reference: bool = False
    mean_over: MeanOver = "examples"

    def __init__(self, beta: float = 0.1, alpha: float = 1.0) -> None:
        self.beta = check_positive("beta", beta)
        self.alpha = check_not_negative("alpha", alpha)

    def losses(self, responses: Responses) -> Tensor:
        chosen, rejected = responses.pairs
        preference = -F.logsigmoid(self.rewards(chosen) - self.rewards(rejected))
        return preference - self.alpha * chosen.mean_logps

    def rewards(self, scores: Scores) -> Tensor:
        """Return ``beta * log pi(y)``."""
        return self.beta * scores.logps

    def metrics(self, responses: Responses) -> dict[str, Tensor]:
        """Return ``nll_loss``: the chosen response's mean negative log-likelihood."""
        return {"nll_loss": -responses.chosen.mean_logps}
