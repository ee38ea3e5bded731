"""The interface of an alignment objective: it computes one loss per example from log-probabilities."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from torch import Tensor

from lightning_mlc.errors import UserError

if TYPE_CHECKING:
    from lightning_mlc.data.records import DataKind

MeanOver = Literal["examples", "responses", "tokens"]
"""The sum of the losses is divided by the number of examples, of responses, or of tokens in chosen responses."""


class Scores(NamedTuple):
    """Log-probabilities of one kind of response: (B,), one per example. Any other shape works, if all fields have it.

    An example without such a response has 0 in every field.
    """

    logps: Tensor
    """(B,) floating point: log-probability of the response under the policy, summed over its tokens."""
    tokens: Tensor
    """(B,): number of tokens of the response."""
    reference_logps: Tensor | None
    """(B,) floating point: the same as ``logps``, under the reference model. None if the objective needs none."""

    @property
    def present(self) -> Tensor:
        """(B,) bool: whether the example has such a response."""
        return self.tokens > 0

    @property
    def mean_logps(self) -> Tensor:
        """(B,): log-probability per token under the policy; 0 for a response without tokens."""
        return self.logps / self.tokens.clamp(min=1)

    @property
    def log_ratios(self) -> Tensor:
        """(B,): summed log-probability under the policy minus the one under the reference."""
        assert self.reference_logps is not None
        return self.logps - self.reference_logps


class Responses(NamedTuple):
    """Everything that an objective receives: the scores of each kind of response."""

    chosen: Scores
    """Preferred or desirable responses. For instruction data: the only responses."""
    rejected: Scores | None = None
    """Dispreferred or undesirable responses. None if the objective does not use them."""
    mismatched: Scores | None = None
    """Responses that answer another prompt than the example's. None if the objective does not use them."""

    @property
    def pairs(self) -> tuple[Scores, Scores]:
        """Scores of the chosen and of the rejected responses, for an objective that uses both."""
        assert self.rejected is not None
        return self.chosen, self.rejected

    @property
    def counts(self) -> Tensor:
        """(B,) int64: how many responses each example has, chosen and rejected together (0 to 2)."""
        counts = self.chosen.present.long()
        return counts if self.rejected is None else counts + self.rejected.present


class Term(NamedTuple):
    """Losses that are averaged in one way."""

    losses: Tensor
    """(B,): loss of each example, before averaging."""
    mean_over: MeanOver
    """What the sum of the losses is divided by."""


class Objective(ABC):
    """A loss on the responses in the source language.

    The class attributes of a subclass say which inputs it needs. Inputs that nothing needs are not computed.
    """

    needs_rejected: bool
    """Whether the objective uses rejected responses. Every example must have one, unless ``accepts_unpaired``."""
    needs_reference: bool
    """Whether the objective uses the scores of the reference model."""
    needs_mismatched: bool = False
    """Whether the objective uses, for each prompt, a response to another prompt. No gradient flows through it."""
    accepts_unpaired: bool = False
    """Whether an example may have only a chosen or only a rejected response."""
    mean_over: MeanOver
    """What the sum of the losses of an optimizer step is divided by."""

    @abstractmethod
    def losses(self, responses: Responses) -> Tensor:
        """Compute the loss of each example.

        Args:
            responses: Scores of the responses of B examples.

        Returns:
            (B,) losses before averaging. The loss of an example is the sum over its responses.
        """

    def rewards(self, scores: Scores) -> Tensor | None:
        """Compute the reward that the objective implies for each response.

        Args:
            scores: Scores of one kind of response of B examples.

        Returns:
            (B,) rewards, or None if the objective implies none.
        """
        return None

    def metrics(self, responses: Responses) -> dict[str, Tensor]:
        """Compute further values to log.

        Args:
            responses: Scores of the responses of B examples.

        Returns:
            (B,) values by name. The mean over examples is logged.
        """
        return {}

    def terms(self, responses: Responses) -> Sequence[Term]:
        """Compute the losses, grouped by how they are averaged. Only a sum of objectives has several groups.

        Args:
            responses: Scores of the responses of B examples.
        """
        return (Term(self.losses(responses), self.mean_over),)

    def each_alone(self, responses: Responses) -> Tensor:
        """Compute the loss that each example has as a batch of one. Evaluation reports these, under any grouping.

        Args:
            responses: Scores of the responses of B examples.

        Returns:
            (B,) averaged losses.
        """
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

        Args:
            kind: Which responses the data has.
            option: Configuration key of the objective, for the message.

        Raises:
            UserError: The data lacks responses that the objective needs.
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
    """Return ``value`` if it is a finite number above 0.

    Args:
        name: Name of the option below ``model.objective``, for the message.
        value: Value of the option.

    Raises:
        UserError: It is not.
    """
    if not 0 < value < float("inf"):
        raise UserError(f"model.objective.{name}", f"must be above 0, got {value}")
    return value


def check_not_negative(name: str, value: float) -> float:
    """Return ``value`` if it is a finite number of at least 0.

    Args:
        name: Name of the option below ``model.objective``, for the message.
        value: Value of the option.

    Raises:
        UserError: It is not.
    """
    if not 0 <= value < float("inf"):
        raise UserError(f"model.objective.{name}", f"must be 0 or above, got {value}")
    return value
