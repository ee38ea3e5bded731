"""Odds-ratio preference optimisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mlc.objectives.base import MeanOver, Objective, Responses, Scores, check_positive


class ORPO(Objective):
    """Odds-ratio preference optimisation (arXiv 2403.07691, equations 6 and 7), averaged over examples.

    ``-log P(chosen) - beta * log sigmoid(log odds(chosen) - log odds(rejected))``, where ``log P`` is the mean
    log-probability of the response's tokens and ``odds = P / (1 - P)``. It learns the response and the preference
    at once, from a base model and without a reference.

    Args:
        beta: Weight of the odds-ratio term; the paper's lambda, there 0.1 for Mistral, 0.2 for Llama-2 and 0.25 for
            Phi-2.
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
        """``beta`` times the mean log-probability of the response's tokens."""
        return self.beta * scores.mean_logps

    def metrics(self, responses: Responses) -> dict[str, Tensor]:
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
    # A certain response has infinite odds: it counts as one that rounding just tells from certain, and moves no more.
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    # 1 - P would round to 0 for a P near 1; expm1 does not.
    return logp - torch.log(-torch.expm1(logp))
