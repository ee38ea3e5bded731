"""Direct preference optimisation."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from lightning_mlc.errors import UserError
from lightning_mlc.objectives.base import Objective, Scores


class DPO(Objective):
    """Direct preference optimisation (arXiv 2305.18290, equation 7).

    ``-log sigmoid(beta * [(log pi(chosen) - log ref(chosen)) - (log pi(rejected) - log ref(rejected))])``,
    averaged over examples.

    Args:
        beta: Strength of the pull towards the reference model; smaller lets the policy go further.
    """

    needs_rejected: ClassVar[bool] = True
    needs_reference: ClassVar[bool] = True
    mean_over: ClassVar[Literal["examples", "tokens"]] = "examples"

    def __init__(self, beta: float = 0.1) -> None:
        if not beta > 0:
            raise UserError(f"model.objective.beta: must be above 0, got {beta}")
        self.beta = beta

    def losses(self, chosen: Scores, rejected: Scores | None) -> Tensor:
        assert rejected is not None
        return -F.logsigmoid(self.rewards(chosen) - self.rewards(rejected))

    def rewards(self, scores: Scores) -> Tensor:
        assert scores.reference_logps is not None
        return self.beta * (scores.logps - scores.reference_logps)
