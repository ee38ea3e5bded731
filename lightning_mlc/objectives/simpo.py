"""Simple preference optimisation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from lightning_mlc.objectives.base import MeanOver, Objective, Responses, Scores, check_not_negative, check_positive


class SimPO(Objective):
    """Simple preference optimisation (arXiv 2405.14734, equation 6), averaged over examples.

    The loss of an example is ``-log sigmoid(r(w) - r(l) - gamma)``, where

    - ``w`` and ``l`` are the chosen and the rejected response,
    - ``r(y) = beta * log pi(y) / |y|`` is the reward of response ``y``, ``|y|`` its number of tokens,
    - ``pi(y)`` is its probability under the policy.

    The reward is the mean log-probability, which generation maximises and which does not depend on the length. There
    is no reference.

    Args:
        beta: Factor of the reward. The paper uses 2.0 to 2.5.
        gamma: Margin that the chosen response's reward should have over the rejected one's. The paper uses 0.3 to
            1.6. If a recipe gives the ratio of gamma to beta, multiply it by ``beta``.

    Raises:
        UserError: ``beta`` is not above 0, or ``gamma`` is negative.
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
        """Return ``r(y)``."""
        return self.beta * scores.mean_logps
