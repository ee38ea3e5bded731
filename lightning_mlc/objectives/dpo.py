"""Direct preference optimisation, and variants of its loss."""

from __future__ import annotations

from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor

from lightning_mlc.errors import UserError
from lightning_mlc.objectives.base import MeanOver, Objective, Responses, Scores, check_not_negative, check_positive

Loss = Literal["sigmoid", "ipo", "hinge", "robust", "apo_zero", "apo_down"]


class DPO(Objective):
    """Direct preference optimisation (arXiv 2305.18290), averaged over examples.

    Symbols:

    - ``w`` and ``l``: the chosen and the rejected response; ``|w|``: the number of tokens of ``w``;
    - ``pi(y)`` and ``ref(y)``: the probability of response ``y`` under the policy and under the reference;
    - ``r(y) = beta * (log pi(y) - log ref(y))``: the reward of ``y``;
    - ``m = r(w) - r(l)``: the reward margin;
    - ``s``: the sigmoid;
    - ``e``: ``label_smoothing``.

    The losses:

    - ``sigmoid``: ``-log s(m)`` (equation 7). With label smoothing it is conservative DPO,
      ``-(1 - e) log s(m) - e log s(-m)`` (Mitchell, "A note on DPO with noisy preferences", 2023, equation 3), which
      is lowest at a finite margin.
    - ``robust``: ``(-(1 - e) log s(m) + e log s(-m)) / (1 - 2 e)`` (arXiv 2403.00409, section 3.1). If a share ``e``
      of the labels is flipped, its expected value is the ``sigmoid`` loss on the true labels. It can be negative.
    - ``hinge``: ``max(0, 1 - m)`` (SLiC, arXiv 2305.10425, in the form of arXiv 2309.06657).
    - ``ipo``: ``(m / beta - 1 / (2 beta))^2`` (arXiv 2310.12036, equation 17; ``beta`` is the paper's tau), with
      log-probabilities *per token*. The paper's experiments have no sequences, and it writes plain
      log-probabilities. Sums over tokens would ask for the same margin between answers of 5 tokens and of 500. TRL
      averages too, and reports that the paper's authors do.
    - ``apo_zero``: ``1 - s(r(w)) + s(r(l))`` (arXiv 2408.06266, equation 7). For data that is better than the model:
      it makes the chosen response more likely.
    - ``apo_down``: ``s(r(w)) + 1 - s(m)`` (arXiv 2408.06266, equation 8). For data that is worse than the model: it
      makes both responses less likely.

    ``-rpo_alpha * log pi(w) / |w|`` is added to each of them (RPO, arXiv 2404.19733).

    Args:
        beta: Strength of the pull towards the reference model. A smaller value lets the policy move further away.
        loss: Name of the loss.
        label_smoothing: Assumed share of pairs whose labels are swapped, from 0 to below 0.5. Only for ``sigmoid``
            and ``robust``; must be above 0 for ``robust``.
        rpo_alpha: Weight of the chosen response's mean negative log-likelihood. 0 turns this term off.

    Raises:
        UserError: An argument is out of range, or ``label_smoothing`` does not suit ``loss``.
    """

    needs_rejected: bool = True
    needs_reference: bool = True
    mean_over: MeanOver = "examples"

    def __init__(
        self, beta: float = 0.1, loss: Loss = "sigmoid", label_smoothing: float = 0.0, rpo_alpha: float = 0.0
    ) -> None:
        if loss not in get_args(Loss):
            raise UserError("model.objective.loss", f"unknown loss '{loss}'; choose one of {', '.join(get_args(Loss))}")
        if not 0 <= label_smoothing < 0.5:
            raise UserError("model.objective.label_smoothing", f"must be from 0 to below 0.5, got {label_smoothing}")
        if label_smoothing > 0 and loss not in ("sigmoid", "robust"):
            raise UserError(
                "model.objective.label_smoothing",
                f"has no effect on the loss {loss}; set it to 0, or model.objective.loss to sigmoid or robust",
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
        losses = self._preference_losses(self.rewards(chosen), self.rewards(rejected))
        if self.rpo_alpha > 0:
            losses = losses - self.rpo_alpha * chosen.mean_logps
        return losses

    def _preference_losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """(B,) losses of the rewards (B,) of chosen and rejected responses."""
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
        """Return ``r(y)``; for ``ipo`` divided by the number of tokens."""
        ratios = scores.log_ratios
        return self.beta * (ratios / scores.tokens.clamp(min=1) if self.loss == "ipo" else ratios)

    def metrics(self, responses: Responses) -> dict[str, Tensor]:
        """Return ``nll_loss``, the chosen response's mean negative log-likelihood, if ``rpo_alpha`` is above 0."""
        return {"nll_loss": -responses.chosen.mean_logps} if self.rpo_alpha > 0 else {}
