"""What a consistency term is: per-prompt losses from what a step has computed, nothing more."""

from __future__ import annotations

from abc import ABCMeta, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_mlc.errors import UserError
from lightning_mlc.models.forward import Grid


@dataclass(frozen=True)
class Needs:
    """What must be computed for a term. What no term needs is not computed."""

    representations: bool = False
    """Hidden states at the end of each prompt, through the extractor."""
    responses: bool = False
    """Chosen and rejected responses in every language, and not only in the source language."""
    reference: bool = False
    """The reference model's log-probabilities of the responses in the source language."""
    reference_translations: bool = False
    """The same in the other languages."""
    pooled_states: bool = False
    """Mean last hidden states of the responses in the source language, of policy and reference."""

    @classmethod
    def of(cls, terms: Iterable[ConsistencyTerm]) -> Needs:
        """What any of ``terms`` needs."""
        parts = [term.needs for term in terms]
        return cls(**{field.name: any(getattr(part, field.name) for part in parts) for field in fields(cls)})


class Observed(NamedTuple):
    """What there is to compare about B prompts in L languages. A field is None where no term needs it."""

    policy: Grid
    reference: Grid | None
    representations: Tensor | None
    """(B, L, D), extracted hidden states at the ends of the prompts."""
    source: int
    """Index of the source language."""

    @property
    def present(self) -> Tensor:
        """(B, L) bool, whether the prompt is there in the language."""
        return self.policy.present

    @property
    def is_group(self) -> Tensor:
        """(B,) bool, whether there are two languages to compare."""
        return self.present.sum(1) >= 2

    @property
    def is_source(self) -> Tensor:
        """(L,) bool."""
        return torch.arange(self.present.shape[1], device=self.present.device) == self.source


@dataclass(frozen=True)
class ConsistencyTerm(metaclass=ABCMeta):  # not ABC: of what is a dataclass throughout the command line asks no class
    """Settings, which compute the term they describe."""

    name: ClassVar[str]
    """The sub-group of ``model.consistency`` that configures it, and what its logged names start with."""
    weight: float
    """What the loss is multiplied by; 0 turns the term off."""

    @property
    @abstractmethod
    def needs(self) -> Needs:
        """What must be computed for it."""

    @abstractmethod
    def losses(self, observed: Observed) -> Tensor:
        """(B,) loss of each prompt, exactly 0 where there are fewer than two languages."""

    def metrics(self, observed: Observed) -> dict[str, Tensor]:
        """What else to log: (B,) values by name, averaged over the prompts in two or more languages."""
        return {}

    def check(self, option: str, least: float, most: float = float("inf")) -> None:
        """Raises:
        UserError: The setting ``option`` is not a finite number from ``least`` to ``most``.
        """
        value = getattr(self, option)
        if not (least <= value <= most and value < float("inf")):
            bounds = f"{least:g} or above" if most == float("inf") else f"from {least:g} to {most:g}"
            raise UserError(f"model.consistency.{self.name}.{option}", f"must be {bounds}, got {value}")
