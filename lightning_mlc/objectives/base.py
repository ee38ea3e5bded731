"""What an alignment objective is: per-example losses from log-probabilities, nothing more."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor


class Scores(NamedTuple):
    """Log-probabilities of responses, one per example (or any other shape, the same for all fields)."""

    logps: Tensor
    """Summed log-probability of the response's tokens under the policy."""
    tokens: Tensor
    """Number of tokens of the response."""
    reference_logps: Tensor | None
    """As ``logps``, under the frozen reference model; None for objectives that need none."""


class Objective(ABC):
    """An objective on the responses in the source language.

    A subclass says by its class attributes what must be computed for it.
    """

    needs_rejected: ClassVar[bool]
    """Whether examples must have a rejected response."""
    needs_reference: ClassVar[bool]
    """Whether a frozen copy of the initial model must score the responses too."""
    mean_over: ClassVar[Literal["examples", "tokens"]]
    """What the sum of the losses is divided by, over a whole optimizer step."""

    @abstractmethod
    def losses(self, chosen: Scores, rejected: Scores | None) -> Tensor:
        """(B,) loss of each example, before any averaging."""

    def rewards(self, scores: Scores) -> Tensor | None:
        """The reward that the objective implicitly gives to each response; None where it has no such notion."""
        return None
