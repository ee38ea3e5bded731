"""A weighted sum of objectives."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_mlc.errors import UserError
from lightning_mlc.objectives.base import MeanOver, Objective, Scores, Term, check_positive


class Sum(Objective):
    """``sum_i weights[i] * objectives[i]``, each averaged as it is on its own: DPO over examples, SFT over tokens.

    Rewards are those of the first objective that has any.

    Args:
        objectives: The parts.
        weights: One factor for each part; null takes 1 for all.
    """

    mean_over: MeanOver = "examples"

    def __init__(self, objectives: list[Objective], weights: list[float] | None = None) -> None:
        if not objectives:
            raise UserError("model.objective.objectives: is empty; give at least one objective")
        if weights is None:
            weights = [1.0] * len(objectives)
        if len(weights) != len(objectives):
            raise UserError(
                f"model.objective.weights: {len(weights)} given for {len(objectives)} objectives; give one for each"
            )
        self.objectives = tuple(objectives)
        self.weights = tuple(check_positive("weights", weight) for weight in weights)
        self.needs_rejected = any(part.needs_rejected for part in objectives)
        self.needs_reference = any(part.needs_reference for part in objectives)

    def losses(self, chosen: Scores, rejected: Scores | None) -> Tensor:
        """(B,) loss of each example, with the parts that are averaged over tokens averaged over its own.

        For the gradient of a step see :meth:`terms`, which weighs every token of the step alike.
        """
        parts = zip(self.weights, self.objectives, strict=True)
        return torch.stack([weight * part.each_alone(chosen, rejected) for weight, part in parts]).sum(0)

    def terms(self, chosen: Scores, rejected: Scores | None) -> Sequence[Term]:
        return [
            Term(weight * term.losses, term.mean_over)
            for weight, part in zip(self.weights, self.objectives, strict=True)
            for term in part.terms(chosen, rejected)
        ]

    def rewards(self, scores: Scores) -> Tensor | None:
        found = (part.rewards(scores) for part in self.objectives)
        return next((rewards for rewards in found if rewards is not None), None)

    def metrics(self, chosen: Scores, rejected: Scores | None) -> dict[str, Tensor]:
        """Those of all parts; of two by the same name the first part's."""
        found: dict[str, Tensor] = {}
        for part in self.objectives:
            found = part.metrics(chosen, rejected) | found
        return found
