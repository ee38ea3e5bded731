"""A reference model in memory, which is run when its scores are needed."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_mlc.checkpoints.format import load_into
from lightning_mlc.consistency import Needs
from lightning_mlc.data.batches import Batch
from lightning_mlc.distributed.sharding import move
from lightning_mlc.models.forward import Grid, run_batch
from lightning_mlc.models.policy import Policy
from lightning_mlc.reference.scores import ReferenceScores


@contextmanager
def as_reference(policy: Policy) -> Iterator[Policy]:
    """Turn off the adapters, dropout and gradients of ``policy`` inside the context."""
    model: Any = policy.model
    was_training = policy.training
    policy.eval()
    try:
        with torch.no_grad(), model.disable_adapter() if _has_adapters(policy) else nullcontext():
            yield policy
    finally:
        policy.train(was_training)


def _has_adapters(policy: Policy) -> bool:
    return hasattr(policy.model, "disable_adapter")


def rows_to_score(batch: Batch, needs: Needs) -> Batch:
    """Leave the rows in a batch that the reference runs.

    Args:
        batch: What the policy runs.
        needs: Inputs of the consistency terms.
    """
    # Without a response to score, the source prompt is one of the prompts.
    among_prompts = bool(needs.reference_source_positions) and not batch.responses
    if needs.reference_states or needs.reference_positions or among_prompts:
        return batch
    if needs.reference_translations:
        return dataclasses.replace(batch, prompts=())
    return batch.without_translations()


class OnlineReference:
    """Scores responses with the initial model, or with one that follows the policy (TR-DPO, arXiv 2404.09656).

    This is no ``nn.Module``, so that no module registers it: the optimizer, checkpoints, DDP and ``train()`` do not
    reach it. With LoRA it is the policy with its adapters turned off, which takes no memory.

    Args:
        policy: The policy before training. Without adapters it is copied and frozen.
    """

    KEY: ClassVar[str] = "lightning_mlc_reference"
    """Key of a checkpoint that holds the weights of an updated reference."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy if _has_adapters(policy) else copy.deepcopy(policy).requires_grad_(False).eval()
        self._evaluated: dict[str, ReferenceScores] = {}

    @property
    def policy(self) -> Policy:
        """The model that scores responses: a copy of the policy, or the policy itself if it has adapters."""
        return self._policy

    def grid(self, batch: Batch, split: str, needs: Needs, layer: int | None = None) -> Grid:
        """Score the responses of a batch. Scores of validation and test data are computed once and then kept.

        Args:
            batch: Examples on the device of the policy.
            split: ``train``, ``val`` or ``test``.
            needs: Inputs of the consistency terms: which languages to score, and which hidden states and next-token
                distributions to return. These are not kept.
            layer: Index of the hidden states at the ends of the prompts, if they are needed.
        """
        if split == "train" or needs.pooled_states or needs.reference_states or needs.reference_next_tokens:
            return self.score(batch, needs, layer)
        known = self._evaluated.get(split, ReferenceScores.union([]))
        if not known.missing(batch.keys.tolist()):
            return known.grid(batch)
        grid = self.score(batch, needs)
        self._evaluated[split] = ReferenceScores.union([known, ReferenceScores.of(batch, grid)])
        return grid

    def score(self, batch: Batch, needs: Needs, layer: int | None = None) -> Grid:
        """Score the responses of a batch, without gradients and without looking up kept scores.

        Args:
            batch: Examples on the device of the policy.
            needs: Inputs of the consistency terms.
            layer: Index of the hidden states at the ends of the prompts, if they are needed.
        """
        rows = rows_to_score(batch, needs)
        move(self._policy, batch.keys.device)
        with as_reference(self._policy):
            layer = layer if needs.reference_states else None
            return run_batch(self._policy, rows, layer, needs.pooled_states, needs.reference_next_tokens)

    @torch.no_grad()
    def update(self, policy: Policy, share: float) -> None:
        """Move each weight to ``share * policy + (1 - share) * reference``. The reference must be a copy.

        Args:
            policy: The policy that is trained.
            share: Share of the policy, above 0 and at most 1.
        """
        move(self._policy, next(policy.parameters()).device)
        for own, other in zip(self._policy.parameters(), policy.parameters(), strict=True):
            own.lerp_(other, share)
        self._evaluated.clear()  # computed with the old weights

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights of the reference model."""
        return dict(self._policy.state_dict())

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Load the weights that :meth:`state_dict` returned."""
        load_into(self._policy.state_dict(), state)
        self._evaluated.clear()
