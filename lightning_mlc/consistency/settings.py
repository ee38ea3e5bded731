"""``model.consistency``: the consistency terms, and the representations that they compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from lightning_mlc.consistency.base import ConsistencyTerm, Needs
from lightning_mlc.consistency.contrast import Contrast
from lightning_mlc.consistency.dco import DCO
from lightning_mlc.consistency.mlc import MLC
from lightning_mlc.consistency.mpo import MPO
from lightning_mlc.consistency.pairwise_cosine import PairwiseCosine
from lightning_mlc.consistency.retain import Retain
from lightning_mlc.consistency.self_distillation import SelfDistillation
from lightning_mlc.consistency.source_cosine import SourceCosine
from lightning_mlc.errors import UserError
from lightning_mlc.models.layers import AUTO, Layer


@dataclass(frozen=True)
class Consistency:
    """Losses that keep the languages together. The sum of ``weight * loss`` over the terms is added to the objective.

    Args:
        mlc: Multi-lingual consistency: pulls the representations of a prompt onto one line.
        contrast: Keeps different prompts apart: a translation should be closer to its own prompt than to others.
        retain: Keeps ordinary prompts near the reference: their hidden states, or the distribution of the first token
            of the response.
        pairwise_cosine: Gives the representations of each pair of languages the same direction.
        source_cosine: Gives each representation the direction of the source language's.
        mpo: Makes reward gaps as large as in the source language.
        dco: Makes the languages prefer the same responses.
        self_distillation: Teaches the model to begin its response to a translation as it would in the source language.
        layer: The layer whose hidden states are compared: an integer index (0: the embeddings, -1: after the last
            layer and the final norm), a fraction of the depth (0.5: the middle), or ``auto``: ``fit`` measures all
            layers before training, and takes the one with the largest silhouette by prompt minus that by language.
        extractor: ``linear`` trains a linear map of the hidden states, ``frozen`` keeps this map as it was
            initialised, ``none`` compares the hidden states themselves.
        extractor_dim: Output width of the extractor, at least 2.
        extractor_bias: Whether the extractor has a bias.
        extractor_lr: Learning rate of the extractor. null: the model's. At the model's rate, 6e-7 in the published
            recipe, an extractor hardly moves. At a large rate the extractor alone can satisfy the losses while the
            model stays as it was.
        center: Whether to subtract a running mean of the hidden states before the extractor. Hidden states share a
            large common direction, which makes them look consistent from the start.
        every_n_steps: Add the terms on every n-th optimizer step. The other steps run no translations.

    Raises:
        UserError: A setting is out of range, ``extractor_lr`` is set for an extractor that is not trained, or
            ``layer`` is ``auto`` and no term that is on compares hidden states.
    """

    mlc: MLC = field(default_factory=MLC)
    contrast: Contrast = field(default_factory=Contrast)
    retain: Retain = field(default_factory=Retain)
    pairwise_cosine: PairwiseCosine = field(default_factory=PairwiseCosine)
    source_cosine: SourceCosine = field(default_factory=SourceCosine)
    mpo: MPO = field(default_factory=MPO)
    dco: DCO = field(default_factory=DCO)
    self_distillation: SelfDistillation = field(default_factory=SelfDistillation)
    layer: Layer = -1
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
                f"with extractor '{self.extractor}' no extractor is trained; "
                "remove extractor_lr, or set model.consistency.extractor to linear",
            )
        if self.extractor_lr is not None and not self.extractor_lr >= 0:
            raise UserError("model.consistency.extractor_lr", f"must not be negative, got {self.extractor_lr}")
        if self.every_n_steps < 1:
            raise UserError("model.consistency.every_n_steps", f"must be at least 1, got {self.every_n_steps}")
        if isinstance(self.layer, str):
            self._require_use_of_auto()

    def _require_use_of_auto(self) -> None:
        """Refuse a ``layer`` in words that is not ``auto``, or is chosen for no term."""
        if self.layer != AUTO:
            raise UserError("model.consistency.layer", f"must be a number or {AUTO}, got {self.layer}")
        if not self.needs.representations:
            raise UserError(
                "model.consistency.layer",
                f"is {AUTO}, but no term that is on compares hidden states; give the number of a layer, or turn such "
                "a term on (model.consistency.mlc.weight)",
            )

    @property
    def terms(self) -> tuple[ConsistencyTerm, ...]:
        """The terms that are on."""
        every = (
            self.mlc,
            self.contrast,
            self.retain,
            self.pairwise_cosine,
            self.source_cosine,
            self.mpo,
            self.dco,
            self.self_distillation,
        )
        return tuple(term for term in every if term.weight > 0)

    def terms_at(self, step: int) -> tuple[ConsistencyTerm, ...]:
        """The terms that are added to optimizer step ``step`` (counted from 0)."""
        return self.terms if step % self.every_n_steps == 0 else ()

    @property
    def needs(self) -> Needs:
        """The inputs of the terms that are on."""
        return Needs.of(self.terms)

    def require_languages(self, languages: Sequence[str]) -> None:
        """Refuse data in a single language if a term is on.

        Args:
            languages: BCP-47 codes of the training data's languages.

        Raises:
            UserError: A term is on, and there are fewer than two languages.
        """
        for term in self.terms if len(languages) < 2 else ():
            raise UserError(
                f"model.consistency.{term.name}",
                "needs prompts in two or more languages, but the training data has only "
                f"'{languages[0]}'; add translations (see data.languages) or set "
                f"model.consistency.{term.name}.weight to 0",
            )

    def require_pairs(self, has_pairs: bool) -> None:
        """Refuse data without pairs of responses if a term compares two responses.

        Args:
            has_pairs: Whether every example has a chosen and a rejected response.

        Raises:
            UserError: A term that is on compares two responses, and ``has_pairs`` is False.
        """
        for term in self.terms if not has_pairs else ():
            if term.needs.responses:
                raise UserError(
                    f"model.consistency.{term.name}",
                    "needs chosen and rejected responses, but the data has single responses; "
                    f"give preference data or set model.consistency.{term.name}.weight to 0",
                )

    def require_rows(self, prompts: int, ordinary: int) -> None:
        """Refuse data without the rows that a term compares.

        Args:
            prompts: Number of prompts in two or more languages.
            ordinary: Number of those that are ordinary.

        Raises:
            UserError: A term that is on compares ordinary rows, or the others, and there is none.
        """
        found = {"all": prompts, "ordinary": ordinary, "harmful": prompts - ordinary}
        for term in self.terms if prompts else ():
            if not found[term.rows]:
                raise UserError(
                    f"model.consistency.{term.name}.rows",
                    f"is {term.rows}, but the training data has no such prompt in two or more languages; "
                    "set 'kind' to harmful or ordinary in each row, or set it to all",
                )

    def require_several_prompts(self, batch_size: int | None) -> None:
        """Refuse micro-batches of one prompt if a term compares different prompts.

        Args:
            batch_size: Number of examples in a micro-batch; None if it varies.

        Raises:
            UserError: A term that is on compares different prompts, and ``batch_size`` is 1.
        """
        for term in self.terms if batch_size == 1 else ():
            if term.compares_prompts:
                raise UserError(
                    "data.batch_size",
                    f"is 1, but model.consistency.{term.name} compares the prompts of a micro-batch; set it to 2 or "
                    "more (and trainer.accumulate_grad_batches lower), or give data.tokens_per_batch",
                )
