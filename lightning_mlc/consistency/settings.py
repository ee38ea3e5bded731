"""``model.consistency``: the terms beside the objective, and what their representations are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from lightning_mlc.consistency.base import ConsistencyTerm, Needs
from lightning_mlc.consistency.dco import DCO
from lightning_mlc.consistency.mlc import MLC
from lightning_mlc.consistency.mpo import MPO
from lightning_mlc.consistency.pairwise_cosine import PairwiseCosine
from lightning_mlc.consistency.source_cosine import SourceCosine
from lightning_mlc.errors import UserError


@dataclass(frozen=True)
class Consistency:
    """What keeps the languages together. ``sum of weight * loss`` over the terms is added to the objective.

    Args:
        mlc: Multi-lingual consistency: representations on one line.
        pairwise_cosine: Representations of each two languages the same way.
        source_cosine: Representations the way of the source language's.
        mpo: Reward gaps as large as in the source language.
        dco: Preferences between responses alike.
        layer: Whose hidden states are the representations: an integer index (0 embeddings, -1 after the last layer
            and the final norm) or a fraction of the depth (0.5: the middle).
        extractor: ``linear`` trains a linear map of the hidden states, ``frozen`` keeps that map as
            initialised, ``none`` compares the hidden states themselves.
        extractor_dim: Output width of the extractor.
        extractor_bias: Whether the extractor has a bias.
        extractor_lr: Learning rate of the extractor; null for that of the model. At the model's rate, 6e-7
            in the published recipe, an extractor hardly moves; at a large one it alone can satisfy the losses
            while the model stays as it was.
        center: Subtract a running mean of the hidden states before the extractor. Hidden states share a
            large common direction that makes them look consistent from the start.
        every_n_steps: Add the terms on every n-th optimizer step; the other steps run no translation.
    """

    mlc: MLC = field(default_factory=MLC)
    pairwise_cosine: PairwiseCosine = field(default_factory=PairwiseCosine)
    source_cosine: SourceCosine = field(default_factory=SourceCosine)
    mpo: MPO = field(default_factory=MPO)
    dco: DCO = field(default_factory=DCO)
    layer: int | float = -1
    extractor: Literal["linear", "frozen", "none"] = "linear"
    extractor_dim: int = 512
    extractor_bias: bool = True
    extractor_lr: float | None = None
    center: bool = False
    every_n_steps: int = 1

    def __post_init__(self) -> None:
        if self.extractor_dim < 2:
            raise UserError("model.consistency.extractor_dim", f"must be at least 2, got {self.extractor_dim}")
        if self.extractor_lr is not None and self.extractor != "linear":
            raise UserError(
                "model.consistency.extractor_lr",
                f"an extractor that is '{self.extractor}' is not trained; "
                "remove it or set model.consistency.extractor to linear",
            )
        if self.extractor_lr is not None and not self.extractor_lr >= 0:
            raise UserError("model.consistency.extractor_lr", f"must not be negative, got {self.extractor_lr}")
        if self.every_n_steps < 1:
            raise UserError("model.consistency.every_n_steps", f"must be at least 1, got {self.every_n_steps}")

    @property
    def terms(self) -> tuple[ConsistencyTerm, ...]:
        """The terms that are on."""
        every = (self.mlc, self.pairwise_cosine, self.source_cosine, self.mpo, self.dco)
        return tuple(term for term in every if term.weight > 0)

    def terms_at(self, step: int) -> tuple[ConsistencyTerm, ...]:
        """The terms of optimizer step ``step`` (from 0)."""
        return self.terms if step % self.every_n_steps == 0 else ()

    @property
    def needs(self) -> Needs:
        """What the terms that are on need."""
        return Needs.of(self.terms)

    def require_languages(self, languages: Sequence[str]) -> None:
        """Raises:
        UserError: A term is on, and ``languages`` are fewer than two.
        """
        for term in self.terms if len(languages) < 2 else ():
            raise UserError(
                f"model.consistency.{term.name}",
                f"needs prompts in two or more languages, the training data has only "
                f"'{languages[0]}'; add translations (see data.languages) or set "
                f"model.consistency.{term.name}.weight to 0",
            )

    def require_pairs(self, has_pairs: bool) -> None:
        """Raises:
        UserError: A term is on that compares two responses, and the data has single ones.
        """
        for term in self.terms if not has_pairs else ():
            if term.needs.responses:
                raise UserError(
                    f"model.consistency.{term.name}",
                    f"needs chosen and rejected responses, but the data has single "
                    f"responses; give preference data or set model.consistency.{term.name}.weight to 0",
                )
