"""Find the checkpoints of a run that are complete, and check that the disk has room for more."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

from lightning_mlc.checkpoints.format import REST, is_folder
from lightning_mlc.errors import UserError


def checkpoint_folder(out: str) -> str:
    """The folder for the checkpoints of a run with this ``out``."""
    return str(Path(out) / "checkpoints")


def checkpoint_files(out: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in Path(checkpoint_folder(str(out))).glob("*.ckpt") if _is_whole(path)]
    # A link comes after what it points to.
    return sorted(found, key=lambda path: (_written_at(path), path.is_symlink()))


def _written_at(path: Path) -> float:
    return (path / REST if path.is_dir() else path).stat().st_mtime


def find_checkpoint(path: Path) -> Path:
    """The checkpoint at ``path``. If ``path`` is the folder of a run, its newest complete checkpoint.

    Raises:
        UserError: There is none.
    """
    if path == Path("last"):
        raise UserError(
            "ckpt_path", "last does not say which run; give the folder of the run, such as --ckpt_path runs/mlc"
        )
    if not path.is_dir() or is_folder(path) or path.suffix == ".ckpt":
        return path
    run = path.parent if path.name == Path(checkpoint_folder("")).name else path
    found = checkpoint_files(run)
    if not found:
        raise UserError(
            "ckpt_path",
            f"there is no complete checkpoint in {checkpoint_folder(str(run))}; "
            "give a .ckpt file, or the folder of a run",
        )
    return found[-1].resolve()


def _is_whole(path: Path) -> bool:
    """Whether ``path`` is a complete checkpoint."""
    if path.is_dir():  # written by several processes; the file that `is_folder` looks for is written last
        return is_folder(path)
    return zipfile.is_zipfile(path)


def require_room(out: Path, size: int) -> None:
    """Raises:
    UserError: ``out`` cannot be written to, or its disk has less than ``size`` bytes left, the size of a checkpoint.
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
            f"the disk of {folder} has {available / 1e9:.1f} GB left, but a checkpoint takes about "
            f"{size / 1e9:.1f} GB; free some space or give another --out",
        )
