"""``python -m benchmarks.estimate``: compare the memory that ``lightning-mlc estimate`` predicts with the memory used.

Each case trains for a few steps in its own process. The measured value belongs to the last step. On a GPU it is the
peak of the memory that PyTorch allocated. On a CPU it is the peak of the resident memory while the gradients are
computed, minus the memory before the model was loaded. The estimate is made for the same batch and device.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks import memory
from benchmarks.environment import environment
from lightning_mlc.commands.training import run
from lightning_mlc.data.batches import Batch
from lightning_mlc.files.paths import user_path
from lightning_mlc.training.memory import estimate, setup_of

STEPS = 3
GB = 10**9

CASES: dict[str, list[str]] = {
    "DPO + MLC": [],
    "DPO + MLC, 4 examples": ["--data.batch_size=4"],
    "DPO + MLC, gradient checkpointing": ["--model.gradient_checkpointing=true"],
    "DPO + MLC, LoRA": ["--config=lora"],
    "DPO + MLC, LoRA, gradient checkpointing": ["--config=lora", "--model.gradient_checkpointing=true"],
    "DPO + MLC, two micro-batches a step": ["--trainer.accumulate_grad_batches=2"],
    "DPO + MLC, bf16-mixed": ["--trainer.precision=bf16-mixed"],
    "DPO": ["--model.consistency.mlc.weight=0"],
    "SFT": ["--model.objective=SFT"],
}


class PeakMemory(Callback):
    """Records memory before the model is loaded, and its peak in the latest step: until the gradients, and in all."""

    def __init__(self) -> None:
        self.before = self.peak = self.peak_of_step = self.loaded = 0
        self.batch: Batch | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.before = memory.in_use(trainer.strategy.root_device)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.loaded = memory.in_use(trainer.strategy.root_device) - self.before

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.batch = batch
        memory.forget_peak(trainer.strategy.root_device)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.peak = memory.peak(trainer.strategy.root_device)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.peak_of_step = memory.peak(trainer.strategy.root_device)


def measure_and_estimate(options: list[str]) -> dict[str, Any]:
    """Run a case in this process and return the measured and the estimated bytes, with the parts of the estimate."""
    with tempfile.TemporaryDirectory() as out:
        done = run(
            [
                "fit",
                "--config=quickstart",
                "--trainer.precision=32-true",
                *options,
                f"--out={out}/run",
                f"--trainer.max_steps={STEPS}",
                "--trainer.limit_val_batches=0",
                "--trainer.enable_progress_bar=false",
                "--trainer.enable_model_summary=false",
                "--trainer.callbacks+=benchmarks.estimate.PeakMemory",
            ]
        )
    # Not `isinstance`: when this module is the program, its class is not that of the module that Lightning imports.
    callbacks: Any = done.trainer.callbacks  # type: ignore[attr-defined]
    peak: Any = next(callback for callback in callbacks if type(callback).__name__ == "PeakMemory")
    # On the CPU, because the estimate expects its tensors there.
    found = estimate(done.model, peak.batch.to(torch.device("cpu")), setup_of(done.config.fit.trainer))
    on_gpu = torch.cuda.is_available()
    return {
        "measured": (peak.peak_of_step if on_gpu else peak.peak) - peak.before,
        "measured_while_gradients_are_computed": peak.peak - peak.before,
        "measured_before_the_first_step": peak.loaded,
        "estimated": found.peak if on_gpu else sum(found.parts.values()),
        "estimated_in_the_optimizer_step": found.optimizer_step,
        "parts": dict(found.parts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=user_path, default=Path("benchmarks/results/cpu"), help="folder for estimate.json"
    )
    parser.add_argument(
        "--only", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE", help="some cases"
    )
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(measure_and_estimate(CASES[options.case])))
        return
    results = {}
    # Return freed memory to the system at once. Otherwise the peak of an earlier phase would be counted again.
    variables = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    print("| | estimated | measured | error |\n|---|---|---|---|")
    for name in options.only:
        command = [sys.executable, "-m", "benchmarks.estimate", "--case", name]
        done = subprocess.run(command, capture_output=True, text=True, env=variables)
        if done.returncode != 0:
            raise SystemExit(done.stderr)
        found = results[name] = json.loads(done.stdout.splitlines()[-1])
        error = found["estimated"] / found["measured"] - 1
        print(
            f"| {name} | {found['estimated'] / GB:.2f} GB | {found['measured'] / GB:.2f} GB | {error:+.0%} |",
            flush=True,
        )
    options.out.mkdir(parents=True, exist_ok=True)
    written = {
        "environment": environment(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "steps": STEPS,
        "cases": results,
    }
    (options.out / "estimate.json").write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
