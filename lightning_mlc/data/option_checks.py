"""What the options of the data may not be, and what options of the trainer the data does not support."""

from __future__ import annotations

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_mlc.errors import UserError
from lightning_mlc.lightning_internals import adds_distributed_sampler


def require_at_least(options: dict[str, int | None], least: int) -> None:
    """Refuse options below ``least``; null is allowed."""
    for option, value in options.items():
        if value is not None and value < least:
            raise UserError(f"data.{option}", f"must be at least {least}, got {value}")


def require_source(source: str, languages: tuple[str, ...] | None) -> None:
    """Refuse languages without the source language."""
    if languages is not None and source not in languages:
        raise UserError("data.languages", f"lacks the source language '{source}'; add it or set data.source_language")


def require_share(val_share: float) -> None:
    """Refuse a share that leaves nothing to train on."""
    if not 0 <= val_share < 1:
        raise UserError("data.val_share", f"must be from 0 to below 1, got {val_share}")


def require_one_size(batch_size: int | None, tokens_per_batch: int | None) -> None:
    """Refuse two sizes of a micro-batch."""
    if batch_size is not None and tokens_per_batch is not None:
        raise UserError(
            "data.tokens_per_batch",
            f"cannot be given together with data.batch_size {batch_size}; set one of them to null",
        )


def require_supported(trainer: Trainer) -> None:
    """Refuse options of the trainer that change which examples a step has."""
    if trainer.overfit_batches:  # type: ignore[attr-defined]
        raise UserError("trainer.overfit_batches", "is not supported; give a small data.train_path instead")
    # Lightning's own sampler would divide this process's share among the processes once more.
    if adds_distributed_sampler(trainer) and trainer.world_size > 1:
        raise UserError(
            "trainer.use_distributed_sampler",
            "is not supported: examples are already divided among the processes; set it to false",
        )
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(callback, GradientAccumulationScheduler) for callback in callbacks):
        raise UserError(
            "trainer.callbacks",
            "GradientAccumulationScheduler is not supported, because the totals of a step are planned ahead; "
            "use trainer.accumulate_grad_batches",
        )


def require_one_each(examples: int, processes: int, path: str) -> None:
    """Raises:
    UserError: There are fewer training examples than processes.
    """
    if examples < processes:
        raise UserError(
            "data.train_path",
            f"{path} has {examples} examples to train on, fewer than the {processes} processes; give more data or "
            "lower trainer.devices",
        )
