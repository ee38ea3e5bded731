"""Train and measure every cell with every seed. The work can be resumed, and divided among processes.

::

    OUT/data/train.jsonl, heldout.jsonl      rows for training, rows for measuring
    OUT/cells/CELL/seed-N/run/               output of `fit`; removed after measuring
    OUT/cells/CELL/seed-N/fit.log            messages of `fit`
    OUT/cells/CELL/seed-N/measured.json      measurements, written when all are complete
    OUT/cells/CELL/seed-N/lock               locked by the process that works on this cell and seed

A process claims a cell and seed with an advisory lock on a file, which the system releases whenever the process ends.
The training process inherits the lock. So if only this process is killed, no other process starts the same training
before the first one has ended.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from benchmarks.study.grid import BASE, StudyGrid
from benchmarks.study.measuring import Measurer
from lightning_mlc.checkpoints.finding import checkpoint_files
from lightning_mlc.errors import Interrupted, UserError
from lightning_mlc.evaluation.systems.system import System
from lightning_mlc.files.atomic import write_whole
from lightning_mlc.progress.bars import SECONDS, say


@dataclass(frozen=True)
class Task:
    """A cell with a seed. The model before training has no seed."""

    cell: str
    seed: int | None

    @property
    def name(self) -> str:
        return self.cell if self.seed is None else f"{self.cell} seed {self.seed}"

    def folder(self, out: Path) -> Path:
        return out / "cells" / self.cell / ("untrained" if self.seed is None else f"seed-{self.seed}")


class Runner:
    """Runs the tasks of a study that are not done yet.

    Args:
        grid: The study's cells and seeds.
        out: Folder of the study.
        own: Options of ``fit`` that the study sets for all cells.
        model: The model before training.
        settings: Values for JSON that all results depend on, in addition to the options of their cell.
        measurer: Measures models.
        keep_weights: Whether to keep the output of ``fit``.
    """

    def __init__(
        self,
        grid: StudyGrid,
        out: Path,
        own: Mapping[str, Any],
        model: System,
        settings: Mapping[str, Any],
        measurer: Measurer,
        keep_weights: bool,
    ) -> None:
        self._grid = grid
        self.out = out
        self._own = own
        self._model = model
        self._settings = settings
        self._measurer = measurer
        self._keep_weights = keep_weights

    def tasks(self, only: Sequence[str] | None = None, seeds: Sequence[int] | None = None) -> list[Task]:
        """Return the tasks: the model before training, all cells with the first seed, all cells with the next seed."""
        cells = list(self._grid.cells) if only is None else [cell for cell in only if cell != BASE]
        trained = [Task(cell, seed) for seed in (seeds or self._grid.seeds) for cell in cells]
        return [Task(BASE, None), *trained]

    def check(self, tasks: Sequence[Task]) -> None:
        """Check that all results of ``tasks`` were made with the present settings.

        Raises:
            UserError: A result was made with other settings.
        """
        for task in tasks:
            path = task.folder(self.out) / "settings.json"
            if path.is_file() and (begun := json.loads(path.read_text(encoding="utf-8"))) != self._of(task):
                now = self._of(task)
                changed = ", ".join(key for key in {**begun, **now} if begun.get(key) != now.get(key))
                raise UserError(
                    "--out",
                    f"{path.parent} was made with other settings ({changed}); give another --out, "
                    "or remove that folder",
                )

    def run(self, tasks: Sequence[Task]) -> list[str]:
        """Run those of ``tasks`` that are not done and that no other process works on.

        Returns:
            One line for each failure.
        """
        failures = []
        for number, task in enumerate(tasks, start=1):
            folder = task.folder(self.out)
            folder.mkdir(parents=True, exist_ok=True)
            with claim(folder / "lock") as lock:
                if lock is None or is_done(folder):
                    continue
                print(f"[{number}/{len(tasks)}] {task.name}", flush=True)
                write_whole(folder / "settings.json", json.dumps(self._of(task), indent=1) + "\n")
                try:
                    found = self._do(task, folder, lock)
                except _Failed as failure:
                    failures.append(f"{task.name}: {failure}")
                    print(f"  {failure}", flush=True)
                    continue
                print(f"  training {found['fit_seconds']:.0f} s, measuring {found['seconds']:.0f} s", flush=True)
            self._say_what_is_left(tasks)
        done = sum(is_done(task.folder(self.out)) for task in tasks)
        others = sum(is_claimed(task.folder(self.out) / "lock") for task in tasks)
        print(f"{done} of {len(tasks)} done" + (f", other processes work on {others}" if others else ""))
        return failures

    def _of(self, task: Task) -> dict[str, Any]:
        own = {} if task.seed is None else {"configs": list(self._grid.configs), "fit": self._grid.options(task.cell)}
        found: dict[str, Any] = json.loads(json.dumps({**self._settings, **own}))  # as a reader of the file gets them
        return found

    def _do(self, task: Task, folder: Path, lock: int) -> dict[str, Any]:
        run = folder / "run"
        system, seconds = self._model, 0.0
        if task.seed is not None:
            seconds = self._fit(task, run, folder / "fit.log", lock)
            system = System(task.cell, str(checkpoint_files(run)[-1].resolve()))
        found = self._measurer.measure_model(system)
        found |= {"fit_seconds": seconds, "environment": environment(self._measurer.device)}
        write_whole(folder / "measured.json", json.dumps(rounded(found, 7), allow_nan=False) + "\n")
        if not self._keep_weights and run.exists():
            shutil.rmtree(run)
        return found

    def _fit(self, task: Task, run: Path, log: Path, lock: int) -> float:
        """Train in a separate process, from the last checkpoint if one exists. Returns the seconds this took."""
        assert task.seed is not None
        # The log needs lines of progress, whatever the grid sets. They change no result.
        own = {**self._own, "out": str(run), "seed_everything": task.seed, "trainer.enable_progress_bar": "true"}
        if checkpoint_files(run):
            own["ckpt_path"] = "last"
        elif run.exists():
            shutil.rmtree(run)
        started = time.perf_counter()
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "lightning_mlc", *self._grid.arguments(task.cell, own)],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                pass_fds=[lock],
            )
            try:
                status = _followed(process, log, task.name)
            except BaseException:  # this process was stopped: let the training write its checkpoint
                process.send_signal(signal.SIGTERM)
                process.wait()
                raise
        if status != 0:
            raise _Failed(f"fit ended with status {status}: {_last_line(log)} (full log: {log})")
        return time.perf_counter() - started

    def _say_what_is_left(self, tasks: Sequence[Task]) -> None:
        folders = [task.folder(self.out) for task in tasks]
        left = [folder for folder in folders if not is_done(folder)]
        found = [json.loads((f / "measured.json").read_text(encoding="utf-8")) for f in folders if is_done(f)]
        trained = [one["fit_seconds"] + one["seconds"] for one in found if one["fit_seconds"]]
        if left and trained:
            workers = 1 + sum(is_claimed(folder / "lock") for folder in left)
            minutes = statistics.mean(trained) * len(left) / min(workers, len(left)) / 60
            print(f"  {len(left)} left, about {minutes:.0f} minutes with {workers} processes", flush=True)


class _Failed(Exception):
    """Training failed."""


def is_done(folder: Path) -> bool:
    """Whether the cell and seed in ``folder`` are measured."""
    return (folder / "measured.json").is_file()


@contextmanager
def claim(path: Path, wait: bool = False) -> Iterator[int | None]:
    """Lock the file ``path``, and yield its descriptor.

    If another process holds the lock: with ``wait``, wait until that process ends; otherwise yield None.
    """
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
        else:
            yield descriptor
    finally:
        os.close(descriptor)


def is_claimed(path: Path) -> bool:
    """Whether a process holds the lock file ``path``."""
    if not path.exists():
        return False
    with claim(path) as lock:
        return lock is None


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Turn SIGTERM and Ctrl-C into the exception that ends this process in an orderly way."""

    def stop(*_: Any) -> None:
        raise Interrupted(None, "stopped; what is done is kept, so run the same command again to go on")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(None, "stopped; what is done is kept, so run the same command again to go on") from error
    finally:
        signal.signal(signal.SIGTERM, before)


def _followed(process: subprocess.Popen[bytes], log: Path, name: str) -> int:
    """Wait for ``process``, and print its progress every 30 seconds. Returns its exit status."""
    said = ""
    while True:
        try:
            return process.wait(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            if (line := progress_line(log)) and line != said:
                said = line
                say(f"  {name}: {line}")


def progress_line(log: Path) -> str | None:
    """Return the last line of ``log`` with the progress of training or validation."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.startswith(("training:", "validation"))), None)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else "nothing was printed"


def rounded(value: Any, digits: int) -> Any:
    """Return ``value`` with its numbers rounded to ``digits`` significant digits. Measurements have fewer than 7."""
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item, digits) for item in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value
