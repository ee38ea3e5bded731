"""Train and measure every cell with every seed: resumable, and shared out among processes.

::

    OUT/data/train.jsonl, heldout.jsonl      rows of both sides
    OUT/cells/CELL/seed-N/run/               what `fit` writes; removed once measured
    OUT/cells/CELL/seed-N/fit.log            what it printed
    OUT/cells/CELL/seed-N/measured.json      numbers, written whole when all is done
    OUT/cells/CELL/seed-N/lock               held by the process that works on it

A process claims a cell and seed by an advisory lock on a file, which the system releases when the process ends,
however it ends. Training has inherited it: if this process is killed alone, nobody else starts the same before
training has ended, too.
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
from lightning_mlc.evaluation.journal import write_whole
from lightning_mlc.evaluation.systems.system import System
from lightning_mlc.progress.bars import SECONDS, say


@dataclass(frozen=True)
class Task:
    """A cell with a seed; the model before training has none."""

    cell: str
    seed: int | None

    @property
    def name(self) -> str:
        return self.cell if self.seed is None else f"{self.cell} seed {self.seed}"

    def folder(self, out: Path) -> Path:
        return out / "cells" / self.cell / ("untrained" if self.seed is None else f"seed-{self.seed}")


class Runner:
    """Does what is left of a study.

    Args:
        grid: See there.
        out: Folder of the study.
        own: Options of ``fit`` that the study sets for all cells.
        model: The model before training.
        settings: What all results depend on beside the options of their cell: plain JSON values.
        measurer: Measures models.
        keep_weights: Whether to keep what ``fit`` wrote.
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
        """The model before training, then all cells with the first seed, then with the next."""
        cells = list(self._grid.cells) if only is None else [cell for cell in only if cell != BASE]
        trained = [Task(cell, seed) for seed in (seeds or self._grid.seeds) for cell in cells]
        return [Task(BASE, None), *trained]

    def check(self, tasks: Sequence[Task]) -> None:
        """Refuse to go on with what was made with other settings.

        Raises:
            UserError: Something of ``tasks`` was.
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
        """Do what is not done and nobody else does.

        Returns:
            What failed, a line each.
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
        print(f"{done} of {len(tasks)} done" + (f", other processes are at work on {others}" if others else ""))
        return failures

    def _of(self, task: Task) -> dict[str, Any]:
        own = {} if task.seed is None else {"configs": list(self._grid.configs), "fit": self._grid.options(task.cell)}
        found: dict[str, Any] = json.loads(json.dumps({**self._settings, **own}))  # as they will be read again
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
        """Train in a process of its own, from the last checkpoint if there is one. Returns the seconds it took."""
        assert task.seed is not None
        # Lines of progress go into the log, whatever the grid says of bars: they change no result.
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
            except BaseException:  # stopped: let it write its checkpoint
                process.send_signal(signal.SIGTERM)
                process.wait()
                raise
        if status != 0:
            raise _Failed(f"fit ended with status {status}: {_last_line(log)} (all of it in {log})")
        return time.perf_counter() - started

    def _say_what_is_left(self, tasks: Sequence[Task]) -> None:
        folders = [task.folder(self.out) for task in tasks]
        left = [folder for folder in folders if not is_done(folder)]
        found = [json.loads((f / "measured.json").read_text(encoding="utf-8")) for f in folders if is_done(f)]
        trained = [one["fit_seconds"] + one["seconds"] for one in found if one["fit_seconds"]]
        if left and trained:
            workers = 1 + sum(is_claimed(folder / "lock") for folder in left)
            minutes = statistics.mean(trained) * len(left) / min(workers, len(left)) / 60
            print(f"  {len(left)} left, about {minutes:.0f} minutes with {workers} at work", flush=True)


class _Failed(Exception):
    """Training did not end well."""


def is_done(folder: Path) -> bool:
    """Whether a cell and seed are measured."""
    return (folder / "measured.json").is_file()


@contextmanager
def claim(path: Path, wait: bool = False) -> Iterator[int | None]:
    """Hold the lock file ``path``; gives its descriptor.

    Where another process holds it, ``wait`` for that one to end, or give None.
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
    """Turn SIGTERM into the exception that ends this process in order."""

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
    """Wait for ``process``, and say every 30 seconds how far its training is. Returns its status."""
    said = ""
    while True:
        try:
            return process.wait(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            if (line := progress_line(log)) and line != said:
                said = line
                say(f"  {name}: {line}")


def progress_line(log: Path) -> str | None:
    """The last line of ``log`` that says how far training or validation is."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line for line in reversed(lines) if line.startswith(("training:", "validation"))), None)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].removeprefix("error: ") if lines else "nothing was printed"


def rounded(value: Any, digits: int) -> Any:
    """``value`` with its numbers to so many digits. Seven are more than the precision of what was computed."""
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item, digits) for item in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value
