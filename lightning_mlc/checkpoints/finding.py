"""Where the checkpoints of a run are, which of them are whole, and whether there is room for more."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

from lightning_mlc.checkpoints.format import REST, is_folder
from lightning_mlc.errors import UserError


def checkpoint_folder(out: str) -> str:
    """Where a run with this ``out`` keeps its checkpoints."""
    return str(Path(out) / "checkpoints")


def checkpoint_files(out: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    found = [path for path in Path(checkpoint_folder(str(out))).glob("*.ckpt") if _is_whole(path)]
    # A link comes after what it points to.
    return sorted(found, key=lambda path: (_written_at(path), path.is_symlink()))


def _written_at(path: Path) -> float:
    return (path / REST if path.is_dir() else path).stat().st_mtime


def find_checkpoint(path: Path) -> Path:
    """The checkpoint at ``path``, or the newest whole one of the run whose folder that is.

    Raises:
        UserError: There is none.
    """
    if path == Path("last"):
        raise UserError("ckpt_path", "the last checkpoint of which run? Give its folder, as in --ckpt_path runs/mlc")
    if not path.is_dir() or is_folder(path) or path.suffix == ".ckpt":
        return path
    run = path.parent if path.name == Path(checkpoint_folder("")).name else path
    found = checkpoint_files(run)
    if not found:
        raise UserError("ckpt_path", f"there is no whole checkpoint in {checkpoint_folder(str(run))}")
    return found[-1].resolve()


def _is_whole(path: Path) -> bool:
    """Whether ``path`` is a checkpoint that was written to its end."""
    if path.is_dir():  # of several processes: what lists the parts is written last
        return is_folder(path)
    return zipfile.is_zipfile(path)


def require_room(out: Path, size: int) -> None:
    """Raises:
    UserError: ``out`` cannot be written to, or the disk has less than ``size`` bytes, a checkpoint's, left.
    """
    folder = out
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK) or not folder.is_dir():
        raise UserError("out", f"cannot write to {folder}; give another --out")
    free = os.statvfs(folder)
    available = free.f_bavail * free.f_frsize
    if available < size:
        raise UserError(
            "out",
            f"{folder} has {available / 1e9:.1f} GB left, a checkpoint takes about {size / 1e9:.1f} GB; "
            "make room or give another --out",
        )
