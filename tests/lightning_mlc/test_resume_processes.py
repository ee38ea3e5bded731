"""Two processes that are killed and resumed, data parallel and sharded: bitwise what the uninterrupted run does.

Through the real command, under the agent of ``torchrun``, over gloo on the CPU.
"""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import example_rows, metrics_rows, save_model, write_jsonl
from processes import Ended, Job, run_jobs

from lightning_mlc.checkpoint_format import read_checkpoint

STRATEGIES = {"ddp": ["--trainer.strategy=ddp"], "fsdp2": ["--config=strategy/fsdp2"]}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """GPT-2, for it has dropout; and 16 rows to train on, some without a translation."""
    folder = tmp_path_factory.mktemp("inputs")
    rows = example_rows(20)
    for row in rows[::3]:
        row["prompt"].pop("sw")
    return save_model(folder / "model", "gpt2"), write_jsonl(folder / "pairs.jsonl", rows)


def fit(inputs: tuple[Path, Path], out: Path, *more: str, **changes: Any) -> list[str]:
    """On two processes an epoch has optimizer steps of 3, 3 and 2 micro-batches."""
    options: dict[str, Any] = {
        "out": out,
        "model.name_or_path": inputs[0],
        "model.optimizer": "AdamW",
        "model.optimizer.lr": 1e-3,
        "model.consistency.center": "true",
        "model.consistency.extractor_lr": 1e-3,
        "data.train_path": inputs[1],
        "data.cache_dir": inputs[1].parent / "cache",
        "data.val_share": 0.2,
        "data.batch_size": 1,
        "checkpoint.every_n_train_steps": 1,
        "trainer.accelerator": "cpu",
        "trainer.devices": 2,
        "trainer.accumulate_grad_batches": 3,
        "trainer.max_epochs": 2,
        "trainer.precision": "32-true",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    return ["fit", *more, *(f"--{name}={value}" for name, value in options.items())]


def kill(out: Path, name: str, batch: int, **more: Any) -> str:
    init = {"marker": str(out.with_name(f"{out.name}-{name}")), "batch": batch, **more}
    return f"--trainer.callbacks+={json.dumps({'class_path': 'killing.Kill', 'init_args': init})}"


def assert_same_run(out: Path, expected: Path) -> None:
    """Weights, optimizer state, and every loss and metric of every step, to the last digit."""
    state, right = (read_checkpoint(folder / "checkpoints" / "last.ckpt") for folder in (out, expected))
    assert state["global_step"] == right["global_step"] == 6
    for name, tensor in right["state_dict"].items():
        assert torch.equal(state["state_dict"][name], tensor), name
    for index, values in right["optimizer_states"][0]["state"].items():
        for name, value in values.items():
            assert torch.equal(state["optimizer_states"][0]["state"][index][name], value), (index, name)
    assert metrics_rows(out) == metrics_rows(expected)


@pytest.fixture(scope="module")
def killed(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Ended]]]:
    """For each strategy, a run that nothing disturbs, and one that is killed again and again; and how each ended."""
    root = tmp_path_factory.mktemp("killed")
    jobs: dict[str, list[Job]] = {}
    for name, strategy in STRATEGIES.items():
        out = root / name
        ends = [
            kill(out, "both", 4),  # the second micro-batch of the second step
            kill(out, "one", 5, rank=1),  # in validation after the third step, which only this process reaches
            kill(out, "part", 1, while_writing="part" if name == "fsdp2" else "file"),
            kill(out, "file", 1, while_writing="file"),
        ]
        jobs[name] = [Job(fit(inputs, root / f"{name}-undisturbed", *strategy))]
        for number, end in enumerate(ends):
            resumes = ["--ckpt_path=last"] if number else []
            jobs[name].append(Job(fit(inputs, out, *strategy, *resumes, end)))
        jobs[name].append(Job(fit(inputs, out, *strategy, "--ckpt_path=last")))
    ended = iter(run_jobs([job for some in jobs.values() for job in some], root / "jobs"))
    return root, {name: [next(ended) for _ in some] for name, some in jobs.items()}


@pytest.mark.slow
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_killed_processes_go_on_as_if_nothing_had_happened(
    killed: tuple[Path, dict[str, list[Ended]]], strategy: str
) -> None:
    root, ended = killed
    undisturbed, *ends, last = ended[strategy]
    assert undisturbed.status == last.status == 0, last
    # Of two that end at once, the agent may see first the one that missed the other.
    assert all(end.status in (-signal.SIGKILL, 1) for end in ends), ends
    assert not any(end.left for end in ends)
    assert max(end.seconds for end in ends) < 30, "one process waited for another that was dead"
    assert_same_run(root / strategy, root / f"{strategy}-undisturbed")
    names = [
        sorted(path.name for path in (root / out / "checkpoints").iterdir())
        for out in (strategy, f"{strategy}-undisturbed")
    ]
    assert names[0] == names[1]
