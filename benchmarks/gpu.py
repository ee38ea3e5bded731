"""``python -m benchmarks.gpu --out FOLDER``: everything that needs a GPU, in one command of about ten minutes.

The command runs the operator's tests on the GPU, then every benchmark, each with a time limit. Logs, results and
versions go into one folder. A step that fails or runs out of time is reported, and the others still run. The longest
steps come last, in the time that is left.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.environment import ROOT, environment
from lightning_mlc.files.paths import user_path

KERNEL = ("-m", "benchmarks.kernel", "--seconds", "0.02", "--out")
SHAPES = ("--languages", "4", "10", "32", "--features", "512", "2048", "4096")
"""Fewer than the default, because each is timed at six paces. That takes about 90 seconds for these 51 and 150 for all
86, computed from earlier times on an H200."""
FEWER = ("--prompts", "1", "8", "128", "--languages", "10", "--features", "512", "4096")
TRAIN_STEP = (
    *("-m", "benchmarks.train_step", "--architecture", "qwen2.5-0.5b"),
    *("--warm_up", "2", "--steps", "8", "--counted_steps", "2", "--out"),
)
COMMANDS: tuple[tuple[str, tuple[str, ...], int], ...] = (
    ("tests", ("-m", "pytest", "-q", "tests/mlc_kernels"), 240),
    ("kernel-float32", (*KERNEL, "{out}/float32", *SHAPES), 240),
    ("kernel-bfloat16", (*KERNEL, "{out}/bfloat16", "--dtype", "bfloat16", *FEWER), 90),
    ("matrix", ("-m", "benchmarks.matrix", "--precision", "bf16-mixed"), 300),
    ("train-step", (*TRAIN_STEP, "{out}/train_step"), 360),
    ("estimate", ("-m", "benchmarks.estimate", "--out", "{out}"), 300),
    ("split", ("-m", "benchmarks.split"), 240),
)
"""Name, arguments of python, and time limit in seconds of each step."""
SECONDS = 600
"""Time limit of all steps together."""
LEAST = 60
"""A step is not started if fewer seconds are left."""


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=user_path, required=True, help="folder for logs and results")
    names = [name for name, _, _ in COMMANDS]
    parser.add_argument("--only", nargs="+", default=names, choices=names, metavar="NAME", help=", ".join(names))
    options = parser.parse_args(args)
    out: Path = options.out.resolve()
    if not torch.cuda.is_available():
        print("error: there is no GPU here; python -m benchmarks.kernel runs on a CPU too", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, object] = {"environment": environment(torch.device("cuda"))}
    failed = False
    begun = time.monotonic()
    for name, arguments, most in (step for step in COMMANDS if step[0] in options.only):
        start = time.monotonic()
        limit = min(most, SECONDS - (start - begun))
        print(f"{name} ...", flush=True)
        status = run_python(arguments, out, out / f"{name}.log", limit) if limit >= LEAST else None
        failed = failed or status not in (0, None)
        report[name] = {"status": status, "seconds": round(time.monotonic() - start, 1)}
        (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        if status is None:
            print("  skipped: not enough time is left")
        else:
            print(f"  {'done' if status == 0 else f'FAILED (status {status})'}, see {out / name}.log")
    return int(failed)


def run_python(arguments: tuple[str, ...], out: Path, log: Path, limit: float) -> int:
    """Run python with ``arguments`` and return its exit status; 124 if it was stopped after ``limit`` seconds."""
    command = [sys.executable, *(argument.format(out=out) for argument in arguments)]
    with log.open("w") as file:
        try:
            return subprocess.run(command, cwd=ROOT, stdout=file, stderr=file, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            return 124


if __name__ == "__main__":
    sys.exit(main())
