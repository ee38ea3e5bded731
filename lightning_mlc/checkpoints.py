"""Checkpoints that a run can be killed around: written whole or not at all, and resumed from exactly.

What makes a resumed run equal to one that was never interrupted: checkpoints hold weights, optimizer, scheduler
and the loops' progress (Lightning); the order of the examples follows from seed and epoch
(:mod:`lightning_mlc.data.sampling`); random numbers follow from seed, step and process (:class:`ExactResume`); and
what is saved is the state at the end of an optimizer step (:class:`Checkpoint`).
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_mlc.checkpoint_format import is_folder, read_checkpoint
from lightning_mlc.errors import UserError
from lightning_mlc.metrics_file import MetricsFile


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames, so that a checkpoint is there as a whole or not at all.

    Lightning's own writes the file a second time in memory, and then in the system's temporary folder, from where it is
    copied if that is another file system: a kill in between leaves half a checkpoint under its final name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        target = Path(path)
        unfinished = target.with_name(f".{target.name}.unfinished")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with unfinished.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(target)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            unfinished.unlink(missing_ok=True)
            raise UserError(
                f"checkpoint: cannot write {target} ({_one_line(error)}); training stopped, the checkpoints before it "
                "are whole: make room and continue with --ckpt_path last"
            ) from error

    def load_checkpoint(self, path: Any, *_arguments: Any, **_keywords: Any) -> dict[str, Any]:
        """The checkpoint at ``path``, also if that is a folder of FSDP2, with nothing in it run."""
        return read_checkpoint(Path(path))


class Checkpoint(ModelCheckpoint):
    """Lightning's, which after an exception saves only what can be resumed from exactly."""

    _in_optimizer_step = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self.dirpath is not None:
            weights = sum(p.numel() * p.element_size() for p in pl_module.parameters())
            # Adam keeps two numbers for each weight that it trains, most others fewer.
            trained = sum(p.numel() * p.element_size() for p in pl_module.parameters() if p.requires_grad)
            require_room(Path(self.dirpath), weights + 2 * trained)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._in_optimizer_step = True

    def on_train_batch_end(self, *arguments: Any, **keywords: Any) -> None:
        self._in_optimizer_step = False
        super().on_train_batch_end(*arguments, **keywords)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # Weights may be half updated; or the file that could not be written is this one.
        if self._in_optimizer_step or (isinstance(exception, UserError) and str(exception).startswith("checkpoint:")):
            return
        # To save takes all processes, and one that failed alone would wait for the others for ever.
        if trainer.world_size > 1 and not isinstance(exception, SIGTERMException):
            return
        _rewind_to_step(trainer)
        super().on_exception(trainer, pl_module, exception)


def _rewind_to_step(trainer: Trainer) -> None:
    """Count only the micro-batches that the weights have seen: gradients of a step begun are not saved."""
    loop = trainer.fit_loop.epoch_loop
    progress: Any = loop.batch_progress
    beyond = 0 if progress.is_last_batch else progress.current.processed % trainer.accumulate_grad_batches
    for counts in (progress.current, progress.total):
        counts.ready = counts.started = counts.completed = counts.processed = counts.processed - beyond


class ExactResume(Callback):
    """Makes a resumed run do what the uninterrupted one would have done, where checkpoints cannot say.

    Random numbers (dropout) of a micro-batch follow from the run's seed, its place in the run, and the process: there
    is no generator's state to store. And ``metrics.csv`` is cut back to what the checkpoint has seen.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.continue_from(trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # By this Lightning numbers what it logs; a run resumed at the start of an epoch would be one ahead.
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step
        place = [self._seed, trainer.current_epoch, batch_idx, trainer.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0] >> 1))


def checkpoint_folder(out: str) -> str:
    """Where a run with this ``out`` keeps its checkpoints."""
    return str(Path(out) / "checkpoints")


def checkpoint_files(out: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [path for path in Path(checkpoint_folder(str(out))).glob("*.ckpt") if _is_whole(path)]
    # A link comes after what it points to.
    return sorted(found, key=lambda path: (path.stat().st_mtime, path.is_symlink()))


def find_checkpoint(path: Path) -> Path:
    """The checkpoint at ``path``, or the newest whole one of the run whose folder that is.

    Raises:
        UserError: There is none.
    """
    if path == Path("last"):
        raise UserError("ckpt_path: the last checkpoint of which run? Give its folder, as in --ckpt_path runs/mlc")
    if not path.is_dir() or is_folder(path) or path.suffix == ".ckpt":
        return path
    run = path.parent if path.name == Path(checkpoint_folder("")).name else path
    found = checkpoint_files(run)
    if not found:
        raise UserError(f"ckpt_path: there is no whole checkpoint in {checkpoint_folder(str(run))}")
    return found[-1].resolve()


def _is_whole(path: Path) -> bool:
    """Whether ``path`` is a checkpoint that was written to its end."""
    if path.is_dir():  # of several processes: what lists the parts is written last
        return is_folder(path)
    return zipfile.is_zipfile(path)


def require_room(out: Path, size: int) -> None:
    """Raises:
    UserError: ``out`` cannot be written to, or the disk has less than ``size`` bytes, a checkpoint's, left.
    """
    folder = out
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK) or not folder.is_dir():
        raise UserError(f"out: cannot write to {folder}; give another --out")
    free = os.statvfs(folder)
    available = free.f_bavail * free.f_frsize
    if available < size:
        raise UserError(
            f"out: {folder} has {available / 1e9:.1f} GB left, a checkpoint takes about {size / 1e9:.1f} GB; "
            "make room or give another --out"
        )


def _one_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
