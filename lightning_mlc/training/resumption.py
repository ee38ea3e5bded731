"""A run that goes on from a checkpoint does what it would have done without the interruption.

Checkpoints hold weights, optimizer, scheduler and the loops' progress. Here is what they cannot hold: random numbers,
the rows of ``metrics.csv`` of steps that are made again, and what progress means to other processes than those that
made it.
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
    """What an epoch is made of, and who trains on it."""

    seed: int
    examples: int
    batch_size: int
    tokens_per_batch: int | None
    accumulate: int
    processes: int
    """Those that run the same examples count as one."""
    strategy: str
    micro_batches: int
    """Of each process."""
    tensor_parallel: int = 1
    """Processes that run the same examples."""
    data: str | None = None
    """The fingerprint of the training data; None in checkpoints of earlier versions, which are taken as they are."""
    order: str | None = None
    """A digest of what else the order of the examples follows from; None as above."""

    @classmethod
    def of(cls, trainer: Trainer, micro_batches: int) -> Epoch:
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
        """Who trains, in words."""
        count = self.processes * self.tensor_parallel
        split = f", tensor parallel {self.tensor_parallel}" if self.tensor_parallel > 1 else ""
        return f"{count} process{'es' * (count > 1)} ({self.strategy}{split})"

    @property
    def step(self) -> int:
        """Examples of an optimizer step; under a budget of tokens, micro-batches."""
        return (1 if self.tokens_per_batch else self.batch_size) * self.accumulate * self.processes

    def changes(self, before: Epoch) -> str:
        """In which of what an epoch's examples and their order follow from ``before`` differs; empty if in nothing."""
        told = [
            f"{name} was {getattr(before, name)}, is {getattr(self, name)}"
            for name in ("seed", "examples", "tokens_per_batch")
            if getattr(self, name) != getattr(before, name)
        ]
        if before.data is not None and self.data != before.data:
            told.append("data.train_path, its tokenizer or the length limits give other examples")
        elif before.order is not None and self.order != before.order:
            told.append("the split, or what an example costs, has changed")
        return ", ".join(told)

    def done(self, before: Epoch, processed: int) -> int:
        """Micro-batches of this epoch that hold what the first ``processed`` of the same epoch held ``before``.

        Raises:
            UserError: There are none: examples would be left out or trained on twice.
        """
        if processed == before.micro_batches:
            return self.micro_batches
        if told := self.changes(before):
            raise UserError(
                "ckpt_path",
                f"the checkpoint is in the middle of an epoch of other examples, or in another order ({told}): "
                "some would be left out or trained on twice; go on as before, or start a new run",
            )
        # A checkpoint is written at a step's end.
        taken = processed // before.accumulate * before.step
        if taken % self.step or (self.tokens_per_batch and self.step != before.step):
            told = "micro-batches" if self.tokens_per_batch else "examples"
            size = "trainer.accumulate_grad_batches x processes"
            raise UserError(
                "ckpt_path",
                f"the checkpoint was written after {taken} {told} of an epoch, in steps of {before.step}; "
                f"in steps of {self.step} some would be left out or trained on twice; keep "
                f"{size if self.tokens_per_batch else f'data.batch_size x {size}'} at {before.step}",
            )
        return min(taken // self.step * self.accumulate, self.micro_batches)


class ExactResume(Callback):
    """Makes a resumed run do what the uninterrupted one would have done, where checkpoints cannot say.

    Random numbers (dropout) of a micro-batch follow from the run's seed, its place in the run, and the process's share
    of the examples: there is no generator's state to store, and processes with the same share draw the same.
    ``metrics.csv`` is cut back to what the checkpoint has seen. And progress, which Lightning counts in micro-batches
    of a process, is counted anew where these have become others.
    """

    KEY = "lightning_mlc.epoch"

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._optimizer: dict[str, Any] | None = None
        """That of the checkpoint."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[self.KEY] = asdict(Epoch.of(trainer, int(trainer.num_training_batches)))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn != TrainerFn.FITTING or self.KEY not in checkpoint:
            return
        # Lightning has not counted them yet.
        before, now = Epoch(**checkpoint[self.KEY]), Epoch.of(trainer, _data(trainer).micro_batches_of_epoch())
        error = None
        loop = checkpoint["loops"]["fit_loop"]
        try:
            _require_more_to_do(trainer, loop)
            _count_anew(loop["epoch_loop.batch_progress"], before, now)
        except UserError as found:
            error = found
        raise_together(error)
        self._optimizer = (Provenance.read(checkpoint).recipe or {}).get("optimizer")
        if is_first():
            _tell_differences(before, now)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._optimizer is not None:
            _require_same_optimizer(self._optimizer, describe_optimizer(trainer.optimizers[0]))
        for its_logger in trainer.loggers:
            if isinstance(its_logger, MetricsFile):
                its_logger.continue_from(trainer.global_step)
        # A schedule asks for the number of batches, and with it for the first ones: before the checkpoint is read, and
        # from workers that a signal ends.
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
    UserError: The checkpoint, whose progress ``loop`` is, is beyond the run's last epoch.
    """
    begun = int(loop["epoch_progress"]["current"]["started"])
    if trainer.max_epochs is not None and -1 < trainer.max_epochs < begun:
        raise UserError(
            "trainer.max_epochs",
            f"is {trainer.max_epochs}, and the checkpoint is of epoch {begun}; give more, or start a new run",
        )
    if begun == trainer.max_epochs and loop["epoch_loop.batch_progress"]["is_last_batch"] and is_first():
        logger.warning("ckpt_path: the checkpoint is of a run that is done; give more trainer.max_epochs to go on")


def _require_same_optimizer(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises:
    UserError: The checkpoint, with the optimizer ``before``, has no state for that of ``now``.
    """
    if before["name"] != now["name"]:
        error = UserError(
            "model.optimizer",
            f"is {now['name']}, and the checkpoint has the state of {before['name']}; go on with that, or start a new "
            "run from an export",
        )
        error.is_shared = True
        raise error
    changed = [name for name in before.keys() & now.keys() if before[name] != now[name]]
    if changed and is_first():
        told = ", ".join(f"{name} {before[name]} and not {now[name]}" for name in sorted(changed))
        logger.warning("ckpt_path: the optimizer goes on with what the checkpoint has: %s", told)


def _count_anew(progress: dict[str, Any], before: Epoch, now: Epoch) -> None:
    """Count the micro-batches of ``progress``, a checkpoint's, as those of ``now``."""
    current, total = progress["current"], progress["total"]
    done = now.done(before, current["processed"])
    epochs = (total["processed"] - current["processed"]) // before.micro_batches
    for counts, count in ((total, epochs * now.micro_batches + done), (current, done)):
        behind = counts["processed"] - counts["completed"]  # the hooks at a batch's end come before it counts
        counts.update(ready=count, started=count, processed=count, completed=count - behind)
    progress["is_last_batch"] = done == now.micro_batches


def _tell_differences(before: Epoch, now: Epoch) -> None:
    if told := now.changes(before):  # accepted, so at the end of an epoch
        logger.warning("ckpt_path: the next epoch trains on other examples, or in another order (%s)", told)
    if (before.layout, before.step) == (now.layout, now.step):
        return
    if before.step == now.step:
        told = "the same examples make up the same steps"
    else:
        told = f"a step takes {now.step} examples, where it took {before.step}"
    changed = "sums are taken in another order"
    if (before.processes, before.tensor_parallel) != (now.processes, now.tensor_parallel):
        changed += " and dropout differs"
    logger.warning(
        "ckpt_path: %s, where it was %s: %s; %s, so the run is not bitwise what it would have been",
        now.layout,
        before.layout,
        told,
        changed,
    )
