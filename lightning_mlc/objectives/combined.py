"""A weighted sum of objectives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_mlc.errors import UserError
from lightning_mlc.objectives.base import MeanOver, Objective, Responses, Scores, Term, check_positive

if TYPE_CHECKING:
    from lightning_mlc.data.records import DataKind


class Sum(Objective):
    """The weighted sum ``weights[0] * objectives[0] + weights[1] * objectives[1] + ...``.

    Each part is averaged as it is when used alone: DPO over examples, SFT over tokens. The rewards are those of the
    first part that implies rewards.

    Args:
        objectives: The parts.
        weights: One factor for each part. null: 1 for each.

    Raises:
        UserError: ``objectives`` is empty, the lengths differ, or a weight is not above 0.
    """

    mean_over: MeanOver = "examples"

    def __init__(self, objectives: list[Objective], weights: list[float] | None = None) -> None:
        if not objectives:
            raise UserError("model.objective.objectives", "is empty; give at least one objective")
        if weights is None:
            weights = [1.0] * len(objectives)
        if len(weights) != len(objectives):
            raise UserError(
                "model.objective.weights", f"{len(weights)} given for {len(objectives)} objectives; give one for each"
            )
        self.objectives = tuple(objectives)
        self.weights = tuple(check_positive("weights", weight) for weight in weights)
        self.needs_rejected = any(part.needs_rejected for part in objectives)
        self.needs_reference = any(part.needs_reference for part in objectives)
        self.needs_mismatched = any(part.needs_mismatched for part in objectives)
        self.accepts_unpaired = all(part.accepts_unpaired for part in objectives)

    def losses(self, responses: Responses) -> Tensor:
        """Compute the weighted sum of the parts' losses, where each example is averaged as a batch of one.

        The gradient of a step uses :meth:`terms` instead, which gives each token or response of the step the same
        weight.

        Args:
            responses: Scores of the responses of B examples.

        Returns:
            (B,) losses.
        """
        parts = zip(self.weights, self.objectives, strict=True)
        return torch.stack([weight * part.each_alone(responses) for weight, part in parts]).sum(0)

    def terms(self, responses: Responses) -> Sequence[Term]:
        return [
            Term(weight * term.losses, term.mean_over)
            for weight, part in zip(self.weights, self.objectives, strict=True)
            for term in part.terms(responses)
        ]

    def check_data(self, kind: DataKind, option: str = "model.objective") -> None:
        for index, part in enumerate(self.objectives):
            part.check_data(kind, f"{option}.objectives[{index}]")

    def rewards(self, scores: Scores) -> Tensor | None:
        found = (part.rewards(scores) for part in self.objectives)
        return next((rewards for rewards in found if rewards is not None), None)

    def metrics(self, responses: Responses) -> dict[str, Tensor]:
        """Return the values of all parts. If two parts use the same name, the first part wins."""
        found: dict[str, Tensor] = {}
        for part in self.objectives:
            found = part.metrics(responses) | found
        return found
