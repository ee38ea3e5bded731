"""Simple preference optimisation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lightning_mlc.objectives.base import MeanOver, Objective, Responses, Scores, check_not_negative, check_positive


class SimPO(Objective):
    """Simple preference optimisation (arXiv 2405.14734, equation 6), averaged over examples.

    ``-log sigmoid(r(chosen) - r(rejected) - gamma)`` with the reward ``r = beta * log pi(y) / tokens``: what
    generation maximises, and independent of length. No reference.

    Args:
        beta: Scale of the reward; the paper has 2.0 to 2.5.
        gamma: Margin by which the chosen response's reward should be larger; the paper has 0.3 to 1.6. Where a
            recipe gives a ratio of gamma to beta, this is the ratio times ``beta``.
    """

    needs_rejected: bool = True
    needs_reference: bool = False
    mean_over: MeanOver = "examples"

    def __init__(self, beta: float = 2.0, gamma: float = 1.0) -> None:
        self.beta = check_positive("beta", beta)
        self.gamma = check_not_negative("gamma", gamma)

    def losses(self, responses: Responses) -> Tensor:
        chosen, rejected = responses.pairs
        return -F.logsigmoid(self.rewards(chosen) - self.rewards(rejected) - self.gamma)

    def rewards(self, scores: Scores) -> Tensor:
        """``beta`` times the mean log-probability of the response's tokens."""
        return self.beta * scores.mean_logps
