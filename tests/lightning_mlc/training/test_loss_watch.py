"""A loss that is not finite ends the run: which rows it names, and that nothing wrong is saved."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import columns, example_rows, write_jsonl
from processes import Job, run_jobs
from torch import Tensor

from lightning_mlc.checkpoints.format import read_checkpoint
from lightning_mlc.cli import main
from lightning_mlc.errors import UserError
from lightning_mlc.objectives import SFT, Responses
from lightning_mlc.training.host_copy import HostCopy
from lightning_mlc.training.loss_watch import LossWatch

LONG = "a response that is far longer than all others in the file, so that an objective can recognise it"


class NoLossForLong(SFT):
    """The loss of a long response is NaN."""

    def losses(self, responses: Responses) -> Tensor:
        return super().losses(responses).masked_fill(responses.chosen.tokens >= len(LONG), float("nan"))


def watch_of(*losses: float) -> LossWatch:
    watch = LossWatch()
    for number, loss in enumerate(losses):
        watch.add(torch.tensor(loss), (f"r{2 * number}", f"r{2 * number + 1}"))
    return watch


def test_finite_losses_pass() -> None:
    watch = watch_of(1.0, 2.0)
    watch.require_finite(1.5, step=0)
    watch.add(torch.tensor(float("inf")), ("r9",))
    with pytest.raises(UserError, match=r"the loss is inf at step 1 \(batch of r9\)"):  # those before are forgotten
        watch.require_finite(float("inf"), step=1)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_the_first_micro_batch_that_is_not_finite_is_named(loss: float) -> None:
    watch = watch_of(1.0, loss, float("nan"))
    with pytest.raises(UserError, match=rf"the loss is {loss} at step 7 \(batch of r2, r3\)"):
        watch.require_finite(loss, step=7)


def test_a_sum_that_overflows_names_all_rows() -> None:
    with pytest.raises(UserError, match=r"the loss is inf at step 0 \(batch of r0, r1, r2, r3\)"):
        watch_of(3e38, 3e38).require_finite(float("inf"), step=0)


def test_many_rows_are_counted() -> None:
    watch = LossWatch()
    watch.add(torch.tensor(float("nan")), tuple(f"row-{number:04}" for number in range(300)))
    with pytest.raises(UserError, match=r"\(batch of row-0000, row-0001, .*, \d+ more\)") as found:
        watch.require_finite(float("nan"), step=0)
    assert len(str(found.value)) < 1200


def test_a_host_copy_has_the_values_of_its_time() -> None:
    values = torch.tensor([1.0, 2.0])
    assert HostCopy(values).get().tolist() == [1.0, 2.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_host_copy_waits_for_nothing_else() -> None:
    values = torch.ones(3, device="cuda")
    copy = HostCopy(values)
    values.zero_()
    torch.cuda._sleep(2_000_000_000)  # cycles, about a second
    assert copy.get().tolist() == [1.0] * 3
    assert not torch.cuda.current_stream().query()  # the device still sleeps


def command(model: Path, data: Path, out: Path, *more: str, **changes: Any) -> list[str]:
    options: dict[str, Any] = {
        "out": out,
        "model.name_or_path": model,
        "model.optimizer": "SGD",
        "model.optimizer.lr": 1e-2,
        "data.train_path": data,
        "data.val_share": 0,
        "data.batch_size": 2,
        "checkpoint.every_n_train_steps": 1,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.accumulate_grad_batches": 3,
        "trainer.max_epochs": 2,
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    return ["fit", *more, *(f"--{name}={value}" for name, value in options.items())]


def spoil(**arguments: Any) -> str:
    return f"--trainer.callbacks+={json.dumps({'class_path': 'killing.Spoil', 'init_args': arguments})}"


def saved(out: Path) -> tuple[int, bool]:
    """The step of the last checkpoint, and whether all of its numbers are finite."""
    checkpoint = read_checkpoint(out / "checkpoints" / "last.ckpt")
    return checkpoint["global_step"], all(bool(value.isfinite().all()) for value in checkpoint["state_dict"].values())


def rows_with_a_long_one(place: int) -> list[dict[str, Any]]:
    rows = example_rows(16)
    rows[place]["chosen"] = LONG
    return rows


@pytest.mark.parametrize("accumulate", [3, 4])
def test_the_rows_of_the_micro_batch_are_named(
    accumulate: int, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight micro-batches in an epoch: windows of 3, 3 and 2, the last of which is cut short, or of 4 and 4. The state
    before the step is saved, and the step has changed nothing in it."""
    data = write_jsonl(tmp_path / "rows.jsonl", rows_with_a_long_one(5))
    arguments = command(tiny_model, data, tmp_path / "out", trainer__accumulate_grad_batches=accumulate)
    assert main([*arguments, f"--model.objective={__name__}.NoLossForLong"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    found = re.match(
        r"error: the loss is nan at step (\d+) \(batch of (r\d+), (r\d+)\); lower the learning rate", error
    )
    assert found is not None, error
    assert "r5" in found.groups()[1:]
    step = int(found[1])
    assert step > 0, "choose another row, so that the test has a step before"
    assert saved(tmp_path / "out") == (step, True)
    assert len(columns(tmp_path / "out")["train/loss"]) == step  # the step that failed is not logged


def test_weights_that_are_not_finite_are_never_saved(
    tiny_model: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss of step 1 is finite, and its gradient is not. A checkpoint is due after it."""
    arguments = command(tiny_model, pairs_file, tmp_path / "out", spoil(what="gradient", step=1))
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"error: policy\.model\S+ is not finite after step 2, so no checkpoint is written; lower", error)
    assert saved(tmp_path / "out") == (1, True)


@pytest.mark.slow
@pytest.mark.parametrize("every", [2, 100])
def test_not_even_when_the_loss_shows_it_later(
    every: int,
    tiny_model: Path,
    pairs_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Between two checkpoints the next loss is NaN. A run that fails saves its state, but not this one."""
    changes: dict[str, Any] = {"checkpoint__every_n_train_steps": every, "trainer__max_epochs": 4}
    arguments = command(tiny_model, pairs_file, tmp_path / "out", spoil(what="gradient", step=2), **changes)
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: the loss is nan at step 3 (batch of ")
    assert "is not finite after step 3, so no checkpoint is written" in caplog.text
    if every == 2:
        assert saved(tmp_path / "out") == (2, True)
    else:
        assert not (tmp_path / "out" / "checkpoints" / "last.ckpt").exists()


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("strategy", ["--trainer.strategy=ddp", "--config=strategy/fsdp2"])
def test_two_processes_end_together(strategy: str, tiny_model: Path, tmp_path: Path) -> None:
    """One of them has a NaN: both end at this step, one line names the rows of that process, nothing wrong is saved."""
    data = write_jsonl(tmp_path / "rows.jsonl", example_rows(16))
    jobs = {}
    for what in ("weight", "gradient"):
        more = [strategy, spoil(what=what, step=1, rank=1)]
        jobs[what] = Job(command(tiny_model, data, tmp_path / what, *more, data__batch_size=1, trainer__devices=2))
    ended = dict(zip(jobs, run_jobs(list(jobs.values()), tmp_path / "jobs"), strict=True))
    for what, begins in (("weight", "error: the loss is nan at step 1 (batch of r"), ("gradient", "error: policy.")):
        assert ended[what].status == 2, ended[what].stderr
        assert ended[what].left == 0
        errors = [line for text in ended[what].stderr for line in text.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, errors
        assert errors[0].startswith(begins)
        assert saved(tmp_path / what) == (1, True)
