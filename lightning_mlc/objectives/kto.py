"""Kahneman-Tversky optimisation."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_mlc.errors import UserError
from lightning_mlc.objectives.base import MeanOver, Objective, Responses, Scores, check_positive

Loss = Literal["kto", "apo_zero_unpaired"]


class KTO(Objective):
    """Kahneman-Tversky optimisation (arXiv 2402.01306), averaged over responses.

    Every response counts for itself, so a prompt may have one that is desirable, one that is undesirable, or both.
    With the rewards ``r = beta * (log pi(y) - log ref(y))``, ``s`` the sigmoid and ``z`` as below, the loss of a

    - desirable response is ``desirable_weight * (1 - s(r - z))``, and of an
    - undesirable one ``undesirable_weight * (1 - s(z - r))`` (equation 8 of the current version; the weights are its
      lambdas).

    ``z = beta * max(0, KL)`` is the point that gains and losses are told by. The divergence of the policy from the
    reference is estimated by the mean log-ratio ``log pi(y') - log ref(y')`` of *mismatched* responses ``y'``, which
    answer another prompt than they are given; no gradient flows through it. Each example has one, chosen once for
    the whole data set (:func:`lightning_mlc.data.mismatches.mismatches`; in the paper it is the next one's of the
    micro-batch). The mean is over the examples of the micro-batches that run at the same time on all processes, each
    example with the same weight. So, alone among the objectives, this one depends on how a step is cut: 4 x 1
    (examples per micro-batch x accumulation) averages four log-ratios where 1 x 4 has one. In evaluation each
    example's estimate is its own.

    ``apo_zero_unpaired`` is the same with ``z = 0``, and so without mismatched responses: APO-zero
    (arXiv 2408.06266), response by response.

    Where there are many more responses of one kind, its weight should be smaller: with n responses of a kind the
    paper advises ``desirable_weight * n_desirable / (undesirable_weight * n_undesirable)`` from 1 to 3/2.

    Args:
        beta: Strength of the pull towards the reference model; smaller lets the policy go further.
        loss: ``kto`` or ``apo_zero_unpaired``.
        desirable_weight: Factor of the losses of desirable (chosen) responses.
        undesirable_weight: Factor of the losses of undesirable (rejected) responses.
    """

    needs_rejected: bool = True
    needs_reference: bool = True
    accepts_unpaired: bool = True
    mean_over: MeanOver = "responses"

    def __init__(
        self, beta: float = 0.1, loss: Loss = "kto", desirable_weight: float = 1.0, undesirable_weight: float = 1.0
    ) -> None:
        if loss not in get_args(Loss):
            raise UserError("model.objective.loss", f"there is no {loss}; choose one of {', '.join(get_args(Loss))}")
        self.beta = check_positive("beta", beta)
        self.loss = loss
        self.desirable_weight = check_positive("desirable_weight", desirable_weight)
        self.undesirable_weight = check_positive("undesirable_weight", undesirable_weight)
        self.needs_mismatched = loss == "kto"

    def losses(self, responses: Responses) -> Tensor:
        if responses.mismatched is None:
            return self._against(responses, torch.zeros_like(responses.chosen.logps))
        return self._against(responses, mean_of_all_processes(responses.mismatched.log_ratios.detach()))

    def each_alone(self, responses: Responses) -> Tensor:
        if responses.mismatched is None:
            return super().each_alone(responses)
        return self._mean_of_each(self._against(responses, responses.mismatched.log_ratios.detach()), responses)

    def _against(self, responses: Responses, divergence: Tensor) -> Tensor:
        """(B,) losses with ``divergence``, () or (B,), from the reference before it is clamped."""
        chosen, rejected = responses.pairs
        point = self.beta * divergence.clamp(min=0)
        desirable = self.desirable_weight * (point - self.rewards(chosen)).sigmoid()
        undesirable = self.undesirable_weight * (self.rewards(rejected) - point).sigmoid()
        return desirable * chosen.present + undesirable * rejected.present

    def rewards(self, scores: Scores) -> Tensor:
        """``beta`` times the log-ratio of the response to the reference."""
        return self.beta * scores.log_ratios

    def metrics(self, responses: Responses) -> dict[str, Tensor]:
        """``kl``: the mismatched log-ratios, whose mean over the step estimates the divergence; may be negative."""
        return {} if responses.mismatched is None else {"kl": responses.mismatched.log_ratios}


def mean_of_all_processes(values: Tensor) -> Tensor:
    """() mean of ``values`` (B,) of all processes together, where each may have another B.

    Of examples that several processes run, all run equally many, so that none weighs more (see `DataParallel`).
    """
    totals = torch.stack([values.sum(), values.new_tensor(float(values.numel()))])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(totals)
    return totals[0] / totals[1]
