"""What an alignment objective is: per-example losses from log-probabilities, nothing more."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor

from lightning_mlc.errors import UserError

MeanOver = Literal["examples", "tokens"]
"""What a sum of losses is divided by: the examples, or the tokens of the chosen responses."""


class Scores(NamedTuple):
    """Log-probabilities of responses, one per example (or any other shape, the same for all fields)."""

    logps: Tensor
    """Summed log-probability of the response's tokens under the policy."""
    tokens: Tensor
    """Number of tokens of the response."""
    reference_logps: Tensor | None
    """As ``logps``, under the frozen reference model; None for objectives that need none."""

    @property
    def mean_logps(self) -> Tensor:
        """Log-probability per token under the policy (0 where there is no token)."""
        return self.logps / self.tokens.clamp(min=1)

    @property
    def log_ratios(self) -> Tensor:
        """Summed log-probability under the policy less that under the reference."""
        assert self.reference_logps is not None
        return self.logps - self.reference_logps


class Term(NamedTuple):
    """A part of an objective that is averaged in its own way."""

    losses: Tensor
    """(B,) loss of each example, before any averaging."""
    mean_over: MeanOver


class Objective(ABC):
    """An objective on the responses in the source language.

    A subclass says by its class attributes what must be computed for it.
    """

    needs_rejected: bool
    """Whether examples must have a rejected response."""
    needs_reference: bool
    """Whether a frozen copy of the initial model must score the responses too."""
    mean_over: MeanOver
    """What the sum of the losses is divided by, over a whole optimizer step."""

    @abstractmethod
    def losses(self, chosen: Scores, rejected: Scores | None) -> Tensor:
        """(B,) loss of each example, before any averaging."""

    def rewards(self, scores: Scores) -> Tensor | None:
        """The reward that the objective implicitly gives to each response; None where it has no such notion."""
        return None

    def metrics(self, chosen: Scores, rejected: Scores | None) -> dict[str, Tensor]:
        """What else to log: (B,) values by name, averaged over examples."""
        return {}

    def terms(self, chosen: Scores, rejected: Scores | None) -> Sequence[Term]:
        """The losses, by what they are averaged over. More than one only for sums of objectives."""
        return (Term(self.losses(chosen, rejected), self.mean_over),)

    def each_alone(self, chosen: Scores, rejected: Scores | None) -> Tensor:
        """(B,) loss of each example as if it were the only one: what evaluation reports, for any grouping."""
        losses = self.losses(chosen, rejected)
        return losses if self.mean_over == "examples" else losses / chosen.tokens.clamp(min=1)


def check_positive(name: str, value: float) -> float:
    """``value`` of the option ``model.objective.name``.

    Raises:
        UserError: It is not a finite number above 0.
    """
    if not 0 < value < float("inf"):
        raise UserError(f"model.objective.{name}: must be above 0, got {value}")
    return value


def check_not_negative(name: str, value: float) -> float:
    """``value`` of the option ``model.objective.name``.

    Raises:
        UserError: It is not a finite number of at least 0.
    """
    if not 0 <= value < float("inf"):
        raise UserError(f"model.objective.{name}: must be 0 or above, got {value}")
    return value
