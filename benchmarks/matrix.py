"""``python -m benchmarks.matrix``: check every stage of a run, in every layout, on a given model.

The stages in each layout:

- ``fit``: train for a few steps.
- ``kill``: start the same training again and send SIGKILL after its first checkpoint.
- ``resume``: resume it. Its weights must equal those of the run that was not killed.
- ``export``: export the checkpoint to a model folder.
- ``reload``: load that folder with transformers. The weights must equal those of the checkpoint.
- ``generate``: write responses of the checkpoint.

Prints a table in Markdown, and exits with status 1 if a stage failed. Uses GPUs if there are any
(:mod:`benchmarks.layouts`), with deterministic algorithms.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.architectures import SMOLLM2, write_random_model
from benchmarks.layouts import LAYOUTS, ON_GPU, command, kill, start, tail, workers
from lightning_mlc.checkpoints.finding import checkpoint_files
from lightning_mlc.checkpoints.format import read_checkpoint

STAGES = ("fit", "kill", "resume", "export", "reload", "generate")


class Failed(Exception):
    """A stage failed its check."""


class LayoutStages:
    """The stages in one layout. They must run in the order of :data:`STAGES`."""

    def __init__(self, layout: str, model: list[str], precision: str, steps: int, root: Path) -> None:
        self.layout = layout
        self.root = root
        self.log = root / "log.txt"
        self.common = [
            *model,
            "--data.train_path=sample",
            "--data.languages=[en,sw]",
            "--data.max_prompt_length=64",
            "--data.max_response_length=32",
            f"--data.batch_size={2 // LAYOUTS[layout][0]}",
            f"--trainer.precision={precision}",
            *(["--trainer.deterministic=true"] if ON_GPU else []),
            "--trainer.enable_progress_bar=false",
        ]
        self.training = [
            "--model.optimizer=AdamW",
            "--model.optimizer.lr=1e-4",
            "--checkpoint.every_n_train_steps=1",
            f"--trainer.max_steps={steps}",
            "--trainer.limit_val_batches=0",
        ]

    def fit(self) -> None:
        self._command(["fit", f"--out={self.root / 'whole'}", *self.common, *self.training])

    def kill(self) -> None:
        out = self.root / "killed"
        started = start(command(["fit", f"--out={out}", *self.common, *self.training], self.layout), self.log)
        while not checkpoint_files(out):
            if started.poll() is not None:
                raise Failed("the run ended by itself")
            time.sleep(0.05)
        kill(workers(started, self.layout))
        if started.wait(timeout=90) == 0:
            raise Failed("the run was done before it could be killed")

    def resume(self) -> None:
        out = self.root / "killed"
        self._command(["fit", f"--out={out}", *self.common, *self.training, "--ckpt_path=last"])
        found, right = (read_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (out, self.root / "whole"))
        differ = {
            name: (found["state_dict"][name].double() - value.double()).abs().max().item()
            for name, value in right["state_dict"].items()
            if not torch.equal(found["state_dict"][name], value)
        }
        if differ:
            name, most = max(differ.items(), key=lambda item: item[1])
            raise Failed(f"{len(differ)} of the weights differ, {name} by up to {most:.1e}")

    def export(self) -> None:
        checkpoint = self.root / "killed" / "checkpoints" / "last.ckpt"
        words = ["export", f"--ckpt_path={checkpoint}", f"--out={self.root / 'model'}"]
        self._wait(start([sys.executable, "-m", "lightning_mlc", *words], self.log))

    def reload(self) -> None:
        model = AutoModelForCausalLM.from_pretrained(self.root / "model", dtype="auto")
        AutoTokenizer.from_pretrained(self.root / "model")
        trained = read_checkpoint(self.root / "killed" / "checkpoints" / "last.ckpt", {"state_dict"})["state_dict"]
        for name, value in model.state_dict().items():
            if not torch.equal(value, trained[f"policy.model.{name}"]):
                raise Failed(f"{name} differs from the checkpoint")

    def generate(self) -> None:
        out = self.root / "responses"
        checkpoint = self.root / "killed" / "checkpoints" / "last.ckpt"
        options = [f"--ckpt_path={checkpoint}", "--model.max_new_tokens=8", "--trainer.limit_predict_batches=1"]
        self._command(["predict", f"--out={out}", *self.common, *options])
        files = list(out.glob("predictions*.jsonl"))
        records = [json.loads(line) for path in files for line in path.read_text().splitlines()]
        if len(files) != LAYOUTS[self.layout][0] or {record["language"] for record in records} != {"en", "sw"}:
            raise Failed("responses are missing")

    def _command(self, words: list[str]) -> None:
        self._wait(start(command(words, self.layout), self.log))

    def _wait(self, started: subprocess.Popen[bytes]) -> None:
        if status := started.wait(timeout=600):
            raise Failed(f"status {status}:\n{tail(self.log)}")


def run_stages(layout: str, model: list[str], precision: str, steps: int, root: Path) -> tuple[list[str], bool]:
    """Run the stages. Returns the cells of the layout's row, and whether all passed; none runs after a failure."""
    stages = LayoutStages(layout, model, precision, steps, root)
    cells: list[str] = []
    for name in STAGES:
        stage: Callable[[], None] = getattr(stages, name)
        begun = time.monotonic()
        try:
            stage()
        except (Failed, subprocess.TimeoutExpired, OSError, KeyError) as error:
            print(f"{layout}, {name}: {error}", file=sys.stderr)
            return [*cells, "failed", *["" for _ in STAGES[len(cells) + 1 :]]], False
        cells.append(f"passed, {time.monotonic() - begun:.0f} s")
    return cells, True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SMOLLM2.name_or_path, help="folder, hub id, package; or 'tiny'")
    parser.add_argument("--gguf_file", default=None, help="file in that package or repository")
    parser.add_argument("--precision", default="bf16-true")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS), choices=list(LAYOUTS), metavar="LAYOUT")
    options = parser.parse_args()
    passed = True
    # A setting of cuBLAS, without which PyTorch refuses deterministic algorithms.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with tempfile.TemporaryDirectory() as scratch:
        name, gguf = options.model, options.gguf_file
        if name == "tiny":
            name = str(Path(scratch) / "tiny")
            write_random_model("tiny", SMOLLM2, Path(name))
        elif name == SMOLLM2.name_or_path:
            gguf = gguf or SMOLLM2.gguf_file
        model = [f"--model.name_or_path={name}", *([f"--model.gguf_file={gguf}"] if gguf else [])]
        print(f"| | {' | '.join(STAGES)} |\n|{'---|' * (len(STAGES) + 1)}")
        for number, layout in enumerate(options.layouts):
            root = Path(scratch) / str(number)
            root.mkdir()
            cells, all_passed = run_stages(layout, model, options.precision, options.steps, root)
            passed &= all_passed
            print(f"| {layout} | {' | '.join(cells)} |", flush=True)
    if not passed:
        sys.exit(1)


if __name__ == "__main__":
    main()
