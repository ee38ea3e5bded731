"""How long a step takes, in ``metrics.csv``: a callback that a study adds to ``fit``."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_mlc.module import AlignmentModule

COLUMN = "speed/seconds_per_step"


class StepClock(Callback):
    """Logs the wall time of each optimizer step, from its first micro-batch to its last."""

    _started = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, AlignmentModule)
        if pl_module.ends_window(batch_idx):
            pl_module.log(COLUMN, time.perf_counter() - self._started)
