"""Where reference scores come from, and which settings that excludes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_mlc.consistency import Needs
from lightning_mlc.errors import UserError
from lightning_mlc.objectives import Objective


@dataclass(frozen=True)
class ReferenceSettings:
    """The reference: the initial model, which objectives such as DPO compare the policy with.

    Args:
        mode: ``online`` keeps a frozen copy of the initial model in memory and runs it in every step. With LoRA the
            reference is the model with its adapters turned off, which takes no memory. ``precomputed`` runs the
            initial model once over the data before training, keeps its log-probabilities on disk, and then trains
            without it.
        update_every_n_steps: Move the reference towards the policy after every n-th optimizer step (tau in TR-DPO,
            arXiv 2404.09656). null: never.
        update_share: Share of the policy in the weights of the updated reference (alpha in TR-DPO), above 0. 1 replaces
            the reference by the policy.

    Raises:
        UserError: A setting is out of range.
    """

    mode: Literal["online", "precomputed"] = "online"
    update_every_n_steps: int | None = None
    update_share: float = 0.6

    def __post_init__(self) -> None:
        if self.mode not in ("online", "precomputed"):
            raise UserError("model.reference.mode", f"unknown mode '{self.mode}'; choose online or precomputed")
        if self.update_every_n_steps is not None and self.update_every_n_steps < 1:
            raise UserError(
                "model.reference.update_every_n_steps",
                f"must be at least 1, or null for never, got {self.update_every_n_steps}",
            )
        if not 0 < self.update_share <= 1:
            raise UserError("model.reference.update_share", f"must be above 0 and at most 1, got {self.update_share}")

    @property
    def is_updated(self) -> bool:
        """Whether the reference changes during training."""
        return self.update_every_n_steps is not None

    def updates_after(self, step: int) -> bool:
        """Whether the reference is updated after optimizer step ``step`` (counted from 1)."""
        return self.update_every_n_steps is not None and step % self.update_every_n_steps == 0

    def check(self, objective: Objective | None, needs: Needs, adapters: bool) -> None:
        """Refuse settings that do not work with the rest of the configuration.

        Args:
            objective: The objective, if there is one.
            needs: Inputs of the consistency terms that are on.
            adapters: Whether the model has LoRA adapters.

        Raises:
            UserError: Nothing needs the reference that the settings describe, or ``mode`` or ``adapters`` exclude it.
        """
        name = type(objective).__name__ if objective is not None else "model.consistency"
        needed = needs.reference or (objective is not None and objective.needs_reference)
        if self.mode == "precomputed" and (
            needs.pooled_states or needs.reference_states or needs.reference_next_tokens
        ):
            raise UserError(
                "model.reference.mode",
                "precomputed keeps log-probabilities of responses only, but model.consistency has a term that needs "
                "hidden states or whole distributions of the reference (retain, mpo with a constraint, or "
                "self_distillation with the reference as teacher); set it to online",
            )
        if not needed and self.mode == "precomputed":
            raise UserError(
                "model.reference.mode",
                f"{name} needs no reference, so there is nothing to precompute; set it to online",
            )
        if not needed and self.is_updated:
            raise UserError(
                "model.reference.update_every_n_steps",
                f"{name} needs no reference, so there is nothing to update; set it to null",
            )
        if self.mode == "precomputed" and self.is_updated:
            raise UserError(
                "model.reference.update_every_n_steps",
                "precomputed scores need a reference that never changes; "
                "set it to null, or model.reference.mode to online",
            )
        if adapters and self.is_updated:
            raise UserError(
                "model.reference.update_every_n_steps",
                "with model.lora the reference is the model without its "
                "adapters, which has no weights of its own to update; set it to null, or train without model.lora",
            )
