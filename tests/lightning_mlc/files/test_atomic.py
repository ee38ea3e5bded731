"""Files that are written whole: what an error leaves, who sees what is unfinished, and who may read it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_mlc.checkpoints.saving import AtomicCheckpointIO
from lightning_mlc.files.atomic import UNFINISHED, whole_file, write_whole
from lightning_mlc.reference.scores import ReferenceScores
from lightning_mlc.reference.store import ScoreStore
from lightning_mlc.report import plot_languages, save, write_table_csv

KILLED = """
import os, signal, sys
from pathlib import Path
from lightning_mlc.files.atomic import whole_file
with whole_file(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_file_is_replaced_at_the_end_and_not_before(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_whole(path, "old")
    with whole_file(path) as file:
        file.write("é\r\n".encode())
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"\xc3\xa9\r\n"
    write_whole(path, "é\r\n")
    assert path.read_bytes() == b"\xc3\xa9\r\n"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("disk full"), ValueError("wrong"), KeyboardInterrupt()])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.json"
    write_whole(path, "old")
    with pytest.raises(type(error)), whole_file(path) as file:  # noqa: PT012
        file.write(b"half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_does_not_exist_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "none" / "a.json", "new")
    assert not list(tmp_path.iterdir())


def test_two_that_write_one_file_at_once_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with whole_file(path) as first, whole_file(path) as second:
        first.write(b"first " * 9)
        second.write(b"second")
    assert path.read_bytes() == b"first " * 9  # which was complete last
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["0123.safetensors", "step=3.ckpt", "a.json"])
def test_what_a_killed_process_leaves_is_hidden_and_has_another_ending(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], timeout=60, check=False)
    assert killed.returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.read_bytes() == b"half"
    assert left in tmp_path.glob(f".*{UNFINISHED}")  # which a run that continues removes
    assert left.suffix != path.suffix
    write_whole(path, "new")
    assert path.read_text() == "new"


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_every_file_is_for_whom_the_umask_says(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        store = ScoreStore(tmp_path / "scores", {"data": "d"}, {})
        store.append(ReferenceScores(torch.tensor([1]), -torch.ones(1, 2, 3), torch.ones(1, 2, 3)))
        save(plot_languages(None, {"val/rewards/margins/en": 0.5}, ("en",), "val/rewards/margins"), tmp_path / "a.png")
        write_table_csv(tmp_path / "a.csv", None, {"loss": 1.0})
        AtomicCheckpointIO().save_checkpoint({"global_step": 1}, tmp_path / "step=1.ckpt")
    finally:
        os.umask(before)
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in written} == {".safetensors", ".json", ".png", ".csv", ".ckpt"}
    assert {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in written} == {
        path.name: oct(mode) for path in written
    }


def test_what_is_no_file_is_written_to_and_stays(tmp_path: Path) -> None:
    """To put a file in the place of `/dev/null` would break the whole machine."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_whole(pipe, "text")
    assert os.read(reading, 10) == b"text"
    os.close(reading)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert list(tmp_path.iterdir()) == [pipe]


def test_the_first_error_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a read-only disk, the unfinished file can be neither made nor removed."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "none" / "a.json", "new")
