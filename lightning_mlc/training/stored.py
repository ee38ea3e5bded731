"""Which tensors of a module belong into a checkpoint, and whether those of a checkpoint are the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_mlc.errors import UserError
from lightning_mlc.models.policy import Policy
from lightning_mlc.reference import OnlineReference, PrecomputedReference, ReferenceSettings

POLICY = "policy."
"""Prefix of the policy's keys in the state dict of the module."""


def stored_keys(state: Mapping[str, Any], policy: Policy, adapters: bool) -> set[str]:
    """Keys of ``state``, a module's state dict, that a checkpoint stores.

    With adapters these are all but the frozen model's, because the frozen weights are those of the base model.
    """
    if not adapters:
        return set(state)
    trained = {f"{POLICY}{name}" for name, weight in policy.named_parameters() if weight.requires_grad}
    return {key for key in state if key in trained or not key.startswith(POLICY)}


def require_same_tensors(stored: Mapping[str, Any], state: Mapping[str, Any], expected: set[str]) -> None:
    """Refuse a checkpoint that does not fit the module.

    Args:
        stored: State dict of the checkpoint. Tensors of a folder of shards have not been read yet.
        state: State dict of the module.
        expected: Keys that the checkpoint must have (:func:`stored_keys`).

    Raises:
        UserError: A key is missing or in excess, or a tensor has another shape.
    """
    for disagreement, verb in ((expected - stored.keys(), "lacks"), (stored.keys() - expected, "has")):
        if disagreement:
            raise UserError(
                "ckpt_path",
                f"the checkpoint {verb} {min(disagreement)}, unlike the model that the "
                "configuration describes; use the model.consistency settings it was trained with",
            )
    for name, value in state.items():
        found = stored.get(name)
        if isinstance(found, Tensor) and found.shape != value.shape:
            raise UserError(
                "ckpt_path",
                f"{name} has the shape {tuple(found.shape)} in the checkpoint and {tuple(value.shape)} here; "
                "use the model.consistency settings it was trained with",
            )


def restore_updated(
    reference: OnlineReference | PrecomputedReference | None, settings: ReferenceSettings, state: dict[str, Any] | None
) -> None:
    """Load the ``state`` of a reference model that followed the policy.

    Args:
        reference: The reference of this run; None if it needs none.
        settings: Its settings.
        state: Its state in the checkpoint; None if it did not follow the policy.

    Raises:
        UserError: The reference of this run does not follow the policy.
    """
    if reference is None or state is None:
        return
    if not isinstance(reference, OnlineReference) or not settings.is_updated:
        raise UserError(
            "ckpt_path",
            "the checkpoint was trained with a reference that follows the policy, and rewards are "
            "measured against it; set model.reference.update_every_n_steps as it was",
        )
    reference.load_state_dict(state)
