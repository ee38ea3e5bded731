"""What an alignment objective is: per-example losses from log-probabilities, nothing more."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import Tensor

from lightning_mlc.errors import UserError

if TYPE_CHECKING:
    from lightning_mlc.data.records import DataKind

MeanOver = Literal["examples", "responses", "tokens"]
"""What a sum of losses is divided by: the examples, their responses, or the tokens of the chosen responses."""


class Scores(NamedTuple):
    """Log-probabilities of responses, one per example (or any other shape, the same for all fields)."""

    logps: Tensor
    """Summed log-probability of the response's tokens under the policy."""
    tokens: Tensor
    """Number of tokens of the response; 0 where an example has none, and then the log-probabilities are 0 too."""
    reference_logps: Tensor | None
    """As ``logps``, under the frozen reference model; None for objectives that need none."""

    @property
    def present(self) -> Tensor:
        """Whether the example has such a response."""
        return self.tokens > 0

    @property
    def mean_logps(self) -> Tensor:
        """Log-probability per token under the policy (0 where there is no token)."""
        return self.logps / self.tokens.clamp(min=1)

    @property
    def log_ratios(self) -> Tensor:
        """Summed log-probability under the policy less that under the reference."""
        assert self.reference_logps is not None
        return self.logps - self.reference_logps


class Responses(NamedTuple):
    """All that an objective may look at: scores by what a response is to its example."""

    chosen: Scores
    """Preferred or desirable responses, or the only ones of instruction data."""
    rejected: Scores | None = None
    """Dispreferred or undesirable responses; None for objectives that need none."""
    mismatched: Scores | None = None
    """Responses to other prompts than the example's; None for objectives that need none."""

    @property
    def pairs(self) -> tuple[Scores, Scores]:
        """Chosen and rejected responses, for an objective that needs both of every example."""
        assert self.rejected is not None
        return self.chosen, self.rejected

    @property
    def counts(self) -> Tensor:
        """(B,) int64, number of chosen and rejected responses of each example."""
        counts = self.chosen.present.long()
        return counts if self.rejected is None else counts + self.rejected.present


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
    """Whether rejected responses must be scored: of every example, or where they are if ``accepts_unpaired``."""
    needs_reference: bool
    """Whether a frozen copy of the initial model must score the responses too."""
    needs_mismatched: bool = False
    """Whether a response to another prompt must be scored with each prompt, too (without a gradient)."""
    accepts_unpaired: bool = False
    """Whether an example may have a chosen or a rejected response alone."""
    mean_over: MeanOver
    """What the sum of the losses is divided by, over a whole optimizer step."""

    @abstractmethod
    def losses(self, responses: Responses) -> Tensor:
        """(B,) loss of each example, before any averaging; of several responses, their sum."""

    def rewards(self, scores: Scores) -> Tensor | None:
        """The reward that the objective implicitly gives to each response; None where it has no such notion."""
        return None

    def metrics(self, responses: Responses) -> dict[str, Tensor]:
        """What else to log: (B,) values by name, averaged over examples."""
        return {}

    def terms(self, responses: Responses) -> Sequence[Term]:
        """The losses, by what they are averaged over. More than one only for sums of objectives."""
        return (Term(self.losses(responses), self.mean_over),)

    def each_alone(self, responses: Responses) -> Tensor:
        """(B,) loss of each example as if it were the only one: what evaluation reports, for any grouping."""
        return self._mean_of_each(self.losses(responses), responses)

    def _mean_of_each(self, losses: Tensor, responses: Responses) -> Tensor:
        match self.mean_over:
            case "examples":
                return losses
            case "responses":
                return losses / responses.counts.clamp(min=1)
            case "tokens":
                return losses / responses.chosen.tokens.clamp(min=1)

    def check_data(self, kind: DataKind, option: str = "model.objective") -> None:
        """Refuse data that the objective cannot learn from.

        Raises:
            UserError: It has not the responses that are needed. The message starts with ``option``.
        """
        name = type(self).__name__
        if kind == "single" and self.needs_rejected:
            labels = ", or responses with a label" if self.accepts_unpaired else ""
            raise UserError(
                option,
                f"{name} needs chosen and rejected responses{labels}, but the data has single responses; "
                "give preference data or set model.objective to SFT",
            )
        if kind == "unpaired" and not self.accepts_unpaired:
            raise UserError(
                option,
                f"{name} needs a chosen and a rejected response to every prompt, but the data has single "
                "responses with a label; give pairs or set model.objective to KTO",
            )


def check_positive(name: str, value: float) -> float:
    """``value`` of the option ``model.objective.name``.

    Raises:
        UserError: It is not a finite number above 0.
    """
    if not 0 < value < float("inf"):
        raise UserError(f"model.objective.{name}", f"must be above 0, got {value}")
    return value


def check_not_negative(name: str, value: float) -> float:
    """``value`` of the option ``model.objective.name``.

    Raises:
        UserError: It is not a finite number of at least 0.
    """
    if not 0 <= value < float("inf"):
        raise UserError(f"model.objective.{name}", f"must be 0 or above, got {value}")
    return value
