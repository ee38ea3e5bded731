"""A run that resumes from a checkpoint computes the same as a run that was never interrupted.

Checkpoints hold the weights, the optimizer, the scheduler and the progress of the loops. This module takes care of
everything else: random numbers, the rows of ``metrics.csv`` for steps that are repeated, and the progress of a run that
resumes on another number of processes.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lightning_mlc.checkpoints.provenance import Provenance
from lightning_mlc.data.datamodule import MultilingualData
from lightning_mlc.errors import UserError
from lightning_mlc.lightning_internals import number_logs_by_step, restart_batches
from lightning_mlc.processes import DataParallel, is_first, raise_together
from lightning_mlc.training.metrics_file import MetricsFile
from lightning_mlc.training.recipe import describe_optimizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Epoch:
    """The examples of an epoch, and how they are divided into steps and among processes."""

    seed: int
    examples: int
    batch_size: int
    tokens_per_batch: int | None
    accumulate: int
    processes: int
    """How many shares the examples are divided into. Processes that run the same examples count as one."""
    strategy: str
    micro_batches: int
    """How many each process runs."""
    tensor_parallel: int = 1
    """How many processes run the same examples."""
    data: str | None = None
    """The fingerprint of the training data. None in checkpoints of earlier versions, for which it is not checked."""
    order: str | None = None
    """A digest of everything else that determines the order of the examples. None as for ``data``."""

    @classmethod
    def of(cls, trainer: Trainer, micro_batches: int) -> Epoch:
        """The epochs of the run of ``trainer``, in which each process runs that many ``micro_batches``."""
        data, share = _data(trainer), DataParallel.of(trainer)
        return cls(
            seed=data.seed,
            examples=len(data.keys("train")),
            batch_size=data.batch_size,
            tokens_per_batch=data.tokens_per_batch,
            accumulate=int(trainer.accumulate_grad_batches),
            processes=share.size,
            strategy=type(trainer.strategy).__name__.removesuffix("Strategy"),
            micro_batches=micro_batches,
            tensor_parallel=share.processes,
            data=data.fingerprint("train"),
            order=data.order_digest(),
        )

    @property
    def layout(self) -> str:
        """The processes and the strategy, in words."""
        count = self.processes * self.tensor_parallel
        split = f", tensor parallel {self.tensor_parallel}" if self.tensor_parallel > 1 else ""
        return f"{count} process{'es' * (count > 1)} ({self.strategy}{split})"

    @property
    def step(self) -> int:
        """Examples in an optimizer step. With ``tokens_per_batch``: micro-batches."""
        return (1 if self.tokens_per_batch else self.batch_size) * self.accumulate * self.processes

    def changes(self, before: Epoch) -> str:
        """What has changed since ``before`` that determines the examples or their order. Empty if nothing has."""
        found = [
            f"{name} was {getattr(before, name)} and is now {getattr(self, name)}"
            for name in ("seed", "examples", "tokens_per_batch")
            if getattr(self, name) != getattr(before, name)
        ]
        if before.data is not None and self.data != before.data:
            found.append("data.train_path, its tokenizer or the length limits give other examples")
        elif before.order is not None and self.order != before.order:
            found.append("the split, or the cost of an example, has changed")
        return ", ".join(found)

    def done(self, before: Epoch, processed: int) -> int:
        """The number of micro-batches now that hold the same examples as the first ``processed`` ones ``before``.

        Raises:
            UserError: No number does, so examples would be left out or trained on twice.
        """
        if processed == before.micro_batches:
            return self.micro_batches
        if changes := self.changes(before):
            raise UserError(
                "ckpt_path",
                "the checkpoint is in the middle of an epoch, and the examples or their order have changed "
                f"({changes}): some would be left out or trained on twice; undo the change, or start a new run",
            )
        # A checkpoint is written at the end of a step.
        taken = processed // before.accumulate * before.step
        if taken % self.step or (self.tokens_per_batch and self.step != before.step):
            unit = "micro-batches" if self.tokens_per_batch else "examples"
            size = "trainer.accumulate_grad_batches x processes"
            raise UserError(
                "ckpt_path",
                f"the checkpoint was written after {taken} {unit} of an epoch, in steps of {before.step}; "
                f"in steps of {self.step} some would be left out or trained on twice; keep "
                f"{size if self.tokens_per_batch else f'data.batch_size x {size}'} at {before.step}",
            )
        return min(taken // self.step * self.accumulate, self.micro_batches)


class ExactResume(Callback):
    """Makes a resumed run compute the same as an uninterrupted one, in what checkpoints do not hold.

    - The random numbers of a micro-batch (dropout) depend only on the run's seed, the place of the micro-batch in the
      run, and the process's share of the examples. So no state of a generator is stored, and processes with the same
      share draw the same numbers.
    - Rows of ``metrics.csv`` for steps after the checkpoint are dropped.
    - Lightning counts progress in micro-batches of a process. If these have changed, progress is converted.
    """

    KEY = "lightning_mlc.epoch"

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._optimizer: dict[str, Any] | None = None
        """The description of the checkpoint's optimizer."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[self.KEY] = asdict(Epoch.of(trainer, int(trainer.num_training_batches)))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING or self.KEY not in checkpoint:
            return
        # Lightning has not counted the micro-batches yet.
        before, now = Epoch(**checkpoint[self.KEY]), Epoch.of(trainer, _data(trainer).micro_batches_of_epoch())
        error = None
        loop = checkpoint["loops"]["fit_loop"]
        try:
            _require_more_to_do(trainer, loop)
            _convert_progress(loop["epoch_loop.batch_progress"], before, now)
        except UserError as found:
            error = found
        raise_together(error)
        self._optimizer = (Provenance.read(checkpoint).recipe or {}).get("optimizer")
        if is_first():
            _warn_of_differences(before, now)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._optimizer is not None:
            _require_same_optimizer(self._optimizer, describe_optimizer(trainer.optimizers[0]))
        for its_logger in trainer.loggers:
            if isinstance(its_logger, MetricsFile):
                its_logger.continue_from(trainer.global_step)
        # A schedule asks for the number of batches. Lightning then fetches the first batches before the checkpoint is
        # read, and from workers that a signal would end.
        restart_batches(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        number_logs_by_step(trainer)
        place = [self._seed, trainer.current_epoch, batch_idx, DataParallel.of(trainer).rank]
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0] >> 1))


def _data(trainer: Trainer) -> MultilingualData:
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    assert isinstance(data, MultilingualData)
    return data


def _require_more_to_do(trainer: Trainer, loop: dict[str, Any]) -> None:
    """Raises:
    UserError: The progress ``loop`` of the checkpoint is beyond the last epoch of the run.
    """
    begun = int(loop["epoch_progress"]["current"]["started"])
    if trainer.max_epochs is not None and -1 < trainer.max_epochs < begun:
        raise UserError(
            "trainer.max_epochs",
            f"is {trainer.max_epochs}, but the checkpoint is of epoch {begun}; "
            "give a larger number, or start a new run",
        )
    if begun == trainer.max_epochs and loop["epoch_loop.batch_progress"]["is_last_batch"] and is_first():
        logger.warning("ckpt_path: the run of the checkpoint is done; give a larger trainer.max_epochs to continue it")


def _require_same_optimizer(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises:
    UserError: The checkpoint has the state of the optimizer ``before``, which does not fit the optimizer ``now``.
    """
    if before["name"] != now["name"]:
        error = UserError(
            "model.optimizer",
            f"is {now['name']}, but the checkpoint has the state of {before['name']}; "
            "resume with that, or start a new run from an export",
        )
        error.is_shared = True
        raise error
    changed = [name for name in before.keys() & now.keys() if before[name] != now[name]]
    if changed and is_first():
        kept = ", ".join(f"{name} {before[name]} and not {now[name]}" for name in sorted(changed))
        logger.warning("ckpt_path: the optimizer keeps the options in the checkpoint: %s", kept)


def _convert_progress(progress: dict[str, Any], before: Epoch, now: Epoch) -> None:
    """Convert ``progress`` of a checkpoint from the micro-batches of ``before`` to those of ``now``, in place."""
    current, total = progress["current"], progress["total"]
    done = now.done(before, current["processed"])
    epochs = (total["processed"] - current["processed"]) // before.micro_batches
    for counts, count in ((total, epochs * now.micro_batches + done), (current, done)):
        behind = counts["processed"] - counts["completed"]  # the hooks at the end of a batch run before it counts
        counts.update(ready=count, started=count, processed=count, completed=count - behind)
    progress["is_last_batch"] = done == now.micro_batches


def _warn_of_differences(before: Epoch, now: Epoch) -> None:
    if changes := now.changes(before):  # they were accepted, so the checkpoint is at the end of an epoch
        logger.warning("ckpt_path: the next epoch trains on other examples, or in another order (%s)", changes)
    if (before.layout, before.step) == (now.layout, now.step):
        return
    if before.step == now.step:
        steps = "the steps have the same examples"
    else:
        steps = f"a step has {now.step} examples instead of {before.step}"
    reason = "sums are computed in another order"
    if (before.processes, before.tensor_parallel) != (now.processes, now.tensor_parallel):
        reason += " and dropout differs"
    logger.warning(
        "ckpt_path: the run resumes on %s instead of %s: %s; %s, so its results are not bitwise the same",
        now.layout,
        before.layout,
        steps,
        reason,
    )
