"""The losses of a training step: the objective's and the consistency terms', each divided by the step's totals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_mlc.consistency import Consistency, ConsistencyTerm, Needs, Observed, Representation
from lightning_mlc.consistency.collapse import sums_of_step
from lightning_mlc.data.batches import Batch
from lightning_mlc.data.row_plan import RowPlan
from lightning_mlc.errors import UserError
from lightning_mlc.metrics.preference import wins
from lightning_mlc.models.forward import Grid
from lightning_mlc.objectives import Objective, Responses, Scores


class StepLoss(NamedTuple):
    """A loss of a micro-batch."""

    loss: Tensor
    """() float, its share of the optimizer step's mean."""
    metrics: dict[str, Tensor]
    """() values to log, by name, divided in the same way; or sums over prompts, see
    :func:`~lightning_mlc.consistency.collapse.prompt_sums`."""


@dataclass(frozen=True)
class Losses:
    """An objective together with consistency terms.

    Args:
        objective: Learns from the responses in the source language; None trains on ``consistency`` alone.
        consistency: The consistency terms.

    Raises:
        UserError: On some steps, or on all, nothing would be trained.
    """

    objective: Objective | None
    consistency: Consistency

    def __post_init__(self) -> None:
        if self.objective is not None:
            return
        if not self.consistency.terms:
            raise UserError(
                "model.objective", "is null, and no term of model.consistency is on: there is nothing to train"
            )
        if self.consistency.every_n_steps > 1:
            raise UserError(
                "model.consistency.every_n_steps",
                "the steps between would train nothing, because model.objective is null; set it to 1, or give an "
                "objective",
            )

    @property
    def needs_rejected(self) -> bool:
        """Whether rejected responses are scored."""
        return self.consistency.needs.responses or (self.objective is not None and self.objective.needs_rejected)

    @property
    def needs_mismatched(self) -> bool:
        """Whether responses to other prompts are scored."""
        return self.objective is not None and self.objective.needs_mismatched

    def needs_reference(self, needs: Needs) -> bool:
        """Whether the objective, or terms with these ``needs``, compare the policy with a reference."""
        return needs.reference or (self.objective is not None and self.objective.needs_reference)

    @property
    def row_plan(self) -> RowPlan:
        """Which rows a step has to run."""
        in_all, in_source = self.consistency.needs.responses, self.objective is not None
        return RowPlan(
            rejected=self.needs_rejected,
            responses_in="all" if in_all else "source" if in_source else "none",
            translations=bool(self.consistency.terms),
            mismatched=self.needs_mismatched,
            positions=self.consistency.needs.positions,
        )

    def responses(self, grid: Grid, reference: Grid | None, language: int) -> Responses:
        """Scores (B,) of the responses in one language, of the kinds that are compared."""
        return grid.responses(reference, language, self.needs_rejected, self.needs_mismatched)

    def rewards(self, scores: Scores) -> Tensor:
        """The objective's rewards; without an objective that has any, the mean log-probability per token."""
        rewards = None if self.objective is None else self.objective.rewards(scores)
        return scores.mean_logps if rewards is None else rewards

    def of_objective(self, batch: Batch, grid: Grid, reference: Grid | None) -> StepLoss:
        """The objective's loss, with log-probabilities and rewards to log.

        Args:
            batch: The micro-batch of B examples.
            grid: Results of the policy.
            reference: Results of the reference model; None if none is needed.
        """
        loss = torch.zeros((), device=batch.keys.device)
        metrics: dict[str, Tensor] = {}
        if not batch.responses:
            return StepLoss(loss, metrics)
        responses = self.responses(grid, reference, batch.source)
        totals = batch.normalizers
        if self.objective is not None:
            total = {
                "examples": totals.examples,
                "responses": totals.responses,
                "tokens": totals.response_tokens or 1.0,  # a step may have no desirable response: the sum is then 0
            }
            terms = self.objective.terms(responses)
            loss = torch.stack([term.losses.sum() / total[term.mean_over] for term in terms]).sum()
            metrics["objective/loss"] = loss
            for name, values in self.objective.metrics(responses).items():
                metrics[name] = values.sum() / totals.examples
        return StepLoss(loss, metrics | self._response_metrics(batch, responses))

    def _response_metrics(self, batch: Batch, responses: Responses) -> dict[str, Tensor]:
        """Log-probabilities, rewards, margins and accuracies of the responses in the source language."""
        totals = batch.normalizers
        metrics: dict[str, Tensor] = {}
        for name, scores, count in (
            ("chosen", responses.chosen, totals.chosen),
            ("rejected", responses.rejected, totals.rejected),
        ):
            if scores is None or count == 0:  # the count of the whole step, and so the same on all processes
                continue
            metrics[f"logps/{name}"] = scores.logps.sum() / count
            if self.needs_rejected:
                metrics[f"rewards/{name}"] = (self.rewards(scores) * scores.present).sum() / count
        if {"rewards/chosen", "rewards/rejected"} <= metrics.keys():
            metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
            if totals.chosen == totals.rejected == totals.examples:
                chosen, rejected = responses.pairs
                margins = self.rewards(chosen) - self.rewards(rejected)
                metrics["rewards/accuracies"] = wins(margins).sum() / totals.examples
        return metrics

    def of_consistency(
        self, batch: Batch, observed: Observed, terms: Sequence[ConsistencyTerm], detailed: bool
    ) -> StepLoss:
        """The weighted sum of the losses of ``terms``.

        Args:
            batch: The micro-batch of B examples.
            observed: What the terms compare.
            terms: The terms of this optimizer step; at least one.
            detailed: Whether to compute the terms' other metrics, too. They take time.
        """
        # Each term has the mean over its own rows. Without one in the whole optimizer step every loss is 0.
        losses = [term.losses(observed.only(term.rows)).sum() / (_groups(batch, term) or 1.0) for term in terms]
        metrics = {f"{term.name}/loss": loss for term, loss in zip(terms, losses, strict=True) if _groups(batch, term)}
        total = torch.stack([term.weight * loss for term, loss in zip(terms, losses, strict=True)]).sum()
        if detailed:
            # Collinearity is logged whichever term the representations are for, so that terms can be compared.
            compared = () if observed.representations is None else (self.consistency.mlc,)
            for term in (term for term in dict.fromkeys((*terms, *compared)) if _groups(batch, term)):
                for name, values in term.metrics(observed.only(term.rows)).items():
                    metrics[f"{term.name}/{name}"] = values.sum() / _groups(batch, term)
            if observed.representations is not None:
                metrics |= sums_of_step(observed)
        return StepLoss(total, metrics)


def observe(representation: Representation | None, batch: Batch, grid: Grid, reference: Grid | None) -> Observed:
    """What consistency terms compare.

    Args:
        representation: The extractor; None where no term compares representations.
        batch: The micro-batch.
        grid: Results of the policy.
        reference: Results of the reference model; None if none is needed.
    """
    extracted = None
    if representation is not None and grid.states is not None:
        extracted = representation.extract(grid.states)
    return Observed(grid, reference, extracted, batch.source, batch.is_ordinary)


def _groups(batch: Batch, term: ConsistencyTerm) -> float:
    """The number of prompts that ``term`` compares, in the whole optimizer step."""
    totals = batch.normalizers
    ordinary = totals.ordinary_groups
    return {"all": totals.groups, "ordinary": ordinary, "harmful": totals.groups - ordinary}[term.rows]
