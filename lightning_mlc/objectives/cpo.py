"""Contrastive preference optimisation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lightning_mlc.objectives.base import MeanOver, Objective, Responses, Scores, check_not_negative, check_positive


class CPO(Objective):
    """Contrastive preference optimisation (arXiv 2401.08417, equations 3 and 5), averaged over examples.

    ``-log sigmoid(beta * [log pi(chosen) - log pi(rejected)]) - alpha * log pi(chosen) / tokens``: DPO with a uniform
    reference, and a likelihood term in its place that keeps the policy near good responses. The paper writes that
    term as a sum over tokens with weight 1; its authors' code takes the mean, as here.

    Args:
        beta: Scale of the log-ratio between the two responses.
        alpha: Weight of the chosen response's mean negative log-likelihood; 0 leaves it out.
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
        """``beta`` times the log-probability of the response."""
        return self.beta * scores.logps

    def metrics(self, responses: Responses) -> dict[str, Tensor]:
        return {"nll_loss": -responses.chosen.mean_logps}
