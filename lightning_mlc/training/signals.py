"""A run that is asked to end: by a scheduler that preempts it, by ``torchrun``, by ``kill``."""

from __future__ import annotations

import signal
import threading
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import distributed

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class EndWhenAsked(Callback):
    """Ends training after SIGTERM or SIGUSR1 to any process: all of them before the same batch.

    Lightning's own handlers exchange tensors wherever a signal finds a process, be it in the middle of a sum over
    processes, and each process ends when it notices; under SLURM they save between two halves of a step. Here a handler
    does no more than take note.
    """

    def __init__(self) -> None:
        self._asked = False
        self._group: Any = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            self._group = distributed.new_group(backend="gloo")  # which does not wait for a GPU
        # Lightning sets its handlers after this, and before the processes that prepare batches, which inherit them. In
        # its place, not in a later hook; at the end it puts back what was there before.
        connector: Any = trainer._signal_connector
        set_handlers = connector.register_signal_handlers

        def listen() -> None:
            set_handlers()
            if threading.current_thread() is threading.main_thread():
                for number in SIGNALS:
                    signal.signal(number, self._take_note)

        connector.register_signal_handlers = listen
        # Tells the processes of a signal before each batch, by way of the GPU.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def _take_note(self, *_: Any) -> None:
        # Workers that prepare batches do so too, and nothing else: a scheduler may signal all processes there are.
        self._asked = True

    def on_train_batch_start(self, *_: Any) -> None:
        self._end_if_asked()

    def on_validation_batch_start(self, *_: Any) -> None:
        self._end_if_asked()

    def _end_if_asked(self) -> None:
        asked = torch.tensor([self._asked], dtype=torch.int32)
        if self._group is not None:
            distributed.all_reduce(asked, distributed.ReduceOp.MAX, group=self._group)
        if asked:
            raise SIGTERMException
