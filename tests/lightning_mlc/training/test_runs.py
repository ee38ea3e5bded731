"""Messages to the user when a run starts or resumes, through the real command."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import example_rows, write_jsonl

from lightning_mlc.cli import main
from lightning_mlc.data.datamodule import MultilingualData
from lightning_mlc.processes import DataParallel
from lightning_mlc.training.resumption import ExactResume


def fit(model: Path, data: Path, out: Path, *more: str, **changes: Any) -> list[str]:
    options: dict[str, Any] = {
        "out": out,
        "model.name_or_path": model,
        "model.objective": "SFT",
        "model.optimizer": "SGD",
        "model.optimizer.lr": 1e-3,
        "data.train_path": data,
        "data.val_share": 0.25,
        "data.batch_size": 1,
        "checkpoint.every_n_train_steps": 1,
        "trainer.accelerator": "cpu",
        "trainer.max_epochs": 2,
        "trainer.precision": "32-true",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        **changes,
    }
    return ["fit", *(f"--{name}={value}" for name, value in options.items()), *more]


def told(capsys: pytest.CaptureFixture[str]) -> str:
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert len(line) <= 310  # "error: " and a message of 300 characters
    return line.removeprefix("error: ")


@pytest.mark.parametrize(
    ("more", "option", "text"),
    [
        (
            ["--model.scheduler=lightning_mlc.training.schedules.Warmup", "--trainer.max_epochs=-1"],
            "model.scheduler.total_steps",
            "give it, or trainer.max_steps",
        ),
        (
            ["--model.scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau"],
            "model.scheduler",
            "ReduceLROnPlateau follows a metric",
        ),
        (["--checkpoint.monitor=val/nll/meam"], "checkpoint.monitor", "did you mean val/nll/mean?"),
        (["--checkpoint.monitor=train/lss"], "checkpoint.monitor", "did you mean train/loss?"),
        (["--checkpoint.monitor=val/loss", "--data.val_share=0"], "checkpoint.monitor", "nothing is validated"),
        (["--checkpoint.save_top_k=3"], "checkpoint", "save_top_k=3, monitor=None) is not a valid configuration"),
        (["--model.optimizer=LBFGS"], "model.optimizer", "LBFGS doesn't support per-parameter options"),
        (["--model.optimizer.lr=-1"], "model.optimizer", "Invalid learning rate: -1"),
        (["--model.optimizer=SparseAdam"], "model.optimizer", "SparseAdam takes sparse gradients alone"),
        (
            ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val/lossy"],
            "trainer.callbacks",
            "did you mean val/loss?",
        ),
    ],
)
def test_what_a_run_cannot_do_is_told_at_its_start(
    more: list[str], option: str, text: str, tiny_model: Path, pairs_file: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert main(fit(tiny_model, pairs_file, tmp_path / "out", *more)) == 2
    found = told(capsys)
    assert found.startswith(f"{option}: ")
    assert text in found
    assert not list((tmp_path / "out").glob("checkpoints/*"))


def test_a_schedule_that_ends_before_the_run_is_told(
    tiny_model: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schedule = ["--model.scheduler=OneCycleLR", "--model.scheduler.max_lr=1", "--model.scheduler.total_steps=1"]
    assert main(fit(tiny_model, pairs_file, tmp_path / "out", *schedule)) == 2
    assert told(capsys).startswith("model.scheduler: Tried to step 2 times. The specified number of total steps is 1")


def test_a_monitored_metric_that_is_there_is_taken(tiny_model: Path, pairs_file: Path, tmp_path: Path) -> None:
    for name in ("val/nll/mean", "train/loss"):
        out = tmp_path / name.replace("/", "-")
        end = [f"--checkpoint.monitor={name}", "--trainer.max_steps=2", "--checkpoint.every_n_train_steps=2"]
        assert main(fit(tiny_model, pairs_file, out, *end, **{"data.val_share": 0.5})) == 0
        assert list((out / "checkpoints").glob("*.ckpt"))


@pytest.fixture(scope="module")
def stopped(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run with a budget of tokens: its checkpoints after two steps and after an epoch of several, and its data."""
    root = tmp_path_factory.mktemp("stopped")
    data = write_jsonl(root / "pairs.jsonl", example_rows(16))
    for name, end in (("middle", "--trainer.max_steps=2"), ("end", "--trainer.max_epochs=1")):
        assert main(budgeted(tiny_model, data, root / name, end)) == 0
    return root, data


def budgeted(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    budget = {"data.batch_size": "null", "data.tokens_per_batch": 400, "data.cache_dir": data.parent / "cache"}
    return fit(model, data, out, *more, **budget)


def goes_on(stopped: tuple[Path, Path], name: str, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of the run ``name`` and of its data."""
    root, data = stopped
    shutil.copytree(root / name, tmp_path / "out", symlinks=True)
    return tmp_path / "out", Path(shutil.copy(data, tmp_path / "pairs.jsonl"))


def newest(out: Path) -> Path:
    return (out / "checkpoints" / "last.ckpt").resolve()


def other_rows(count: int) -> list[dict[str, Any]]:
    return [row | {"chosen": row["chosen"].replace("No", "So")} for row in example_rows(count)]


def test_other_rows_in_the_middle_of_an_epoch_are_refused(
    stopped: tuple[Path, Path], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = goes_on(stopped, "middle", tmp_path)
    write_jsonl(data, other_rows(16))
    assert main(budgeted(tiny_model, data, out, "--ckpt_path=last")) == 2
    assert told(capsys).startswith("ckpt_path: the checkpoint is in the middle of an epoch, and the examples")


@pytest.mark.parametrize("change", ["--data.max_response_length=18", "--data.val_share=0.2"])
def test_what_cuts_an_epoch_in_another_way_is_refused_in_its_middle(
    change: str, stopped: tuple[Path, Path], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cost of an example depends on the limits of its length and on which rows are run."""
    out, data = goes_on(stopped, "middle", tmp_path)
    assert main(budgeted(tiny_model, data, out, "--ckpt_path=last", change)) == 2
    assert told(capsys).startswith("ckpt_path: the checkpoint is in the middle of an epoch")


def test_at_the_end_of_an_epoch_other_rows_are_taken_and_told(
    stopped: tuple[Path, Path], tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, data = goes_on(stopped, "end", tmp_path)
    write_jsonl(data, other_rows(16))
    with caplog.at_level(logging.WARNING):
        assert main(budgeted(tiny_model, data, out, "--ckpt_path=last")) == 0
    assert "the next epoch trains on other examples, or in another order (data.train_path" in caplog.text


def test_the_same_data_elsewhere_are_the_same_data(
    stopped: tuple[Path, Path], tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, data = goes_on(stopped, "middle", tmp_path)
    assert main(budgeted(tiny_model, data, out, "--ckpt_path=last", "--trainer.max_steps=3")) == 0
    assert "other examples" not in caplog.text


def test_a_checkpoint_of_an_earlier_version_does_not_say_and_is_taken(
    stopped: tuple[Path, Path], tiny_model: Path, tmp_path: Path
) -> None:
    out, data = goes_on(stopped, "middle", tmp_path)
    checkpoint = torch.load(newest(out), weights_only=True)
    del checkpoint[ExactResume.KEY]["data"], checkpoint[ExactResume.KEY]["order"]
    torch.save(checkpoint, newest(out))
    assert main(budgeted(tiny_model, data, out, "--ckpt_path=last", "--trainer.max_steps=3")) == 0


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"model.optimizer": "RMSprop"}, "model.optimizer: is RMSprop, but the checkpoint has the state of SGD"),
        (
            {"model.consistency.extractor_dim": 8},
            "ckpt_path: representation.extractor.weight has the shape (512, 32) in the checkpoint and (8, 32) here",
        ),
    ],
)
def test_parts_that_the_checkpoint_has_in_another_form_are_refused(
    change: dict[str, Any], line: str, stopped: tuple[Path, Path], tiny_model: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, data = goes_on(stopped, "middle", tmp_path)
    assert main(budgeted(tiny_model, data, out, "--ckpt_path=last", *(f"--{k}={v}" for k, v in change.items()))) == 2
    assert told(capsys).startswith(line)


def test_a_rate_that_the_checkpoint_overrules_is_told(
    stopped: tuple[Path, Path], tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out, data = goes_on(stopped, "middle", tmp_path)
    more = ["--ckpt_path=last", "--trainer.max_steps=3", "--model.optimizer.lr=0.5"]
    with caplog.at_level(logging.WARNING):
        assert main(budgeted(tiny_model, data, out, *more)) == 0
    assert "the optimizer keeps the options in the checkpoint: lr 0.001 and not 0.5" in caplog.text
    (group, *_) = torch.load(newest(out), weights_only=True)["optimizer_states"][0]["param_groups"]
    assert group["lr"] == 0.001


def test_a_run_beyond_its_last_epoch_is_told(
    stopped: tuple[Path, Path], tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, data = goes_on(stopped, "end", tmp_path)
    assert main(budgeted(tiny_model, data, out, "--ckpt_path=last", "--trainer.max_epochs=2")) == 0
    capsys.readouterr()
    assert main(budgeted(tiny_model, data, out, "--ckpt_path=last", "--trainer.max_epochs=1")) == 2
    assert told(capsys).startswith("trainer.max_epochs: is 1, but the checkpoint is of epoch 2")


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_each_evaluation_batch_is_of_one_process(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five rows in batches of two: three batches, the last of one row."""
    data = MultilingualData(val_batch_size=2)
    data._rows["predict"] = list(range(5))
    own = []
    for rank in range(size):
        share = DataParallel(size=size, rank=rank)
        monkeypatch.setattr(MultilingualData, "share", property(lambda _, share=share: share))
        own += [place * size + rank for place in range(-(-3 // size)) if not data.is_repeat("predict", place)]
    assert sorted(own) == [0, 1, 2]
