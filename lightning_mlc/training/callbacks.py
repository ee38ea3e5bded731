"""The output of a run: progress, the report of before and after, and predictions."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, ProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from rich.console import Console

from lightning_mlc.errors import UserError
from lightning_mlc.files.atomic import write_whole
from lightning_mlc.lightning_internals import ends_window
from lightning_mlc.processes import DataParallel
from lightning_mlc.progress.bars import Track
from lightning_mlc.report import (
    before_after_tables,
    plot_cosines,
    plot_languages,
    save,
    write_table_csv,
)
from lightning_mlc.report.measured import KEY, Measured
from lightning_mlc.training.module import AlignmentModule
from lightning_mlc.training.speed import Speed

FIGURES = {"mlc": "MLC loss", "acc": "accuracy"}
"""Labels in lines for the short names that a module logs for the progress bar."""


class Progress(ProgressBar):
    """Shows the progress of training, validation, test and prediction: a bar on a terminal, plain lines elsewhere.

    Args:
        console: Where it is shown; standard error by default.
        clock: Returns seconds from any starting point.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._console = console
        self._clock = clock
        self._enabled = True
        self._figures = ""
        self._training: Track | None = None
        self._evaluation: Track | None = None
        """Validation, which may be inside training, or a test, or prediction."""

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def _track(self, title: str, total: float, unit: str, done: int = 0) -> Track:
        return Track(title, total, unit, done, self._enabled, self._console, self._clock)

    # ---- training -----------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._training = self._track("training", trainer.estimated_stepping_batches, "steps", trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, AlignmentModule)
        if self._training is None:
            return
        if ends_window(trainer, batch_idx):
            self._training.update(trainer.global_step, lambda: self._latest(trainer))
            return
        of = trainer.accumulate_grad_batches
        begun = (batch_idx + 1) % of
        within = f"micro-batch {begun} of {of} of the next"
        self._training.update(trainer.global_step + begun / of, lambda: _joined(within, self._figures))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._training is not None:
            self._training.end(lambda: self._latest(trainer))
        self._training = None

    def _latest(self, trainer: Trainer) -> str:
        """The values that the latest step logged for the progress bar, and the latest speed."""
        logged = trainer.progress_bar_metrics.items()
        found = [f"{FIGURES.get(name, name)} {float(value):.3f}" for name, value in logged]
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        speeds = [callback.tokens_per_second(trainer) for callback in callbacks if isinstance(callback, Speed)]
        fast = [f"{speed:,.0f} tokens/s" for speed in speeds if speed]
        self._figures = _joined(*found, *fast)
        return self._figures

    # ---- validation, test, prediction ---------------------------------------------------------------

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            self._evaluation = self._track("validation before training", sum(trainer.num_sanity_val_batches), "batches")
            return
        when = f" after step {trainer.global_step}" if trainer.state.fn == TrainerFn.FITTING else ""
        self._evaluation = self._track(f"validation{when}", sum(trainer.num_val_batches), "batches")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluation = self._track("test", sum(trainer.num_test_batches), "batches")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._evaluation = self._track("responses", sum(trainer.num_predict_batches), "batches")

    def _advance(self, *_: Any, **__: Any) -> None:
        if self._evaluation is not None:
            self._evaluation.advance()

    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _advance

    def _end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, AlignmentModule)
        if self._evaluation is not None:
            self._evaluation.end(None if trainer.predicting else lambda: _measured(pl_module.validation_results))
        self._evaluation = None

    on_validation_end = on_test_end = on_predict_end = _end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        for track in (self._evaluation, self._training):
            if track is not None:
                track.stop()
        self._training = self._evaluation = None


def _joined(*parts: str) -> str:
    return ", ".join(filter(None, parts))


def _measured(results: Mapping[str, float]) -> str:
    """The main results of a validation or test. The report has the others."""
    forms = {
        "loss": "loss {:.3f}",
        "mlc/loss": "MLC loss {:.3f}",
        "rewards/accuracies/mean": "accuracy {:.3f}",
        "declined/harmful/mean": "harmful declined {:.0%}",
        "declined/ordinary/mean": "ordinary declined {:.0%}",
    }
    own = {name.partition("/")[2]: value for name, value in results.items()}
    return _joined(*(form.format(own[name]) for name, form in forms.items() if name in own))


class ValidateAtMaxSteps(Callback):
    """Validates after the step ``trainer.max_steps``, also in the middle of an epoch, so that it is measured and saved.

    When ``max_steps`` is reached, Lightning ends without validation. When it is told to stop, it validates first.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == trainer.max_steps:
            trainer.should_stop = True


class EvaluationReport(Callback):
    """Reports the results before and after training, per language.

    At the end of ``fit`` it prints tables, and writes to ``<out>/report`` the same numbers as CSV, a bar chart, a
    heatmap of the cosines between languages, and ``summary.json`` with time and memory.
    """

    state_key = KEY

    def __init__(self) -> None:
        self.before: dict[str, float] | None = None
        self.before_cosines: list[list[float]] | None = None
        self.measured_at: int | None = None
        """The optimizer step of the latest validation in this run."""
        self.latest: dict[str, Any] | None = None
        """Step and results of the latest validation, for the model card. A resumed run may have them from before."""
        self._device = torch.device("cpu")
        """The device of the training. When the report is written, the model is on the CPU again."""
        self._step_seconds: list[float] = []
        self._step_started = 0.0

    def state_dict(self) -> dict[str, Any]:
        return {**Measured(before=self.before, before_cosines=self.before_cosines, latest=self.latest)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.before = state_dict["before"]
        self.before_cosines = state_dict["before_cosines"]
        self.latest = state_dict.get("latest")

    # ---- measuring ----------------------------------------------------------------------------------

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, AlignmentModule)
        if trainer.sanity_checking:
            self.before = dict(pl_module.validation_results)
            self.before_cosines = pl_module.validation_cosines
            for logger in trainer.loggers:
                logger.log_metrics(self.before, step=0)
        elif trainer.state.fn == TrainerFn.FITTING:
            self.measured_at = trainer.global_step
            self.latest = {"step": trainer.global_step, "results": dict(pl_module.validation_results)}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._device = trainer.strategy.root_device

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self._step_started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, AlignmentModule)
        if ends_window(trainer, batch_idx):
            self._step_seconds.append(time.perf_counter() - self._step_started)

    # ---- reporting ----------------------------------------------------------------------------------

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Print and write the report. Before ``teardown``, the progress bar would be drawn again below the tables."""
        assert isinstance(pl_module, AlignmentModule)
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if stage == "fit":
            self._report_fit(trainer, pl_module)
        elif pl_module.validation_results:  # `validate` and `test` end with the same tables, without values before
            _print_tables(None, pl_module)

    def _report_fit(self, trainer: Trainer, pl_module: AlignmentModule) -> None:
        out = Path(trainer.default_root_dir)
        wrote = []
        if self.measured_at is not None:
            if self.before is not None and _languages(self.before) != _languages(pl_module.validation_results):
                self.before = self.before_cosines = None
                print("no values before training: those of the checkpoint are of other languages")
            wrote = self._write(pl_module, out / "report", trainer)
            _print_tables(self.before, pl_module)
            if self.measured_at != trainer.global_step:
                end = f"training ended at step {trainer.global_step} without validation"
                print(f"'after' is step {self.measured_at}, because {end}")
        keeper = trainer.checkpoint_callback
        last, best = (getattr(keeper, f"{name}_model_path", "") for name in ("last", "best"))
        # Without a metric to monitor, the best checkpoint is the last one.
        paths = [best, last] if getattr(keeper, "monitor", None) is not None else [last or best]
        checkpoints = [_shown(Path(path)) for path in dict.fromkeys(paths) if path]
        print("wrote", *checkpoints, *wrote, sep="\n  ")
        if checkpoints:
            print(f"next\n  lightning-mlc export --ckpt_path {checkpoints[0]} --out {out / 'model'}")

    def _write(self, module: AlignmentModule, folder: Path, trainer: Trainer) -> list[Path]:
        folder.mkdir(parents=True, exist_ok=True)
        after = module.validation_results
        languages = module.languages
        metric = "val/rewards/margins" if f"val/rewards/margins/{languages[0]}" in after else "val/nll"
        write_table_csv(folder / "validation.csv", self.before, after)
        save(plot_languages(self.before, after, languages, metric), folder / "languages.png")
        save(plot_cosines(self.before_cosines, module.validation_cosines, languages), folder / "cosines.png")
        summary = {
            "steps": trainer.global_step,
            "validated_at_step": self.measured_at,
            "seconds_per_step": sum(self._step_seconds) / max(1, len(self._step_seconds)),
            "peak_memory_bytes": peak_memory(self._device),
            "device": str(self._device),
            "languages": list(languages),
            "before": self.before,
            "after": after,
            "cosines_before": self.before_cosines,
            "cosines_after": module.validation_cosines,
        }
        write_whole(folder / "summary.json", json.dumps(summary, indent=2))
        return [folder / name for name in ("validation.csv", "languages.png", "cosines.png", "summary.json")]


def _languages(results: Mapping[str, float]) -> list[str]:
    """The names of what was measured in each language, in the order of the languages."""
    return [name for name in results if name.startswith("val/nll/")]


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held on ``device``. For a CPU: resident memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _print_tables(before: dict[str, float] | None, module: AlignmentModule) -> None:
    console = Console()
    for table in before_after_tables(before, module.validation_results, module.languages, module.languages[0]):
        console.print(table)


def _shown(path: Path) -> Path:
    """``path`` relative to the working directory, if it is inside."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


class PredictionWriter(BasePredictionWriter):
    """Appends each generated response to ``<out>/predictions.jsonl``. None is printed."""

    def __init__(self) -> None:
        super().__init__(write_interval="batch")
        self._path: Path | None = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        share = DataParallel.of(trainer)
        if not share.is_first:
            return
        rank = f".rank{share.rank}" if share.size > 1 else ""
        path = Path(trainer.default_root_dir) / f"predictions{rank}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            path.open("x").close()  # fails for one of two commands that start at the same time
        except FileExistsError as error:
            raise UserError("out", f"{path} exists; move it away or give another --out") from error
        self._path = path

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._path is not None and self._path.stat().st_size == 0:  # so that the same command can be run again
            self._path.unlink()

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        # Another process writes this batch: one with the same share, or the one whose batch this repeats.
        if self._path is None or data.is_repeat("predict", batch_idx):
            return
        with self._path.open("a", encoding="utf-8") as file:
            for record in prediction:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        print(f"wrote\n  {self._path}")
