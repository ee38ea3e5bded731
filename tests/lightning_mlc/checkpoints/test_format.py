"""Checkpoint folders: a written folder can be read, an incomplete one is refused, and reading one runs no code."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import lightning_mlc.checkpoints.format as checkpoint_format
from lightning_mlc.checkpoints.format import open_checkpoint, read_checkpoint, save_folder
from lightning_mlc.cli import main
from lightning_mlc.errors import UserError


@pytest.fixture
def part(tmp_path: Path) -> Iterator[Any]:
    """A sharded tensor of a single process."""
    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield distribute_tensor(torch.arange(6.0).view(3, 2), init_device_mesh("cpu", (1,)), [Shard(0)])
    finally:
        distributed.destroy_process_group()


def test_what_is_written_is_read(part: Any, tmp_path: Path) -> None:
    saved = {
        "state_dict": {"a": part, "b": torch.ones(2, dtype=torch.bfloat16)},
        "optimizer_states": [
            {"state": {0: {"exp_avg": part * 2, "step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.5}]}
        ],
        "global_step": 3,
    }
    save_folder(saved, tmp_path / "a.ckpt")
    found = read_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(found["state_dict"]["a"], torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]]))
    assert found["state_dict"]["b"].dtype == torch.bfloat16
    assert torch.equal(found["optimizer_states"][0]["state"][0]["exp_avg"][2], torch.tensor([8.0, 10.0]))
    assert found["optimizer_states"][0]["param_groups"] == [{"lr": 0.5}]
    assert found["global_step"] == 3
    assert set(read_checkpoint(tmp_path / "a.ckpt", wanted={"state_dict"})) == {"state_dict"}


def test_a_folder_is_there_as_a_whole_or_not_at_all(part: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_folder({"state_dict": {"a": part}, "global_step": 1}, tmp_path / "a.ckpt")

    def full(*_arguments: Any, **_keywords: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint_format.torch, "save", full)  # the file that is written last
    with pytest.raises(UserError, match=r"^checkpoint: cannot write .*a\.ckpt \(No space left on device\)"):
        save_folder({"state_dict": {"a": part * 2}, "global_step": 2}, tmp_path / "a.ckpt")
    assert read_checkpoint(tmp_path / "a.ckpt")["global_step"] == 1
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["a.ckpt"]


class Attack:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.mkdir, (self.path,)


@pytest.mark.parametrize("file", [".metadata", "meta.pt"])
def test_nothing_in_a_folder_is_run(part: Any, tmp_path: Path, file: str) -> None:
    save_folder({"state_dict": {"a": part}}, tmp_path / "a.ckpt")
    (tmp_path / "a.ckpt" / file).write_bytes(pickle.dumps(Attack(tmp_path / "done")))
    with pytest.raises(UserError, match="ckpt_path"):
        read_checkpoint(tmp_path / "a.ckpt")
    assert not (tmp_path / "done").exists()


@pytest.mark.parametrize("damage", ["a program", "half", "gone", "of another folder"])
def test_tensors_that_cannot_be_read(part: Any, tmp_path: Path, damage: str) -> None:
    save_folder({"state_dict": {"a": part}}, tmp_path / "a.ckpt")
    (file,) = (tmp_path / "a.ckpt").glob("*.distcp")
    if damage == "a program":
        size = file.stat().st_size  # the index lists it
        file.write_bytes(pickle.dumps(Attack(tmp_path / "done")).ljust(size, b"\0"))
    elif damage == "half":
        file.write_bytes(file.read_bytes()[:10])
    elif damage == "gone":
        file.unlink()
    else:
        save_folder({"state_dict": {"b": part}}, tmp_path / "b.ckpt")
        (tmp_path / "b.ckpt" / ".metadata").replace(tmp_path / "a.ckpt" / ".metadata")
    with pytest.raises(UserError, match=r"ckpt_path: .*a\.ckpt cannot be read"):
        read_checkpoint(tmp_path / "a.ckpt")
    assert not (tmp_path / "done").exists()


def test_names_with_dots_lead_nowhere(part: Any, tmp_path: Path) -> None:
    """From protocol 4 on, a pickle may use an allowed module to reach the modules that this one imported."""
    save_folder({"state_dict": {"a": part}}, tmp_path / "a.ckpt")
    attack = b"\x80\x04\x8c\x29torch.distributed.checkpoint.metadata\x94" + b"\x8c\x08os.mkdir\x94\x93\x94"
    attack = attack.replace(b"\x8c\x29", bytes([0x8C, len("torch.distributed.checkpoint.metadata")]))
    name = str(tmp_path / "done").encode()
    attack += bytes([0x8C, len(name)]) + name + b"\x94\x85\x94R\x94."
    (tmp_path / "a.ckpt" / ".metadata").write_bytes(attack)
    pickle.loads(attack)  # it works where it is allowed
    (tmp_path / "done").rmdir()
    with pytest.raises(UserError, match="ckpt_path"):
        read_checkpoint(tmp_path / "a.ckpt")
    assert not (tmp_path / "done").exists()


def test_what_is_no_checkpoint_gets_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"there is no file .*nothing\.ckpt"):
        open_checkpoint(tmp_path / "nothing.ckpt")
    (tmp_path / "half.ckpt").mkdir()
    with pytest.raises(UserError, match=r"half\.ckpt is not a complete checkpoint: it has no meta\.pt"):
        open_checkpoint(tmp_path / "half.ckpt")
    (tmp_path / "text.ckpt").write_text("not a checkpoint")
    assert main(["export", f"--ckpt_path={tmp_path / 'text.ckpt'}", f"--out={tmp_path / 'out'}"]) == 2
    assert "text.ckpt is not a checkpoint that lightning-mlc wrote" in capsys.readouterr().err
