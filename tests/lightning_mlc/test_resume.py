"""Runs that are killed and resumed, through the real command: bitwise what the uninterrupted run does."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import example_rows, save_model, write_jsonl

from lightning_mlc.checkpoints import AtomicCheckpointIO, checkpoint_files, require_room
from lightning_mlc.errors import UserError
from lightning_mlc.metrics_file import MetricsFile

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def dropout_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2, for it has dropout: random numbers must be repeated too."""
    return save_model(tmp_path_factory.mktemp("models") / "gpt2", "gpt2")


def fit(model: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    rows = example_rows(10)
    for row in rows[::3]:
        row["prompt"].pop("sw")
    data = out.parent / "pairs.jsonl"
    if not data.exists():
        write_jsonl(data, rows)
    options: dict[str, Any] = {
        "out": out,
        "model.name_or_path": model,
        "model.optimizer": "AdamW",
        "model.optimizer.lr": 1e-3,
        "model.consistency.center": "true",
        "model.consistency.extractor_lr": 1e-3,
        "data.train_path": data,
        "data.val_share": 0.2,
        "data.batch_size": 1,
        "checkpoint.every_n_train_steps": 1,
        "trainer.accelerator": "cpu",
        "trainer.accumulate_grad_batches": 3,  # 8 rows: windows of 3, 3 and 2 micro-batches
        "trainer.max_epochs": 2,
        "trainer.precision": "32-true",
        "trainer.enable_progress_bar": "false",
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    return subprocess.run(
        [sys.executable, "-m", "lightning_mlc", "fit", *arguments, *more],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])},
    )


def kill(out: Path, batch: int, signal_number: int = signal.SIGKILL, while_writing: bool = False) -> str:
    init = {"marker": str(out.parent / "killed"), "batch": batch, "signal_number": int(signal_number)}
    init["while_writing"] = while_writing
    return f"--trainer.callbacks+={{class_path: killing.Kill, init_args: {init}}}"


def rows_of(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "metrics.csv").open()))


def final_state(out: Path) -> dict[str, Any]:
    return torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def uninterrupted(dropout_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    done = fit(dropout_model, out)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def assert_same_run(out: Path, expected: Path) -> None:
    state, right = final_state(out), final_state(expected)
    assert state["global_step"] == right["global_step"] == 6
    for name, tensor in right["state_dict"].items():
        assert torch.equal(state["state_dict"][name], tensor), name
    assert rows_of(out) == rows_of(
        expected
    )  # every loss and metric of every step, in the same order, to the last digit


@pytest.mark.slow
@pytest.mark.parametrize(
    ("batch", "while_writing"),
    [(4, False), (7, False), (3, True)],
    ids=["between micro-batches", "in the last window of an epoch", "while a checkpoint is written"],
)
def test_a_run_that_is_killed_goes_on_as_if_nothing_had_happened(
    dropout_model: Path, uninterrupted: Path, tmp_path: Path, batch: int, while_writing: bool
) -> None:
    out = tmp_path / "out"
    killed = fit(dropout_model, out, kill(out, batch, while_writing=while_writing))
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    resumed = fit(dropout_model, out, "--ckpt_path=last")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert_same_run(out, uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [4, 8])
def test_a_run_that_is_asked_to_end_saves_and_goes_on(
    dropout_model: Path, uninterrupted: Path, tmp_path: Path, batch: int
) -> None:
    """SIGTERM, as schedulers send before they preempt."""
    out = tmp_path / "out"
    never = "--checkpoint.every_n_train_steps=1000"
    ended = fit(dropout_model, out, kill(out, batch, signal.SIGTERM), never)
    assert ended.returncode == 143
    assert ended.stderr.splitlines()[-1].startswith("error: stopped by a signal")
    assert len(list((out / "checkpoints").glob("step=*.ckpt"))) == 1, ended.stderr[-2000:]
    resumed = fit(dropout_model, out, "--ckpt_path=last")
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert_same_run(out, uninterrupted)


def test_a_half_written_checkpoint_is_never_chosen(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    AtomicCheckpointIO().save_checkpoint({"global_step": 1}, folder / "step=1.ckpt")
    (folder / "step=2.ckpt").write_bytes((folder / "step=1.ckpt").read_bytes()[:-30])
    (folder / ".step=3.ckpt.unfinished").write_bytes(b"PK")
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
    with pytest.raises(UserError, match=r"GB left, a checkpoint takes about 1000000000\.0 GB"):
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
