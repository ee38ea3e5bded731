"""How the reference is had, and what that rules out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lightning_mlc.consistency import Needs
from lightning_mlc.errors import UserError
from lightning_mlc.objectives import Objective


@dataclass(frozen=True)
class ReferenceSettings:
    """The model that an objective such as DPO measures the policy against: the initial one.

    Args:
        mode: ``online`` keeps a frozen copy of the initial model in memory and runs it in every step (under LoRA it is
            the model with its adapters off, and takes none). ``precomputed`` runs the initial model once over the data
            before training, keeps its log-probabilities on disk, and then trains without it.
        update_every_n_steps: Move the reference towards the policy after every n-th optimizer step (TR-DPO,
            arXiv 2404.09656; its tau); null leaves it as it was.
        update_share: Share of the policy in the updated reference's weights (TR-DPO's alpha); 1 replaces them.
    """

    mode: Literal["online", "precomputed"] = "online"
    update_every_n_steps: int | None = None
    update_share: float = 0.6

    def __post_init__(self) -> None:
        if self.mode not in ("online", "precomputed"):
            raise UserError("model.reference.mode", f"there is no {self.mode}; choose online or precomputed")
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
        """Whether optimizer step ``step`` (from 1) ends with an update of the reference."""
        return self.update_every_n_steps is not None and step % self.update_every_n_steps == 0

    def check(self, objective: Objective | None, needs: Needs, adapters: bool) -> None:
        """Refuse what cannot work with the rest of the configuration; all of that belongs here.

        Raises:
            UserError: A reference is asked for that neither ``objective`` nor consistency terms (``needs``) need, or
                that the chosen ``mode``, or a model with ``adapters``, cannot give.
        """
        name = type(objective).__name__ if objective is not None else "model.consistency"
        needed = needs.reference or (objective is not None and objective.needs_reference)
        if self.mode == "precomputed" and needs.pooled_states:
            raise UserError(
                "model.reference.mode",
                "precomputed has log-probabilities, and model.consistency has a term that needs "
                "hidden states of the reference (mpo with a constraint); set it to online",
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
                "precomputed scores are those of a reference that stays as it "
                "is; set it to null, or model.reference.mode to online",
            )
        if adapters and self.is_updated:
            raise UserError(
                "model.reference.update_every_n_steps",
                "with model.lora the reference is the model without its "
                "adapters, which has no weights of its own to update; set it to null, or train without model.lora",
            )
