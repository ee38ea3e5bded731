"""Everything that this package uses of Lightning and that Lightning's documentation does not promise.

No other module touches a private attribute of Lightning. The tests of this module hold that, and run every function and
class against the installed Lightning, so that they fail if an upgrade changes one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor

# ---- checkpoints ------------------------------------------------------------------------------------


def checkpoint_to_load(trainer: Trainer) -> Path | None:
    """The checkpoint that the running command of ``trainer`` will load, also before it has loaded it.

    ``Trainer.ckpt_path`` is set when the checkpoint is read, which is after the model is set up. Until then only the
    method that runs the command knows the path, so it is looked for among the callers.
    """
    frame = inspect.currentframe()
    while frame is not None:
        own = frame.f_locals
        if frame.f_code is Trainer._run.__code__ and own.get("self") is trainer:
            return None if own["ckpt_path"] is None else Path(own["ckpt_path"])
        frame = frame.f_back
    return None


# ---- loops ------------------------------------------------------------------------------------------


def ends_window(trainer: Trainer, batch_idx: int) -> bool:
    """Whether an optimizer step follows the micro-batch ``batch_idx`` of the epoch."""
    return (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch


def batch_of_epoch(trainer: Trainer) -> int:
    """Number of the micro-batch of the epoch that is being trained, from 0."""
    return int(trainer.fit_loop.epoch_loop.batch_idx)


def validation_follows(trainer: Trainer) -> bool:
    """Whether Lightning validates after the batch that has just ended.

    False if validation is scheduled by time, because then processes might disagree.
    """
    loop: Any = trainer.fit_loop
    if trainer._val_check_time_interval is not None or not sum(trainer.num_val_batches):  # type: ignore[attr-defined]
        return False
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def epoch_and_batches_done(trainer: Trainer) -> tuple[int, int]:
    """The epoch to train (from 0) and how many of its micro-batches are done, also right after a resumption."""
    loop = trainer.fit_loop
    batches: Any = loop.epoch_loop.batch_progress
    if batches.is_last_batch:
        # A checkpoint of an epoch's end: Lightning counts the epoch as done only after it has asked for batches.
        epochs: Any = loop.epoch_progress.current
        return int(epochs.started), 0
    return trainer.current_epoch, int(batches.current.processed)


def set_counts(counts: Any, done: int) -> None:
    """Set Lightning's four ``counts`` of batches to ``done``.

    Between two batches the four are equal: each batch that was made ready was also started, processed and completed.
    """
    counts.ready = counts.started = counts.processed = counts.completed = done


def rewind_to_step(trainer: Trainer) -> None:
    """Count only the micro-batches that the weights have seen.

    Gradients of an unfinished optimizer step are not saved. A validation that was interrupted runs again from its
    beginning.
    """
    loop = trainer.fit_loop.epoch_loop
    progress: Any = loop.batch_progress
    beyond = 0 if progress.is_last_batch else progress.current.processed % trainer.accumulate_grad_batches
    for counts in (progress.current, progress.total):
        set_counts(counts, counts.processed - beyond)
    if trainer.validating:
        evaluated: Any = loop.val_loop.batch_progress
        for counts in (evaluated.current, evaluated.total):
            set_counts(counts, 0)
            counts.ready = counts.started = 1  # a batch that was started and not completed marks an interruption
        evaluated.is_last_batch = False


def restart_batches(trainer: Trainer) -> None:
    """Begin the iteration over the training batches again, so that none of those fetched earlier is used."""
    fetcher: Any = trainer.fit_loop._data_fetcher
    iter(fetcher)


def number_logs_by_step(trainer: Trainer) -> None:
    """Let Lightning number what it logs by the optimizer step.

    Its own count is one ahead in a run that is resumed at the start of an epoch.
    """
    trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


def writes_logs(trainer: Trainer) -> bool:
    """Whether Lightning writes what is logged at this micro-batch, if an optimizer step follows it."""
    return bool(trainer._logger_connector.should_update_logs)


def profiled(trainer: Trainer, name: str) -> AbstractContextManager[Any]:
    """Report the time inside to ``--trainer.profiler``, as ``[Step]NAME``."""
    profiler: Profiler = trainer.profiler  # type: ignore[attr-defined]
    return profiler.profile(f"[Step]{name}")


# ---- signals ----------------------------------------------------------------------------------------


def after_signal_handlers(trainer: Trainer, then: Callable[[], None]) -> None:
    """Call ``then`` right after Lightning has set its signal handlers for the coming ``fit``.

    That is before the processes that prepare batches start, which inherit the handlers. Lightning restores the handlers
    that it found when the run ends.
    """
    connector: Any = trainer._signal_connector
    set_handlers = connector.register_signal_handlers

    def set_all() -> None:
        set_handlers()
        then()

    connector.register_signal_handlers = set_all


def stop_signal_broadcast(trainer: Trainer) -> None:
    """Stop Lightning from exchanging, on the GPU and before each batch, whether a process has received SIGTERM."""
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]


# ---- processes --------------------------------------------------------------------------------------


def examples_share(trainer: Trainer) -> tuple[int, int] | None:
    """How many shares the examples are divided into, and which share is this process's (from 0).

    None if the strategy has a single process.
    """
    found = trainer.distributed_sampler_kwargs
    return None if found is None else (int(found["num_replicas"]), int(found["rank"]))


def adds_distributed_sampler(trainer: Trainer) -> bool:
    """Whether Lightning wraps samplers so that each process gets a part of the examples."""
    return bool(trainer._accelerator_connector.use_distributed_sampler)


def finds_unused_parameters(strategy: Strategy) -> bool:
    """Whether ``strategy`` accepts steps in which parameters get no gradient: DDP only if it was told so."""
    return not isinstance(strategy, DDPStrategy) or bool(strategy._ddp_kwargs.get("find_unused_parameters"))


def set_data_parallel_size(strategy: ModelParallelStrategy, size: int) -> None:
    """Set the number of groups that get different examples, before the processes connect."""
    strategy._data_parallel_size = size


def set_backend(strategy: ModelParallelStrategy, name: str) -> None:
    """Set the backend of ``torch.distributed`` (as in ``cpu:gloo,cuda:nccl``), before the processes connect."""
    strategy._process_group_backend = name


def move_except(module: LightningModule, device: torch.device, stays: Callable[[Tensor], bool]) -> None:
    """Move ``module`` to ``device`` as its method ``to`` does, without the tensors for which ``stays`` is true."""
    module._apply(lambda tensor: tensor if stays(tensor) else tensor.to(device))  # type: ignore[no-untyped-call]
    module._device = device


# ---- base classes that give Lightning's private methods public names --------------------------------


class CheckpointHooks(ModelCheckpoint):
    """Lightning's checkpoint callback with public names for what a subclass may call and override."""

    def write_best(self, trainer: Trainer, metrics: dict[str, Tensor]) -> None:
        """Save one of the ``save_top_k`` checkpoints if ``metrics`` say so, otherwise ``last.ckpt``. May be overridden.

        Lightning would save nothing then. If the metric peaks early, the rest of the run would be lost.
        """
        super()._save_topk_checkpoint(trainer, metrics)
        if self.monitor is not None and self._last_global_step_saved != trainer.global_step:
            self.write_latest(trainer, metrics)

    def write_latest(self, trainer: Trainer, metrics: dict[str, Tensor]) -> None:
        """Save ``last.ckpt``, which is no link then, if ``save_last`` says so."""
        path = self._last_path(metrics)
        if self.save_last and trainer.is_global_zero and path.is_symlink():
            path.unlink()  # or a checkpoint of several files would be written into the one that the link leads to
        trainer.strategy.barrier()
        before, self.save_last = self.save_last, bool(self.save_last)
        try:
            super()._save_last_checkpoint(trainer, metrics)
        finally:
            self.save_last = before

    def write_last(self, trainer: Trainer, metrics: dict[str, Tensor]) -> None:
        """Save or link ``last.ckpt``, if ``save_last`` says so. May be overridden."""
        saved, path = Path(self._last_checkpoint_saved), self._last_path(metrics)
        # Where a link leads is not asked, because processes that ask at different times would not all save.
        is_there = saved.name == path.name and saved.parent.resolve() == path.parent.resolve()
        links = self.save_last == "link" and self.save_top_k != 0
        if not is_there or not (links or self._last_global_step_saved == trainer.global_step):
            super()._save_last_checkpoint(trainer, metrics)

    def _last_path(self, metrics: dict[str, Tensor]) -> Path:
        return Path(self.format_checkpoint_name(metrics, self.CHECKPOINT_NAME_LAST))

    def write(self, trainer: Trainer, path: str) -> None:
        """Save a checkpoint to ``path``. May be overridden."""
        super()._save_checkpoint(trainer, path)

    def may_remove(self, trainer: Trainer, previous: str, current: str) -> bool:
        """Whether the checkpoint ``previous`` is to be removed after ``current`` was written. May be overridden."""
        return super()._should_remove_checkpoint(trainer, previous, current)

    def save_now(self, trainer: Trainer) -> None:
        """Save as at a step that ``every_n_train_steps`` divides."""
        metrics = self.known_metrics(trainer)
        self.write_best(trainer, metrics)
        self.write_last(trainer, metrics)

    def known_metrics(self, trainer: Trainer) -> dict[str, Tensor]:
        """All that can be monitored now, by name; ``epoch`` and ``step`` are included."""
        return self._monitor_candidates(trainer)

    def can_save(self, trainer: Trainer) -> bool:
        """Whether a checkpoint may be saved now: in training, and not twice at one step."""
        return not self._should_skip_saving_checkpoint(trainer)

    def can_save_on_exception(self, trainer: Trainer) -> bool:
        """Whether ``save_on_exception`` applies now: not in the validation before training, and not twice at a step."""
        return self._should_save_on_exception(trainer)

    def mark_saved(self, step: int, path: str) -> None:
        """Count the checkpoint at ``path`` as the one that was saved at ``step``."""
        self._last_global_step_saved = step
        self._last_checkpoint_saved = path

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        self.write_best(trainer, monitor_candidates)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        self.write_last(trainer, monitor_candidates)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        self.write(trainer, filepath)

    def _should_remove_checkpoint(self, trainer: Trainer, previous: str, current: str) -> bool:
        return self.may_remove(trainer, previous, current)


class CommandLine(LightningCLI):
    """Lightning's command line with public names for what a subclass may call and override.

    A checkpoint does not override the configuration, as Lightning's own command line would let it.
    """

    def make_trainer(self, options: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """The trainer with ``options`` and the additional ``callbacks``. May be overridden."""
        return super()._instantiate_trainer(options, callbacks)

    def method_keywords(self, subcommand: str) -> dict[str, Any]:
        """Arguments for the trainer's method ``subcommand``, in addition to the configured ones. May be overridden."""
        return {}

    def run_subcommand(self, subcommand: str) -> None:
        """Call the trainer's method ``subcommand``. May be overridden."""
        super()._run_subcommand(subcommand)

    def subcommand_parser(self, subcommand: str) -> LightningArgumentParser:
        """The parser of the options of ``subcommand``."""
        return self._subcommand_parsers[subcommand]

    def instantiated(self, key: str) -> Any:
        """The object that was made of the section ``key`` of the configuration."""
        return self._get(self.config_init, key)

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        return self.make_trainer(config, callbacks)

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return super()._prepare_subcommand_kwargs(subcommand) | self.method_keywords(subcommand)

    def _run_subcommand(self, subcommand: str) -> None:
        self.run_subcommand(subcommand)

    def _parse_ckpt_path(self) -> None:
        """Leave the configuration as it is."""


class MetricsWriterHooks(ExperimentWriter):
    """Lightning's writer of ``metrics.csv``, which keeps the file of an earlier run in the same folder."""

    def continue_file(self) -> None:
        """Prepare to append to the file, if it exists. May be overridden; Lightning's own removes it."""

    def _check_log_dir_exists(self) -> None:
        self.continue_file()


class MetricsLoggerHooks(CSVLogger):
    """Lightning's CSV logger with another writer."""

    def make_writer(self) -> ExperimentWriter:
        """The writer. Called once on process 0, before the first row. May be overridden."""
        return ExperimentWriter(self.log_dir)

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            self._experiment = self.make_writer()
        assert isinstance(self._experiment, ExperimentWriter)
        return self._experiment
