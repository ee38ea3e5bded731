"""Saving checkpoints: each is written whole or not at all, and a run can resume from it exactly.

A resumed run is identical to one that was never interrupted, because:

- Checkpoints hold the weights, the optimizer, the scheduler and the progress of Lightning's loops.
- The order of the examples depends only on seed and epoch (:mod:`lightning_mlc.data.sampling`).
- Random numbers depend only on seed, step and process (:mod:`lightning_mlc.training.resumption`).
- A checkpoint is the state at the end of an optimizer step (:class:`Checkpoint`).
"""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.linalg import vector_norm

from lightning_mlc.checkpoints.finding import require_room
from lightning_mlc.checkpoints.format import cannot_write, read_checkpoint, remove
from lightning_mlc.errors import CheckpointError, UserError, did_you_mean
from lightning_mlc.files.atomic import UNFINISHED, whole_file
from lightning_mlc.lightning_internals import CheckpointHooks, ends_window, rewind_to_step, validation_follows
from lightning_mlc.processes import raise_together

logger = logging.getLogger(__name__)

VALIDATION = "val/"
"""Prefix of the names of validation metrics."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint file whole or not at all.

    Lightning's own builds the whole file in memory, and writes it to the system's temporary folder first. If that is on
    another file system, the file is then copied, and a kill during the copy leaves half a checkpoint under its final
    name.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(target) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            raise cannot_write(target, error) from error

    def load_checkpoint(self, path: Any, *_arguments: Any, **_keywords: Any) -> dict[str, Any]:
        """The checkpoint at ``path``, a file or a folder of FSDP2. No code in it is run."""
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        """Remove the file or folder at ``path``. It stops being a checkpoint as soon as removal starts."""
        remove(Path(path))


class Checkpoint(CheckpointHooks):
    """Lightning's ``ModelCheckpoint``, but a run can resume exactly from each checkpoint.

    A run that was resumed leaves the same checkpoints as one that was never interrupted. If validation follows a step,
    the checkpoint is saved after the validation, because Lightning would skip the validation when it resumes.
    """

    _in_optimizer_step = False
    _validation_follows = False
    _due = False
    _is_monitored = False
    """Whether the monitored metric has been found."""

    @property
    def state_key(self) -> str:
        # Without the interval, so that a run that resumes with another one still replaces its earlier checkpoints.
        return f"{type(self).__qualname__}{{monitor={self.monitor}}}"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        error = None
        if trainer.is_global_zero and self.dirpath is not None:
            folder = Path(self.dirpath)
            weights = sum(p.numel() * p.element_size() for p in pl_module.parameters())
            # Adam keeps two numbers for each weight that it trains, most others fewer.
            trained = sum(p.numel() * p.element_size() for p in pl_module.parameters() if p.requires_grad)
            try:
                require_room(folder, weights + 2 * trained)
                for unfinished in folder.glob(f".*{UNFINISHED}"):  # left by a run that was killed
                    remove(unfinished)
            except UserError as found:
                error = found
        raise_together(error)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self._resumes_own(trainer):  # its newest checkpoint exists already
            self.mark_saved(trainer.global_step, str(trainer.ckpt_path))

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The validation before training shows which metrics exist. Lightning would fail only at the first save.
        monitors = [("checkpoint.monitor", self.monitor)]
        others: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        stopping = [callback for callback in others if isinstance(callback, EarlyStopping)]
        monitors += [("trainer.callbacks", callback.monitor) for callback in stopping]
        for option, monitor in monitors:
            if monitor is not None and monitor.startswith(VALIDATION):
                self._require_metric(trainer, option, monitor)

    def _require_metric(self, trainer: Trainer, option: str, monitor: str) -> None:
        metrics = self.known_metrics(trainer)
        if monitor not in metrics:
            known = [name for name in metrics if "/" in name]
            few = f"there are {', '.join(sorted(known)[:4])}, ..." if known else "nothing is validated"
            raise CheckpointError(option, f"there is no metric {monitor}" + did_you_mean(monitor, known, f"; {few}"))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self._in_optimizer_step = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._in_optimizer_step = False
        if not ends_window(trainer, batch_idx):  # where `train_time_interval` would save, in the middle of a step
            return
        if self.monitor is not None and not self.monitor.startswith(VALIDATION) and not self._is_monitored:
            self._require_metric(trainer, "checkpoint.monitor", self.monitor)
            self._is_monitored = True
        self._validation_follows = validation_follows(trainer)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._validation_follows = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._due and not trainer.sanity_checking:
            self._due = False
            self.save_now(trainer)
        super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning would not save the steps after the last multiple of `every_n_train_steps`.
        if self.can_save(trainer):
            if self.monitor is None:
                self.save_now(trainer)
            else:  # the metric may be that of an earlier step
                self.write_latest(trainer, self.known_metrics(trainer))
        super().on_train_end(trainer, pl_module)

    def write_best(self, trainer: Trainer, metrics: dict[str, Tensor]) -> None:
        if self._validation_follows:
            self._due = True
        else:
            super().write_best(trainer, metrics)

    def write_last(self, trainer: Trainer, metrics: dict[str, Tensor]) -> None:
        if not self._validation_follows:
            super().write_last(trainer, metrics)

    def write(self, trainer: Trainer, path: str) -> None:
        raise_together(_broken_weights(trainer))  # before any process begins to write
        error = None
        try:
            super().write(trainer, path)
        except UserError as found:
            error = found
            trainer.strategy.barrier()  # the processes that write nothing wait there
        raise_together(error)

    def may_remove(self, trainer: Trainer, previous: str, current: str) -> bool:
        # Lightning never removes the checkpoint that a run resumed from, so each resumption would leave one behind.
        if previous != current and self._resumes_own(trainer) and Path(previous).resolve() == _resumed_from(trainer):
            return True
        return super().may_remove(trainer, previous, current)

    def _resumes_own(self, trainer: Trainer) -> bool:
        """Whether the run resumes from a checkpoint in the folder that it writes to."""
        resumed = _resumed_from(trainer)
        return resumed is not None and self.dirpath is not None and resumed.parent == Path(self.dirpath).resolve()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        # The weights may be half updated, or the error is that no checkpoint can be written.
        if self._in_optimizer_step or isinstance(exception, CheckpointError):
            return
        # Saving needs all processes. One that failed alone would wait for the others for ever.
        if trainer.world_size > 1 and not isinstance(exception, SIGTERMException):
            return
        if trainer.world_size == 1 and (broken := _broken_weights(trainer)) is not None:
            logger.warning("%s", broken)  # and not raised, because the exception is the run's error
            return
        rewind_to_step(trainer)
        if self.monitor is not None or not self.can_save_on_exception(trainer):
            super().on_exception(trainer, pl_module, exception)
        else:  # as at any other step, so that the resumed run knows this checkpoint and replaces it
            self.save_now(trainer)


def _broken_weights(trainer: Trainer) -> CheckpointError | None:
    """The error if a trained weight is not finite, on this process.

    A loss can be finite and its gradient not. The next step would show it, but a checkpoint may come first, and would
    replace one from which the run can continue.
    """
    trained = {name: p.detach() for name, p in trainer.lightning_module.named_parameters() if p.requires_grad}
    parts = {name: p.to_local() if isinstance(p, DTensor) else p for name, p in trained.items()}
    # The largest absolute value of each, without a copy of it. NaN is larger than all others.
    finite = {name: vector_norm(part, math.inf).isfinite() for name, part in parts.items() if part.numel()}
    if not finite or bool(torch.stack(list(finite.values())).all()):
        return None
    broken = next(name for name, value in finite.items() if not value)
    return CheckpointError(
        None,
        f"{broken} is not finite after step {trainer.global_step}, so no checkpoint is written; lower the learning "
        "rate, or clip gradients (trainer.gradient_clip_val), and continue from an earlier checkpoint",
    )


def _resumed_from(trainer: Trainer) -> Path | None:
    return None if trainer.ckpt_path is None else Path(trainer.ckpt_path).resolve()
