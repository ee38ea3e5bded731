"""The interface of a consistency term: it computes one loss per prompt from the results of a training step."""

from __future__ import annotations

from abc import ABCMeta, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_mlc.errors import UserError
from lightning_mlc.models.forward import Grid

Rows = Literal["all", "harmful", "ordinary"]
"""Rows of the data: those of one kind, or all. A row that does not say what kind it is counts as harmful."""


@dataclass(frozen=True)
class Needs:
    """The inputs that a term uses. An input that no term uses is not computed."""

    representations: bool = False
    """Hidden states at the end of each prompt, after the extractor."""
    responses: bool = False
    """Chosen and rejected responses in every language, instead of only in the source language."""
    reference: bool = False
    """The reference model's log-probabilities of the responses in the source language."""
    reference_translations: bool = False
    """The reference model's log-probabilities of the responses in the other languages."""
    reference_states: bool = False
    """The reference model's hidden states at the end of each prompt, in every language."""
    pooled_states: bool = False
    """Last hidden states of policy and reference, averaged over each response in the source language."""
    positions: int = 0
    """Number of first positions of the source language's response whose next-token distributions are compared, in every
    language."""
    reference_positions: int = 0
    """The same of the reference's distributions."""
    reference_source_positions: int = 0
    """The same of the reference's distributions after the prompt in the source language alone."""

    @property
    def reference_next_tokens(self) -> int:
        """Number of first positions whose distributions the reference computes, in one language or in all."""
        return max(self.reference_positions, self.reference_source_positions)

    @classmethod
    def of(cls, terms: Iterable[ConsistencyTerm]) -> Needs:
        """Return the inputs that at least one of ``terms`` uses."""
        parts = [cls(), *(term.needs for term in terms)]
        return cls(**{field.name: max(getattr(part, field.name) for part in parts) for field in fields(cls)})


class Observed(NamedTuple):
    """The results of a step for B prompts in L languages. A field is None if no term uses it."""

    policy: Grid
    """Results of the policy."""
    reference: Grid | None
    """Results of the reference model."""
    representations: Tensor | None
    """(B, L, D) floating point: hidden states at the ends of the prompts, after the extractor."""
    source: int
    """Index of the source language, from 0 to L - 1."""
    is_ordinary: Tensor | None = None
    """(B,) bool: whether the prompt is an ordinary one, which a model should answer; None: none is."""

    def only(self, rows: Rows) -> Observed:
        """The same results, where prompts of another kind than ``rows`` exist in no language."""
        if rows == "all" or (self.is_ordinary is None and rows == "harmful"):
            return self
        is_ordinary = torch.zeros_like(self.present[:, 0]) if self.is_ordinary is None else self.is_ordinary
        chosen = is_ordinary if rows == "ordinary" else ~is_ordinary
        return self._replace(policy=self.policy._replace(present=self.present & chosen[:, None]))

    @property
    def present(self) -> Tensor:
        """(B, L) bool: whether the prompt exists in the language."""
        return self.policy.present

    @property
    def is_group(self) -> Tensor:
        """(B,) bool: whether the prompt exists in two or more languages, so that they can be compared."""
        return self.present.sum(1) >= 2

    @property
    def is_source(self) -> Tensor:
        """(L,) bool: whether the language is the source language."""
        return torch.arange(self.present.shape[1], device=self.present.device) == self.source


# ABCMeta, not ABC: with a base class that is no dataclass, jsonargparse would ask for a class_path.
@dataclass(frozen=True)
class ConsistencyTerm(metaclass=ABCMeta):
    """The settings of a term, with the methods that compute it."""

    name: ClassVar[str]
    """Name of the term's settings below ``model.consistency``, and prefix of its logged names."""
    compares_prompts: ClassVar[bool] = False
    """Whether it compares different prompts of a micro-batch, and not each prompt with its translations alone."""
    weight: float
    """Factor of the loss. 0 turns the term off."""
    rows: Rows = field(default="all", kw_only=True)
    """The rows that the term compares. It is 0 for the others."""

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """The inputs that the term uses."""

    @abstractmethod
    def losses(self, observed: Observed) -> Tensor:
        """Compute the loss of each prompt.

        Args:
            observed: Results of the step for B prompts.

        Returns:
            (B,) losses without ``weight``; exactly 0 for a prompt in fewer than two languages.
        """

    def metrics(self, observed: Observed) -> dict[str, Tensor]:
        """Compute further values to log.

        Args:
            observed: Results of the step for B prompts.

        Returns:
            (B,) values by name. The mean over the prompts in two or more languages is logged.
        """
        return {}

    def check(self, option: str, least: float, most: float = float("inf")) -> None:
        """Refuse a setting that is out of range.

        Args:
            option: Name of the setting.
            least: Smallest allowed value.
            most: Largest allowed value. By default any finite number is allowed.

        Raises:
            UserError: The setting is not a finite number from ``least`` to ``most``.
        """
        value = getattr(self, option)
        if not (least <= value <= most and value < float("inf")):
            bounds = f"{least:g} or above" if most == float("inf") else f"from {least:g} to {most:g}"
            raise UserError(f"model.consistency.{self.name}.{option}", f"must be {bounds}, got {value}")
