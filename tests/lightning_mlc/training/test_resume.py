"""Runs that are killed and resumed through the real command do bitwise the same as an uninterrupted run."""

from __future__ import annotations

import csv
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import example_rows, metrics_rows, save_model, write_jsonl
from processes import Ended, Job, run_jobs

from lightning_mlc.checkpoints.finding import checkpoint_files, require_room
from lightning_mlc.checkpoints.saving import AtomicCheckpointIO
from lightning_mlc.errors import UserError
from lightning_mlc.training.metrics_file import MetricsFile

pytestmark = pytest.mark.xdist_group("processes")


@dataclass(frozen=True)
class Case:
    """How a run ends before it is resumed."""

    end: dict[str, Any]
    status: int = -signal.SIGKILL
    steps: int = 1
    """Optimizer steps from one checkpoint to the next."""


TERM = {"signal_number": int(signal.SIGTERM)}
NEVER = 1000
# 8 micro-batches in an epoch, in steps of 3, 3 and 2.
CASES = {
    "killed between micro-batches": Case({"batch": 4}),
    "killed in the last window of an epoch": Case({"batch": 7}),
    "killed in validation": Case({"batch": 1, "validating": True}),
    "killed after an epoch": Case({"batch": 9}),
    "killed while a checkpoint is written": Case({"batch": 3, "while_writing": "file"}),
    "asked to end between micro-batches": Case({"batch": 4, **TERM}, 143, NEVER),
    "asked to end at the start of an epoch": Case({"batch": 8, **TERM}, 143, NEVER),
    "asked to end in validation": Case({"batch": 0, "validating": True, **TERM}, 143, NEVER),
}


def fit(model: Path, data: Path, out: Path, *more: str, **changes: Any) -> list[str]:
    options: dict[str, Any] = {
        "out": out,
        "model.name_or_path": model,
        "model.optimizer": "AdamW",
        "model.optimizer.lr": 1e-3,
        "model.scheduler": "lightning_mlc.training.schedules.Warmup",
        "model.consistency.center": "true",
        "model.consistency.extractor_lr": 1e-3,
        "data.train_path": data,
        "data.cache_dir": data.parent / "cache",
        "data.val_share": 0.25,
        "data.val_batch_size": 1,
        "data.batch_size": 1,
        "checkpoint.every_n_train_steps": 1,
        "trainer.accelerator": "cpu",
        "trainer.accumulate_grad_batches": 3,
        "trainer.max_epochs": 2,
        "trainer.precision": "32-true",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        **changes,
    }
    return ["fit", *more, *(f"--{name}={value}" for name, value in options.items())]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Ended]]:
    """An undisturbed run, each case with its resumption, and how the cases ended."""
    root = tmp_path_factory.mktemp("runs")
    model = save_model(root / "model", "gpt2")  # it has dropout, so random numbers must be repeated too
    rows = example_rows(11)
    for row in rows[::3]:
        row["prompt"].pop("sw")
    data = write_jsonl(root / "pairs.jsonl", rows)
    jobs = [Job(fit(model, data, root / "undisturbed"), 1)]
    for name, case in CASES.items():
        end = {"class_path": "killing.Kill", "init_args": {"marker": str(root / f"{name}, done"), **case.end}}
        every = {"checkpoint.every_n_train_steps": case.steps}
        jobs += [
            Job(fit(model, data, root / name, f"--trainer.callbacks+={json.dumps(end)}", **every), 1),
            Job(fit(model, data, root / name, "--ckpt_path=last", **every), 1),
        ]
    ended = run_jobs(jobs, root / "jobs")
    for end, job in zip(ended[::2], jobs[::2], strict=True):
        assert end.status == 0, (job, end)
    return root, dict(zip(CASES, ended[1::2], strict=True))


def final_state(out: Path) -> dict[str, Any]:
    return torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_run_that_is_ended_goes_on_as_if_nothing_had_happened(runs: tuple[Path, dict[str, Ended]], name: str) -> None:
    root, ended = runs
    assert ended[name].status == CASES[name].status, ended[name].stderr
    if ended[name].status == 143:
        assert ended[name].stderr[0].splitlines()[-1].startswith("error: stopped by a signal")
    state, right = final_state(root / name), final_state(root / "undisturbed")
    assert state["global_step"] == right["global_step"] == 6
    for key, tensor in right["state_dict"].items():
        assert torch.equal(state["state_dict"][key], tensor), key
    # Every loss and metric of every step, in the same order, to the last digit.
    assert metrics_rows(root / name) == metrics_rows(root / "undisturbed")
    files = [sorted(path.name for path in (root / run / "checkpoints").iterdir()) for run in (name, "undisturbed")]
    assert files[0] == files[1]


def test_a_half_written_checkpoint_is_never_chosen(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    AtomicCheckpointIO().save_checkpoint({"global_step": 1}, folder / "step=1.ckpt")
    (folder / "step=2.ckpt").write_bytes((folder / "step=1.ckpt").read_bytes()[:-30])
    (folder / ".step=3.ckpt.1-0.unfinished").write_bytes(b"PK")
    (folder / "step=4.ckpt").mkdir()  # of several processes, the list of its parts not yet written
    assert checkpoint_files(tmp_path) == [folder / "step=1.ckpt"]


def test_the_newest_checkpoint_comes_last(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for age, step in enumerate([10, 9, 100]):
        AtomicCheckpointIO().save_checkpoint({"global_step": step}, folder / f"step={step}.ckpt")
        os.utime(folder / f"step={step}.ckpt", (1_000_000 - age, 1_000_000 - age))
    assert [path.name for path in checkpoint_files(tmp_path)] == ["step=100.ckpt", "step=9.ckpt", "step=10.ckpt"]


class _FullDisk:
    def __reduce__(self) -> Any:
        raise OSError(28, "No space left on device")


def test_a_full_disk_costs_no_earlier_checkpoint_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"global_step": 1}, path)
    with pytest.raises(
        UserError, match=r"checkpoint: cannot write .*last\.ckpt \(\[Errno 28\] No space left on device\)"
    ):
        AtomicCheckpointIO().save_checkpoint({"weights": torch.zeros(9), "unwritable": _FullDisk()}, path)
    assert torch.load(path, weights_only=True) == {"global_step": 1}
    assert list(path.parent.iterdir()) == [path]


def test_a_run_that_has_no_room_for_a_checkpoint_is_told_before_it_trains(tmp_path: Path) -> None:
    require_room(tmp_path / "not" / "there", 1000)
    with pytest.raises(UserError, match=r"GB left, but a checkpoint takes about 1000000000\.0 GB"):
        require_room(tmp_path, 10**18)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"out: cannot write to .*file"):
        require_room(tmp_path / "file" / "out", 1000)


def test_metrics_of_steps_that_are_made_again_are_dropped(tmp_path: Path) -> None:
    first = MetricsFile(str(tmp_path))
    for step in range(4):
        first.log_metrics({"train/loss": step / 2}, step)
    first.log_metrics({"val/loss": 9.0}, 1)
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("0.25,")  # and then the process was killed
    second = MetricsFile(str(tmp_path))
    second.continue_from(2)
    second.log_metrics({"train/loss": 7.0, "new": 1.0}, 2)
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [(row["step"], row["train/loss"], row["val/loss"]) for row in rows] == [
        ("0", "0.0", ""),
        ("1", "0.5", ""),
        ("1", "", "9.0"),
        ("2", "7.0", ""),
    ]
    assert [row["new"] for row in rows] == ["", "", "", "1.0"]
