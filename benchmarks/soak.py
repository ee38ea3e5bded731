"""``python -m benchmarks.soak``: train on two processes for a long time, killed and resumed many times.

The first run is undisturbed. It takes two fifths of the time and is then asked to end. Every second, the resident
memory and the open files of each process are recorded. The second run takes the same steps, but is ended at random
moments (SIGKILL to one process or both, SIGTERM to ``torchrun``) and resumed by the same command. Both runs must have
exactly the same loss in every step, and exactly the same weights. The model is tiny, because leaks grow with the number
of steps.

Exits with status 1 if the runs differ, or if memory or open files have grown.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.architectures import SMOLLM2, write_random_model
from benchmarks.environment import environment
from benchmarks.layouts import LAYOUTS, SEVERAL, command, kill, start, tail, workers
from lightning_mlc.checkpoints.format import read_checkpoint
from lightning_mlc.files.paths import user_path

ENDS = ("SIGKILL to one", "SIGKILL to both", "SIGTERM to torchrun")
SHARE = 0.4
"""Share of the time that the undisturbed run takes."""
EVERY = 20
"""Optimizer steps from one checkpoint to the next."""
MOST_GROWTH = 0.03
"""Largest growth of resident memory, from the median of a run's second quarter to that of its last quarter. Single
readings vary by 3 %."""


@dataclass(frozen=True)
class ProcessReading:
    """Memory and open files of a process at one moment."""

    process: int
    """Its index among the processes of the run."""
    seconds: float
    """Since the readings began."""
    bytes: int
    """Resident memory."""
    files: int
    """Number of open files."""


@dataclass(frozen=True)
class Disturbance:
    """How a run was ended, and how far it had come."""

    how: str
    """One of :data:`ENDS`."""
    status: int
    """Exit status."""
    step: int
    """Number of optimizer steps in ``metrics.csv`` at that moment."""
    seconds_to_end: float
    """Seconds until the run had ended."""


def fit_command(out: Path, model: Path, layout: str, steps: int) -> list[str]:
    """Return the command that starts a run or resumes it."""
    words = [
        "fit",
        f"--out={out}",
        "--ckpt_path=auto",
        f"--model.name_or_path={model}",
        "--data.train_path=sample",
        "--data.languages=[en,sw,zh]",
        "--data.batch_size=2",
        "--data.max_prompt_length=64",
        "--data.max_response_length=32",
        "--model.optimizer=AdamW",
        "--model.optimizer.lr=1e-4",
        f"--checkpoint.every_n_train_steps={EVERY}",
        f"--trainer.max_steps={steps}",
        "--trainer.accumulate_grad_batches=2",
        "--trainer.check_val_every_n_epoch=5",
        "--trainer.precision=32-true",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
    ]
    return command(words, layout)


def watch(
    started: subprocess.Popen[bytes], layout: str, enough: Callable[[], bool], readings: list[ProcessReading]
) -> bool:
    """Append readings of the processes every second until ``enough()``. Returns whether the run ended before that."""
    begun = time.monotonic()
    while not enough():
        if started.poll() is not None:
            return True
        for number, process in enumerate(workers(started, layout)):
            try:
                held = int(Path(f"/proc/{process}/statm").read_text().split()[1]) * 4096
                files = len(list(Path(f"/proc/{process}/fd").iterdir()))
            except OSError:  # the process has just ended
                continue
            readings.append(ProcessReading(number, round(time.monotonic() - begun, 1), held, files))
        time.sleep(1)
    return False


def end(started: subprocess.Popen[bytes], layout: str, how: str, out: Path) -> Disturbance:
    """End the run, and check that none of its processes is left."""
    processes, step, begun = workers(started, layout), steps_made(out), time.monotonic()
    if how == "SIGTERM to torchrun":
        started.send_signal(signal.SIGTERM)
    else:
        kill(processes[-1:] if how == "SIGKILL to one" else processes)
    status = started.wait(timeout=90)
    seconds = time.monotonic() - begun
    left = [process for process in processes if Path(f"/proc/{process}").exists()]
    if left:
        raise SystemExit(f"after {how}, {len(left)} processes are left")
    return Disturbance(how, status, step, round(seconds, 1))


def losses(out: Path) -> dict[int, str]:
    """Return the loss of each step as written in ``metrics.csv``, where each step must occur once."""
    found: dict[int, str] = {}
    for row in csv.DictReader((out / "metrics.csv").open()):
        if row.get("train/loss"):
            if int(row["step"]) in found:
                raise SystemExit(f"{out} has step {row['step']} twice")
            found[int(row["step"])] = row["train/loss"]
    return found


def steps_made(out: Path) -> int:
    return len(losses(out)) if (out / "metrics.csv").is_file() else 0


def growth(readings: list[ProcessReading]) -> list[dict[str, float]]:
    """For each process, return medians of memory and open files in the second and in the last quarter of the time."""
    found = []
    for process in sorted({reading.process for reading in readings}):
        own = [reading for reading in readings if reading.process == process]
        second, last = own[len(own) // 4 : len(own) // 2], own[len(own) * 3 // 4 :]
        memory = [int(statistics.median(reading.bytes for reading in part)) for part in (second, last)]
        files = [int(statistics.median(reading.files for reading in part)) for part in (second, last)]
        found.append(
            {
                "bytes, second quarter": memory[0],
                "bytes, last quarter": memory[1],
                "grown by": round(memory[1] / memory[0] - 1, 4),
                "files, second quarter": files[0],
                "files, last quarter": files[1],
            }
        )
    return found


def soak(minutes: float, layout: str, seed: int, root: Path) -> dict[str, Any]:
    chance, begun = random.Random(seed), time.monotonic()
    model, log = root / "model", root / "log.txt"
    write_random_model("tiny", SMOLLM2, model)

    undisturbed: list[ProcessReading] = []
    calm = root / "undisturbed"
    started = start(fit_command(calm, model, layout, 10**9), log)
    if watch(started, layout, lambda: time.monotonic() > begun + 60 * minutes * SHARE, undisturbed):
        raise SystemExit(f"the undisturbed run has failed:\n{tail(log)}")
    started.send_signal(signal.SIGTERM)
    started.wait(timeout=90)
    expected = losses(calm)
    steps = int(read_checkpoint(calm / "checkpoints" / "last.ckpt")["global_step"])
    print(f"undisturbed: {steps} steps", flush=True)

    # A restart takes about ten seconds. The rest of the time allows about one per minute.
    moments = sorted(chance.sample(range(1, steps), max(len(ENDS), round(minutes))))
    ends = [*ENDS, *chance.choices(ENDS, k=len(moments) - len(ENDS))]
    chance.shuffle(ends)
    out = root / "disturbed"
    disturbed: list[ProcessReading] = []
    disturbances: list[Disturbance] = []
    for moment, how in zip(moments, ends, strict=True):
        started = start(fit_command(out, model, layout, steps), log)
        if watch(started, layout, lambda moment=moment: steps_made(out) >= moment, disturbed):  # type: ignore[misc]
            raise SystemExit(f"the disturbed run has ended by itself:\n{tail(log)}")
        disturbances.append(end(started, layout, how, out))
        print(f"step {disturbances[-1].step}: {how}", flush=True)
    started = start(fit_command(out, model, layout, steps), log)
    watch(started, layout, lambda: False, disturbed)
    if started.returncode:
        raise SystemExit(f"the disturbed run has failed with status {started.returncode}:\n{tail(log)}")

    found, right = (read_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (out, calm))
    same = [torch.equal(found["state_dict"][name], tensor) for name, tensor in right["state_dict"].items()]
    grown = growth(undisturbed)
    return {
        "environment": environment(torch.device("cpu")),
        "layout": layout,
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "seed": seed,
        "steps": steps,
        "same losses": losses(out) == {step: loss for step, loss in expected.items() if step < steps},
        "same weights": all(same) and found["global_step"] == steps,
        "nothing leaks": all(
            process["grown by"] < MOST_GROWTH and process["files, last quarter"] <= process["files, second quarter"]
            for process in grown
        ),
        "processes": grown,
        "most bytes of a process that was killed and resumed": max(reading.bytes for reading in disturbed),
        "disturbances": [asdict(disturbance) for disturbance in disturbances],
        "samples": [asdict(reading) for reading in undisturbed],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument(
        "--layout", choices=[name for name in LAYOUTS if name != "1 process"], default=f"FSDP2 x {SEVERAL}"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments at which the run is ended")
    parser.add_argument("--out", type=user_path, default=Path("benchmarks/results/cpu"), help="folder for soak.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = soak(options.minutes, options.layout, options.seed, Path(scratch))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "soak.json").write_text(json.dumps(found, indent=1) + "\n")
    shown = {name: value for name, value in found.items() if name not in ("environment", "samples", "disturbances")}
    print(json.dumps(shown | {"times ended": len(found["disturbances"])}, indent=1))
    if not (found["same losses"] and found["same weights"] and found["nothing leaks"]):
        sys.exit(1)


if __name__ == "__main__":
    main()
