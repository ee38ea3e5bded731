"""Unfinished files are removed: in the end, and after a process that was killed."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from conftest import example_rows, write_jsonl

from lightning_mlc.data.datamodule import MultilingualData
from lightning_mlc.data.scratch import AGE, scratch_folder
from lightning_mlc.errors import UserError

pytest.importorskip("fcntl")


def hold(parent: Path, told: int) -> None:
    with scratch_folder(parent, "reading") as folder:
        (folder / "spool").write_text("x")
        os.write(told, folder.name.encode())
        signal.pause()


def grow_old(folder: Path) -> None:
    then = folder.stat().st_mtime - 2 * AGE
    os.utime(folder, (then, then))


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_has_is_not(tmp_path: Path) -> None:
    read, told = os.pipe()
    other = multiprocessing.get_context("fork").Process(target=hold, args=(tmp_path, told), daemon=True)
    other.start()
    held = tmp_path / os.read(read, 100).decode()
    os.close(read)
    os.close(told)
    grow_old(held)
    with scratch_folder(tmp_path, "reading") as folder:
        assert set(tmp_path.iterdir()) == {held, folder}
    other.terminate()
    other.join()
    assert (held / "spool").read_text() == "x"
    grow_old(held)
    with scratch_folder(tmp_path, "reading"):
        assert not held.exists()
    assert not list(tmp_path.iterdir())


def test_what_is_new_or_of_another_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".reading-new").mkdir()
    (tmp_path / "reading-own").mkdir()
    grow_old(tmp_path / "reading-own")
    with scratch_folder(tmp_path, "reading"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {".reading-new", "reading-own"}


def test_a_folder_that_was_renamed_stays(tmp_path: Path) -> None:
    with scratch_folder(tmp_path, "unfinished") as folder:
        folder.rename(tmp_path / "finished")
    assert [path.name for path in tmp_path.iterdir()] == ["finished"]


def test_a_cache_that_cannot_be_written_to(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    path = str(write_jsonl(tmp_path / "a.jsonl", example_rows(2)))
    with pytest.raises(UserError) as told:
        MultilingualData(path, name_or_path=str(tiny_model), cache_dir=str(tmp_path / "cache")).prepare_data()
    assert told.value.option == "data.cache_dir"
    assert told.value.text == f"cannot write to {tmp_path / 'cache'} (File exists); give another folder"


def test_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^data\.cache_dir: no space is left in .*; free some space"):  # noqa: SIM117
        with scratch_folder(tmp_path, "reading"):
            raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError), scratch_folder(tmp_path, "reading"):
        (tmp_path / "none").read_text()
    assert not list(tmp_path.iterdir())
