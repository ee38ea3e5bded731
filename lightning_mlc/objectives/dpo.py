"""Direct preference optimisation, and the losses that others put in the place of its own."""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from lightning_mlc.errors import UserError
from lightning_mlc.objectives.base import MeanOver, Objective, Responses, Scores, check_not_negative, check_positive

Loss = Literal["sigmoid", "ipo", "hinge", "robust", "apo_zero", "apo_down"]


class DPO(Objective):
    """Direct preference optimisation (arXiv 2305.18290), averaged over examples.

    With the rewards ``r = beta * (log pi(y) - log ref(y))`` of both responses, their margin
    ``m = r(chosen) - r(rejected)``, ``s`` the sigmoid and ``e`` the label smoothing, ``loss`` is one of

    - ``sigmoid``: ``-log s(m)`` (equation 7). With label smoothing it is conservative DPO (Mitchell, "A note on
      DPO with noisy preferences", 2023, equation 3), ``-(1 - e) log s(m) - e log s(-m)``: the margin has an optimum.
    - ``robust``: ``(-(1 - e) log s(m) + e log s(-m)) / (1 - 2 e)`` (arXiv 2403.00409, section 3.1), whose expectation
      over labels flipped at the rate ``e`` is the ``sigmoid`` loss on the true ones. It may be negative.
    - ``hinge``: ``max(0, 1 - m)`` (SLiC, arXiv 2305.10425, in the form of arXiv 2309.06657).
    - ``ipo``: ``(m / beta - 1 / (2 beta))^2`` (arXiv 2310.12036, equation 17; ``beta`` is its tau), with
      log-probabilities *per token*. The paper has no sequences in its experiments and writes plain log-probabilities;
      summed ones would ask for the same margin of an answer of 5 tokens and one of 500. TRL averages too, and
      reports that the paper's authors do.
    - ``apo_zero``: ``1 - s(r(chosen)) + s(r(rejected))``, and
    - ``apo_down``: ``s(r(chosen)) + 1 - s(m)`` (arXiv 2408.06266, equations 7 and 8). Zero, for data better than the
      model, makes the chosen response likelier; down, for data worse than it, makes both less likely.

    ``rpo_alpha * -log pi(chosen) / tokens`` is added to any of them (RPO, arXiv 2404.19733).

    Args:
        beta: Strength of the pull towards the reference model; smaller lets the policy go further.
        loss: Which loss of the rewards.
        label_smoothing: Share of pairs whose preference is assumed to be the wrong way round, for ``sigmoid`` (may be
            0) and ``robust``.
        rpo_alpha: Weight of the chosen response's mean negative log-likelihood; 0 leaves it out.
    """

    needs_rejected: bool = True
    needs_reference: bool = True
    mean_over: MeanOver = "examples"

    def __init__(
        self, beta: float = 0.1, loss: Loss = "sigmoid", label_smoothing: float = 0.0, rpo_alpha: float = 0.0
    ) -> None:
        if loss not in get_args(Loss):
            raise UserError("model.objective.loss", f"there is no {loss}; choose one of {', '.join(get_args(Loss))}")
        if not 0 <= label_smoothing < 0.5:
            raise UserError("model.objective.label_smoothing", f"must be from 0 to below 0.5, got {label_smoothing}")
        if label_smoothing > 0 and loss not in ("sigmoid", "robust"):
            raise UserError(
                "model.objective.label_smoothing",
                f"means nothing to the loss {loss}; set it to 0, or model.objective.loss to sigmoid or robust",
            )
        if label_smoothing == 0 and loss == "robust":
            raise UserError(
                "model.objective.label_smoothing",
                "the loss robust needs the share of flipped preferences; "
                "set it above 0, or model.objective.loss to sigmoid",
            )
        self.beta = check_positive("beta", beta)
        self.loss = loss
        self.label_smoothing = label_smoothing
        self.rpo_alpha = check_not_negative("rpo_alpha", rpo_alpha)

    def losses(self, responses: Responses) -> Tensor:
        chosen, rejected = responses.pairs
        losses = self._of_rewards(self.rewards(chosen), self.rewards(rejected))
        if self.rpo_alpha > 0:
            losses = losses - self.rpo_alpha * chosen.mean_logps
        return losses

    def _of_rewards(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        margin = chosen - rejected
        smoothing = self.label_smoothing
        match self.loss:
            case "sigmoid":
                return -(1 - smoothing) * F.logsigmoid(margin) - smoothing * F.logsigmoid(-margin)
            case "robust":
                flipped = smoothing * F.logsigmoid(-margin)
                return (flipped - (1 - smoothing) * F.logsigmoid(margin)) / (1 - 2 * smoothing)
            case "hinge":
                return (1 - margin).relu()
            case "ipo":
                return ((margin - 0.5) / self.beta).square()
            case "apo_zero":
                return (-chosen).sigmoid() + rejected.sigmoid()
            case "apo_down":
                return chosen.sigmoid() + (-margin).sigmoid()

    def rewards(self, scores: Scores) -> Tensor:
        """``beta`` times the log-ratio to the reference: of the response, or per token for ``ipo``."""
        ratios = scores.log_ratios
        return self.beta * (ratios / scores.tokens.clamp(min=1) if self.loss == "ipo" else ratios)

    def metrics(self, responses: Responses) -> dict[str, Tensor]:
        return {"nll_loss": -responses.chosen.mean_logps} if self.rpo_alpha > 0 else {}
