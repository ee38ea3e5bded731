"""The folder of a run. A lock keeps two runs from writing to it at the same time."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_mlc.errors import UserError
from lightning_mlc.processes import raise_together
from lightning_mlc.training.metrics_file import METRICS

CONFIG = "config.yaml"
"""The file that every run's folder has. A run locks it, and the system releases the lock however the run ends."""
WAIT = 15.0
"""Seconds to wait for a lock. After a run was killed, its workers hold the lock until they notice."""

logger = logging.getLogger("lightning_mlc")
_held: list[int] = []
"""Descriptors of the locks that this process holds."""


class RunFolder(Callback):
    """Locks ``out`` for a ``fit``. It must come before all callbacks that write.

    Args:
        is_new: The run needs a new folder, so it must be the one that creates ``config.yaml``.
        begins: The run starts without a checkpoint, so metrics of an earlier attempt are removed.
    """

    def __init__(self, is_new: bool, begins: bool) -> None:
        self._is_new = is_new
        self._begins = begins

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        error = None
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            try:
                _held.append(take(folder, self._is_new))
            except UserError as found:
                error = found
            else:
                if self._begins:
                    (folder / METRICS).unlink(missing_ok=True)
        raise_together(error)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        give_back()


def give_back() -> None:
    """Release the locks of this process.

    A command calls this at its end. A callback cannot do it after an error, because checkpoints are written after the
    error hooks have run.
    """
    while _held:
        os.close(_held.pop())


def take(folder: Path, is_new: bool, wait: float | None = None) -> int:
    """Lock ``folder`` for this process. It and its ``config.yaml`` are created if they do not exist.

    Args:
        folder: A run's ``out``.
        is_new: This process must create ``config.yaml``. The file system lets only one process create it.
        wait: Seconds to wait for another process that holds the lock; ``WAIT`` by default.

    Returns:
        The file descriptor that holds the lock until it is closed.

    Raises:
        UserError: Another run uses the folder, or it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / CONFIG, os.O_RDWR | os.O_CREAT | (os.O_EXCL if is_new else 0), 0o666)
    except FileExistsError as error:
        raise UserError("out", f"another run has begun in {folder}; give another --out") from error
    except OSError as error:
        raise UserError("out", f"cannot write to {folder} ({error.strerror}); give another --out") from error
    try:
        _hold(lock, folder, WAIT if wait is None else wait)
    except BaseException:
        os.close(lock)
        raise
    return lock


def _hold(lock: int, folder: Path, wait: float) -> None:
    try:
        import fcntl
    except ImportError:  # the system has no such locks
        return
    until = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() >= until:
                raise UserError(
                    "out", f"another run is writing to {folder}; wait until it ends, or give another --out"
                ) from error
            time.sleep(0.2)
        except OSError as error:  # some file systems of clusters have no locks
            logger.warning(
                "%s cannot be locked (%s); do not start a second run there while this one runs",
                folder,
                error.strerror,
            )
            return
        else:
            return
