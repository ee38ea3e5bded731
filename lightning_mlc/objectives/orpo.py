"""Odds-ratio preference optimisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mlc.objectives.base import MeanOver, Objective, Responses, Scores, check_positive


class ORPO(Objective):
    """Odds-ratio preference optimisation (arXiv 2403.07691, equations 6 and 7), averaged over examples.

    The loss of an example is ``-log P(w) - beta * log sigmoid(log odds(w) - log odds(l))``, where

    - ``w`` and ``l`` are the chosen and the rejected response,
    - ``log P(y)`` is the mean log-probability of the tokens of response ``y`` under the policy,
    - ``odds(y) = P(y) / (1 - P(y))``.

    It learns the response and the preference at the same time, from a base model and without a reference.

    Args:
        beta: Weight of the odds-ratio term, the paper's lambda. The paper uses 0.1 for Mistral, 0.2 for Llama-2 and
            0.25 for Phi-2.

    Raises:
        UserError: ``beta`` is not above 0.
    """

    needs_rejected: bool = True
    needs_reference: bool = False
    mean_over: MeanOver = "examples"

    def __init__(self, beta: float = 0.1) -> None:
        self.beta = check_positive("beta", beta)

    def losses(self, responses: Responses) -> Tensor:
        chosen, rejected = responses.pairs
        return -chosen.mean_logps - self.beta * F.logsigmoid(_log_odds_ratio(chosen, rejected))

    def rewards(self, scores: Scores) -> Tensor:
        """Return ``beta * log P(y)``."""
        return self.beta * scores.mean_logps

    def metrics(self, responses: Responses) -> dict[str, Tensor]:
        """Return the two parts of the loss and the odds ratio, under TRL's names.

        - ``nll_loss``: ``-log P(w)``,
        - ``log_odds_chosen``: ``log odds(w) - log odds(l)``,
        - ``log_odds_ratio``: the log-sigmoid of ``log_odds_chosen``.
        """
        chosen, rejected = responses.pairs
        ratio = _log_odds_ratio(chosen, rejected)
        return {
            "nll_loss": -chosen.mean_logps,
            "log_odds_ratio": F.logsigmoid(ratio),
            "log_odds_chosen": ratio,
        }


def _log_odds_ratio(chosen: Scores, rejected: Scores) -> Tensor:
    return _log_odds(chosen.mean_logps) - _log_odds(rejected.mean_logps)


def _log_odds(logp: Tensor) -> Tensor:
    # A certain response (P = 1) has infinite odds. Clamp P to the value just below 1; there the gradient is 0.
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    # For P near 1, 1 - P would round to 0; expm1 does not.
    return logp - torch.log(-torch.expm1(logp))
