"""What is read from Lightning's loops and trainer, or done to them, beyond what it documents."""

from __future__ import annotations

from lightning.pytorch import Trainer


def ends_window(trainer: Trainer, batch_idx: int) -> bool:
    """Whether an optimizer step follows the micro-batch ``batch_idx`` of the epoch."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
