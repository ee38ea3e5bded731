"""A callback that ends a run at a given place, for tests that resume it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback


class Kill(Callback):
    """Sends ``signal_number`` to its own process when micro-batch ``batch`` of the run (from 0) starts.

    Once: ``marker`` is a file that says it has been done.
    ``while_writing``: in the middle of the first checkpoint after that instead.
    """

    def __init__(
        self, marker: str, batch: int, signal_number: int = signal.SIGKILL, while_writing: bool = False
    ) -> None:
        self.marker = Path(marker)
        self.batch = batch
        self.signal_number = signal_number
        self.while_writing = while_writing
        self.seen = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.seen == self.batch and not self.marker.exists():
            self.marker.touch()
            if self.while_writing:
                torch.save = self._save_half  # type: ignore[assignment]
            else:
                os.kill(os.getpid(), self.signal_number)
        self.seen += 1

    def _save_half(self, checkpoint: Any, file: Any) -> None:
        file.write(b"PK\x03\x04 and then the power went")
        file.flush()
        os.kill(os.getpid(), self.signal_number)
