"""What a process knows about the others, and which process reports an error."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from processes import run_in_forks
from torch import distributed

from lightning_mlc.checkpoints.finding import checkpoint_files
from lightning_mlc.checkpoints.format import REST, remove
from lightning_mlc.cli import main
from lightning_mlc.errors import CheckpointError, UserError
from lightning_mlc.processes import is_first, raise_together


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),  # torchrun
        ({"RANK": "8", "LOCAL_RANK": "0"}, False),
        ({"RANK": "0", "LOCAL_RANK": "0", "SLURM_PROCID": "1"}, True),  # torchrun on two nodes, started by srun
        ({"LOCAL_RANK": "0", "NODE_RANK": "1"}, False),  # Lightning's launcher
        ({"LOCAL_RANK": "1", "NODE_RANK": "0"}, False),
        ({"SLURM_PROCID": "0"}, True),
        ({"SLURM_PROCID": "3"}, False),
    ],
)
def test_the_first_process_knows_itself(
    variables: dict[str, str], first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_first() is first


def test_an_error_of_all_processes_is_told_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> None:
        raise_together(UserError("out", "something is wrong"))

    monkeypatch.setattr("lightning_mlc.commands.export.run", fail)
    for rank, told in (("0", "error: out: something is wrong\n"), ("1", "")):
        monkeypatch.setenv("RANK", rank)
        assert main(["export"]) == 2
        assert capsys.readouterr().err == told
    raise_together(None)


def test_an_error_of_one_process_keeps_its_kind_on_all(tmp_path: Path) -> None:
    def work() -> list[Any]:
        own = CheckpointError("checkpoint", "no room") if distributed.get_rank() == 1 else None
        try:
            raise_together(own)
        except UserError as error:
            return [type(error).__name__, error.option, error.text, error.is_shared]
        return []

    assert run_in_forks(work, tmp_path) == [["CheckpointError", "checkpoint", "no room", True]] * 2


def test_a_folder_that_is_removed_in_part_is_never_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "checkpoints" / "step=1.ckpt"
    folder.mkdir(parents=True)
    (folder / REST).touch()
    assert checkpoint_files(tmp_path) == [folder]

    def power_cut(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", power_cut)
    with pytest.raises(KeyboardInterrupt):
        remove(folder)
    assert folder.is_dir()
    assert checkpoint_files(tmp_path) == []


def test_auto_begins_in_the_folder_of_a_run_and_in_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").touch()
    options = ["--config=dpo_mlc", "--data.train_path=sample", f"--out={tmp_path}", "--ckpt_path=auto"]
    assert main(["fit", *options]) == 2
    assert f"error: out: {tmp_path} is not empty and not the folder of a run" in capsys.readouterr().err
    assert main(["validate", *options]) == 2
    assert "error: ckpt_path: there is no file auto" in capsys.readouterr().err
