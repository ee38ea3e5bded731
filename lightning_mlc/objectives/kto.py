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

    Each response has a loss of its own, so a prompt may have a desirable response, an undesirable one, or both:

    - desirable: ``desirable_weight * (1 - s(r - z))``,
    - undesirable: ``undesirable_weight * (1 - s(z - r))``

    (equation 8 of the paper's current version; the weights are its lambdas), where

    - ``r = beta * (log pi(y) - log ref(y))`` is the reward of response ``y``,
    - ``pi(y)`` and ``ref(y)`` are its probability under the policy and under the reference,
    - ``s`` is the sigmoid,
    - ``z = beta * max(0, KL)`` is the reference point that separates gains from losses,
    - ``KL`` is an estimate of the divergence of the policy from the reference.

    ``KL`` is the mean of ``log pi(y') - log ref(y')`` over *mismatched* responses ``y'``, which answer another prompt
    than the one they are scored with. No gradient flows through it. Each example has one mismatched response, chosen
    once for the whole data set (:func:`lightning_mlc.data.mismatches.mismatches`); in the paper it is the response of
    the next example in the micro-batch. The mean runs over the examples of the micro-batches that all processes
    compute at the same time, each with the same weight. Therefore this is the only objective whose value depends on
    how a step is cut: with 4 x 1 (examples per micro-batch x accumulation) the mean is over four log-ratios, with
    1 x 4 over one. In evaluation each example uses its own estimate.

    ``apo_zero_unpaired`` sets ``z = 0`` and needs no mismatched responses: APO-zero (arXiv 2408.06266) for single
    responses.

    If the data has many more responses of one kind, give that kind a smaller weight. The paper advises a ratio
    ``desirable_weight * n_desirable / (undesirable_weight * n_undesirable)`` from 1 to 3/2, where ``n`` counts the
    responses of a kind.

    Args:
        beta: Strength of the pull towards the reference model. A smaller value lets the policy move further away.
        loss: ``kto`` or ``apo_zero_unpaired``.
        desirable_weight: Factor of the losses of desirable (chosen) responses.
        undesirable_weight: Factor of the losses of undesirable (rejected) responses.

    Raises:
        UserError: ``loss`` is unknown, or a number is not above 0.
    """

    needs_rejected: bool = True
    needs_reference: bool = True
    accepts_unpaired: bool = True
    mean_over: MeanOver = "responses"

    def __init__(
        self, beta: float = 0.1, loss: Loss = "kto", desirable_weight: float = 1.0, undesirable_weight: float = 1.0
    ) -> None:
        if loss not in get_args(Loss):
            raise UserError("model.objective.loss", f"unknown loss '{loss}'; choose one of {', '.join(get_args(Loss))}")
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
        """(B,) losses for the estimate ``divergence`` of KL, () or (B,), which may be negative."""
        chosen, rejected = responses.pairs
        point = self.beta * divergence.clamp(min=0)
        desirable = self.desirable_weight * (point - self.rewards(chosen)).sigmoid()
        undesirable = self.undesirable_weight * (self.rewards(rejected) - point).sigmoid()
        return desirable * chosen.present + undesirable * rejected.present

    def rewards(self, scores: Scores) -> Tensor:
        """Return ``r``."""
        return self.beta * scores.log_ratios

    def metrics(self, responses: Responses) -> dict[str, Tensor]:
        """Return ``kl``: the log-ratios of mismatched responses. Their mean estimates KL and may be negative."""
        return {} if responses.mismatched is None else {"kl": responses.mismatched.log_ratios}


def mean_of_all_processes(values: Tensor) -> Tensor:
    """Compute the mean of the values of all processes.

    Where several processes run the same examples, all examples run on the same number of processes, so each keeps
    the same weight (see :class:`~lightning_mlc.processes.DataParallel`).

    Args:
        values: (B,) values of this process. B may differ between processes.

    Returns:
        () the mean, the same on every process.
    """
    totals = torch.stack([values.sum(), values.new_full((), values.numel())])
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(totals)
    return totals[0] / totals[1]
