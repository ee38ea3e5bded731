"""Checkpoints on disk: one file, or a folder to which every process of FSDP2 has added its part.

Both have the same content. In a folder, the sharded tensors are stored in PyTorch's distributed format
(``torch.distributed.checkpoint``). ``meta.pt`` holds everything else, and the names of these tensors in their place.
Both can be read under any strategy and by any number of processes.

Nothing here runs code from a checkpoint.
"""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_mlc.errors import CheckpointError, UserError, first_line
from lightning_mlc.files.atomic import UNFINISHED
from lightning_mlc.processes import raise_together

REST = "meta.pt"
"""The file in a checkpoint folder for everything that is not a sharded tensor."""
_NAME = "lightning_mlc.stored_as"
"""Key of the placeholder that stands where a sharded tensor was."""


@dataclass(frozen=True)
class Stored:
    """A tensor in a checkpoint folder that has not been read yet."""

    folder: Path
    name: str


def bytes_of(path: Path) -> int:
    """The size of a checkpoint, which is a file or a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


# ---- writing ----------------------------------------------------------------------------------------


def save_folder(checkpoint: dict[str, Any], folder: Path) -> None:
    """Write ``checkpoint`` to ``folder``. All processes must call it; each writes its part of the sharded tensors.

    The folder is written under another name and renamed when it is complete, so it is whole or not there.

    Raises:
        CheckpointError: It cannot be written.
    """
    tensors: dict[str, Any] = {}

    def take(value: Any, path: tuple[str, ...]) -> Any:
        if not isinstance(value, DTensor):
            return value
        name = "/".join(path)
        tensors[name] = value
        return {_NAME: name}

    rest = _walk(checkpoint, take)
    is_first = torch.distributed.get_rank() == 0
    unfinished = folder.with_name(f".{folder.name}{UNFINISHED}")  # the same on every process

    def prepare() -> None:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)

    def complete() -> None:
        with (unfinished / REST).open("wb") as file:
            torch.save(rest, file)
            file.flush()
            os.fsync(file.fileno())
        remove(folder)
        unfinished.rename(folder)

    # After each action all processes continue or none does, because the next action needs all of them.
    for action in (
        prepare if is_first else None,
        lambda: save(tensors, checkpoint_id=unfinished),
        complete if is_first else None,
    ):
        error = None
        try:
            if action is not None:
                action()
        except (OSError, RuntimeError, CheckpointException) as found:
            error = cannot_write(folder, found)
            if is_first:
                shutil.rmtree(unfinished, ignore_errors=True)
        raise_together(error)


def cannot_write(path: Path, error: BaseException) -> CheckpointError:
    """The error to raise when ``error`` stopped a checkpoint from being written to ``path``."""
    return CheckpointError(
        "checkpoint",
        f"cannot write {path} ({reason(error)}); training stopped, but earlier checkpoints are intact: "
        "free some space and continue with --ckpt_path last",
    )


def remove(path: Path) -> None:
    """Remove a checkpoint, or whatever is at ``path``. A folder stops being a checkpoint as soon as removal starts."""
    if path.is_dir() and not path.is_symlink():
        (path / REST).unlink(missing_ok=True)
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def reason(error: BaseException) -> str:
    """Why a checkpoint could not be written or read, in one line: the system's own message if there is one."""
    if isinstance(error, CheckpointException):  # it holds an error for each process that failed
        error = next(iter(error.failures.values()))[0]
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):  # torch wraps it in its own errors
        cause = cause.__context__
    return first_line(cause or error)


def gather(checkpoint: dict[str, Any], device: torch.device, keep: bool) -> dict[str, Any]:
    """``checkpoint`` with its sharded tensors gathered in CPU memory, one after the other.

    All processes must call it. Those that do not ``keep`` the result get None in place of these tensors.
    """

    def whole(value: Any, _path: tuple[str, ...]) -> Any:
        if not isinstance(value, DTensor):
            return value
        part: Any = value.to(device)
        full = part.full_tensor()
        return full.cpu() if keep else None

    gathered: dict[str, Any] = _walk(checkpoint, whole)
    return gathered


# ---- reading ----------------------------------------------------------------------------------------


def is_folder(path: Path) -> bool:
    """Whether ``path`` is a complete checkpoint folder."""
    return (path / REST).is_file()


def open_checkpoint(path: Path) -> dict[str, Any]:
    """The checkpoint at ``path``: a file is memory-mapped, and the tensors of a folder are :class:`Stored`.

    Raises:
        UserError: There is no checkpoint, or it cannot be read.
    """
    if path.is_dir() and not is_folder(path):
        raise UserError("ckpt_path", f"{path} is not a complete checkpoint: it has no {REST}; give another one")
    file = path / REST if path.is_dir() else path
    if not file.is_file():
        raise UserError("ckpt_path", f"there is no file {path}; `fit` writes checkpoints below its out folder")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise UserError("ckpt_path", f"{path} is not a checkpoint that lightning-mlc wrote") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError("ckpt_path", f"{path} is not a checkpoint that lightning-mlc wrote")
    content: dict[str, Any] = checkpoint
    if path.is_dir():
        content = _walk(content, lambda value, _path: value, lambda name: Stored(path, name))
    return content


def read_checkpoint(path: Path, wanted: Set[str] | None = None) -> dict[str, Any]:
    """The checkpoint at ``path`` with whole tensors. Each process reads it for itself.

    From a folder, only the ``wanted`` entries are read. None: all entries.

    Raises:
        UserError: There is no checkpoint, or it cannot be read.
    """
    checkpoint = open_checkpoint(path)
    if not path.is_dir():
        return checkpoint
    checkpoint = {key: value for key, value in checkpoint.items() if wanted is None or key in wanted}
    reader = _Reader(path)
    described = reader.read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {}

    def place(value: Any, _path: tuple[str, ...]) -> Any:
        if not isinstance(value, Stored):
            return value
        form: Any = described.get(value.name)
        if form is None:
            raise UserError("ckpt_path", f"{path} cannot be read: its index lacks {value.name}")
        return tensors.setdefault(value.name, torch.empty(form.size, dtype=form.properties.dtype))

    whole: dict[str, Any] = _walk(checkpoint, place)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is disabled.*")
        _load(tensors, path, no_dist=True)
    return whole


def _load(tensors: dict[str, Any], folder: Path, no_dist: bool = False) -> None:
    try:
        load(tensors, storage_reader=_Reader(folder), no_dist=no_dist)
    except (CheckpointException, OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise UserError("ckpt_path", f"{folder} cannot be read: {reason(error)}") from error


def load_into(own: dict[str, Tensor], saved: dict[str, Any]) -> None:
    """Copy ``saved`` into the tensors ``own``, by key. Tensors of ``own`` may be sharded.

    All processes must call it. From a file, each process reads only its own part.
    """
    stored: dict[Path, dict[str, Any]] = {}
    for key, target in own.items():
        source = saved[key]
        if isinstance(source, Stored):
            stored.setdefault(source.folder, {})[source.name] = target.detach()
        elif source is not target:
            target.detach().copy_(_share(source, target))
    for folder, tensors in stored.items():
        _load(tensors, folder)


def sharded_like(parameters: Sequence[Tensor], states: Mapping[int, dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """An optimizer's ``states``, by the index of the parameter, sharded like the ``parameters``.

    A tensor of a parameter's shape is sharded like that parameter. Everything is read in one call, because all
    processes plan each read together, which takes longer than reading the state of one parameter.
    """
    found = {number: dict(state) for number, state in states.items()}
    empty: dict[str, Tensor] = {}
    saved: dict[str, Any] = {}
    for number, state in found.items():
        parameter = parameters[number]
        for key, value in state.items():
            if isinstance(value, Stored) or (isinstance(value, Tensor) and value.shape == parameter.shape):
                place = f"{number}.{key}"
                saved[place] = value
                state[key] = empty[place] = torch.empty_like(parameter, requires_grad=False)
    load_into(empty, saved)
    return found


def _share(whole: Tensor, like: Tensor) -> Tensor:
    """This process's part of ``whole`` if ``like`` is sharded, otherwise all of ``whole``."""
    if not isinstance(like, DTensor) or isinstance(whole, DTensor):
        return whole
    local = whole.to(like.dtype)
    # Every process has the whole tensor, so nothing is sent.
    return distribute_tensor(local, like.device_mesh, like.placements, src_data_rank=None)


def _walk(
    value: Any,
    leaf: Callable[[Any, tuple[str, ...]], Any],
    stored: Callable[[str], Any] | None = None,
    path: tuple[str, ...] = (),
) -> Any:
    """``value`` with each leaf of its dicts and lists replaced, and placeholders too if ``stored`` is given."""
    if isinstance(value, dict):
        if stored is not None and value.keys() == {_NAME}:
            return stored(value[_NAME])
        return {key: _walk(item, leaf, stored, (*path, str(key))) for key, item in value.items()}
    if isinstance(value, list):
        return [_walk(item, leaf, stored, (*path, str(index))) for index, item in enumerate(value)]
    return leaf(value, path)


class _Reader(FileSystemReader):
    """Reads the index of a folder. The index is a pickle; no code in it is run."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
        try:
            with (Path(self.path) / ".metadata").open("rb") as file:
                metadata = _Index(file).load()
        except (OSError, EOFError, pickle.UnpicklingError) as error:
            raise UserError("ckpt_path", f"{self.path} is not a checkpoint that lightning-mlc wrote") from error
        if not isinstance(metadata, Metadata):
            raise UserError("ckpt_path", f"{self.path} is not a checkpoint that lightning-mlc wrote")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Index(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.partition(".")[0] == "pathlib":  # the place where the folder was saved, which is not used
            return PurePath
        if name in _INDEX_CLASSES.get(module, ()) or (module == "torch" and _is_dtype(name)):
            return super().find_class(module, name)
        raise UserError("ckpt_path", f"the checkpoint refers to {module}.{name}, which lightning-mlc never writes")


def _is_dtype(name: str) -> bool:
    return isinstance(getattr(torch, name, None), torch.dtype)


_INDEX_CLASSES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
}
"""The classes that the index of a folder may contain, by module."""
