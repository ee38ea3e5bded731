"""Reference scores of a whole data set, computed in one pass before training and then looked up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from functools import cache

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_mlc.consistency import Needs
from lightning_mlc.data.batches import Batch
from lightning_mlc.data.datamodule import MultilingualData, Split
from lightning_mlc.data.scoring import describe_scoring, scoring_loader
from lightning_mlc.distributed.sharding import FSDP2, move
from lightning_mlc.errors import UserError
from lightning_mlc.models.forward import Grid, run_batch
from lightning_mlc.models.policy import Policy
from lightning_mlc.progress.bars import track
from lightning_mlc.reference.online import as_reference
from lightning_mlc.reference.scores import ReferenceScores
from lightning_mlc.reference.store import ScoreStore

SECONDS_PER_SHARD = 30.0
"""Scores are written at this interval. A process that is killed loses at most the work of one interval."""

SPLITS: dict[str, tuple[Split, ...]] = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",)}
"""The splits that each command scores."""
NAMES: dict[Split, str] = {"train": "training", "val": "validation", "test": "test"}
"""Names of the splits in progress bars."""


class PrecomputedReference:
    """Looks up the initial model's scores. Every example that the trainer's command uses has one.

    Args:
        scores: Scores by split, on the device of the policy.
    """

    def __init__(self, scores: Mapping[str, ReferenceScores]) -> None:
        self._scores = dict(scores)

    def grid(self, batch: Batch, split: str, needs: Needs, layer: int | None = None) -> Grid:
        """Look up the scores of a batch.

        Args:
            batch: Examples on the device of the policy.
            split: ``train``, ``val`` or ``test``.
            needs: Must need no hidden states and no distributions, because none are kept. :func:`precompute` decides
                which languages have scores.
            layer: Has no effect.
        """
        assert not needs.pooled_states, "ReferenceSettings.check refuses this at start"
        assert not needs.reference_states, "ReferenceSettings.check refuses this at start"
        assert not needs.reference_next_tokens, "ReferenceSettings.check refuses this at start"
        return self._scores[split].grid(batch)


def precompute(
    trainer: Trainer,
    data: MultilingualData,
    initial: Callable[[], Policy],
    description: Mapping[str, str],
    name: str,
    translations: bool = False,
) -> PrecomputedReference:
    """Read the initial model's scores from the cache, and compute those that are missing.

    All processes call this together. Each computes a part, and all get all scores. New scores are written below
    ``data.cache_dir``, shard by shard, so that an interrupted pass resumes where it stopped.

    Args:
        trainer: The Trainer. Its command decides which splits are scored.
        data: The data, set up.
        initial: Returns the initial model. Called only if scores are missing.
        description: The result of :func:`~lightning_mlc.reference.fingerprint.describe_model`. The one of the first
            process is used.
        name: Name of the model, for the manifest.
        translations: Whether training needs scores in all languages, instead of only in the source language.
            Validation and test always get all languages.

    Raises:
        UserError: Log-probabilities are not finite.
    """
    # Random numbers drawn here must not change the run that follows. Batches are made on the CPU, even where Lightning
    # has set another default device.
    with isolate_rng(), torch.device("cpu"):
        assert trainer.state.fn is not None
        splits = [split for split in SPLITS[trainer.state.fn.value] if data.keys(split)]
        load = cache(initial)
        in_source = {split: split == "train" and not translations for split in splits}
        scores = {split: _scores(trainer, data, split, in_source[split], load, description, name) for split in splits}
        # Now, because a step would wait for this copy.
        return PrecomputedReference({split: each.to(trainer.strategy.root_device) for split, each in scores.items()})


def _scores(
    trainer: Trainer,
    data: MultilingualData,
    split: Split,
    in_source: bool,
    initial: Callable[[], Policy],
    description: Mapping[str, str],
    name: str,
) -> ReferenceScores:
    parts = trainer.strategy.broadcast({**description, **describe_scoring(data, split, in_source)})
    store = ScoreStore(data.cache_dir / "reference", parts, {"model": name})
    # All processes use what the first one finds, so that they agree on which scores are missing.
    known = trainer.strategy.broadcast(store.read() if trainer.is_global_zero else ReferenceScores.union([]))
    missing = known.missing(data.keys(split))
    if not missing:
        return known
    if trainer.is_global_zero and not len(known.keys):
        store.explain_absence()
    loader = scoring_loader(data, split, in_source, frozenset(missing))
    languages = 1 if in_source else len(data.languages)
    shown = trainer.progress_bar_callback is not None
    with (
        as_reference(move(initial(), trainer.strategy.root_device)) as policy,
        track(f"reference scores, {NAMES[split]} data", len(loader), "batches", shown=shown) as work,
    ):
        batches: Iterable[Batch] = work.each(loader)
        if isinstance(trainer.strategy, FSDP2):
            batches = trainer.strategy.in_step(batches)
        new = _keep((_score(policy, batch, languages, trainer) for batch in batches), store)
    return ReferenceScores.union([known, *_of_all_processes(new, trainer)])


def _score(policy: Policy, batch: Batch, languages: int, trainer: Trainer) -> ReferenceScores:
    with trainer.precision_plugin.forward_context():  # as in training
        grid = run_batch(policy, batch.to(trainer.strategy.root_device, non_blocking=True))
    scores = ReferenceScores.of(batch, grid, languages).to("cpu")
    if not bool(torch.isfinite(scores.logps).all()):
        raise UserError(
            "model.reference",
            "the log-probabilities of the initial model are not finite (batch of "
            f"{', '.join(batch.ids)}); check those rows, or trainer.precision",
        )
    return scores


def _keep(parts: Iterable[ReferenceScores], store: ScoreStore) -> ReferenceScores:
    """Write ``parts`` to ``store`` as they come, and return their union. After an exception, write what came before."""
    shards: list[ReferenceScores] = []
    unwritten: list[ReferenceScores] = []

    def write() -> None:
        if unwritten:
            shards.append(ReferenceScores.union(unwritten))
            store.append(shards[-1])
            unwritten.clear()

    written = time.monotonic()
    try:
        for part in parts:
            unwritten.append(part)
            if time.monotonic() - written > SECONDS_PER_SHARD:
                write()
                written = time.monotonic()
    finally:
        write()
    return ReferenceScores.union(shards)


def _of_all_processes(scores: ReferenceScores, trainer: Trainer) -> list[ReferenceScores]:
    if trainer.world_size == 1:
        return [scores]
    gathered: list[ReferenceScores | None] = [None] * trainer.world_size
    torch.distributed.all_gather_object(gathered, scores)
    return [part for part in gathered if part is not None]
