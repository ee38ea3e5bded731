"""A system to evaluate: a model in this process, or a model behind an endpoint."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from lightning_mlc.errors import UserError, renamed
from lightning_mlc.evaluation.systems.api_keys import variable_of

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from lightning_mlc.checkpoints.provenance import Provenance
    from lightning_mlc.sources import ModelSource

SAMPLES_PER_FILE = 64
SAMPLE_BYTES = 4096
"""Size of each sample of a large file. Samples are enough to identify it, because training changes all weights."""


@dataclass(frozen=True)
class System:
    """A model as the command line names it.

    ``spec`` is a Hugging Face folder or hub id (``owner/name@revision`` pins one), a ``.gguf`` file, ``package:NAME``
    (with ``/FILE.gguf``), a ``.ckpt`` file that ``fit`` wrote, or an OpenAI-compatible endpoint,
    ``http://HOST/v1#MODEL``.
    """

    label: str
    """Its name in reports, and the name of its folder."""
    spec: str
    chat_template: str | None = None
    """For a model that has none, as in :class:`~lightning_mlc.sources.ModelSource`."""

    @property
    def is_endpoint(self) -> bool:
        return self.spec.startswith(("http://", "https://"))

    @property
    def is_checkpoint(self) -> bool:
        return not self.is_endpoint and self.spec.endswith(".ckpt")

    @cached_property
    def _checkpoint(self) -> dict[str, Any]:
        from lightning_mlc.checkpoints.format import read_checkpoint
        from lightning_mlc.checkpoints.provenance import Provenance

        with errors_about_models():
            return read_checkpoint(Path(self.spec), wanted={"state_dict", Provenance.KEY})

    @property
    def source(self) -> ModelSource:
        """The source of a local model, or of a checkpoint's tokenizer."""
        from lightning_mlc.sources import ModelSource

        provenance = self.provenance if self.is_checkpoint else None
        return ModelSource.parse(self.spec) if provenance is None else provenance.model_source()

    @cached_property
    def provenance(self) -> Provenance | None:
        """The provenance in a checkpoint or an exported folder; None for other models."""
        from lightning_mlc.checkpoints.provenance import Provenance

        if self.is_endpoint:
            return None
        if self.is_checkpoint:
            return Provenance.read(self._checkpoint)
        provenance_file = Path(self.spec).expanduser() / Provenance.FILE
        if not provenance_file.is_file():
            return None
        try:
            return Provenance(**json.loads(provenance_file.read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise UserError(
                "models", f"{provenance_file} was not written by `lightning-mlc export`; export the model again"
            ) from error

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of a local model.

        Raises:
            UserError: It has none, or it cannot be loaded.
        """
        from lightning_mlc.sources import load_tokenizer, set_chat_template

        with errors_about_models():
            tokenizer = load_tokenizer(self.source)
            if self.chat_template is not None and not tokenizer.chat_template:
                with renamed(("model.chat_template",), "chat_template"):
                    set_chat_template(tokenizer, self.chat_template)
            return tokenizer

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Identifies the content of the model, which can change at the same path, as plain JSON values.

        Raises:
            UserError: The model does not exist.
        """
        if self.is_endpoint:
            return {"endpoint": self.spec}
        if self.is_checkpoint:
            _ = self.provenance  # first, because it reports a file that is not a checkpoint
            path = Path(self.spec)
            files = sorted(part for part in path.rglob("*") if part.is_file()) if path.is_dir() else [path]
            return {"checkpoint": fingerprint(files)}
        _ = self.provenance
        with errors_about_models():
            location, keywords = self.source.resolve()
            folder = Path(location)
            if folder.is_dir():
                gguf = keywords.get("gguf_file")
                if gguf:  # not by glob, because the name may contain the characters of a pattern
                    return {"files": fingerprint([folder / gguf])}
                names = ["*.safetensors", "*.bin", "config.json", "tokenizer*", "chat_template*"]
                return {"files": fingerprint(sorted(path for name in names for path in folder.glob(name)))}
            from lightning_mlc.sources import hub_commit, load_config

            load_config(self.source)
            return {"hub": location, "commit": hub_commit(self.source)}

    def load_model(self, dtype: str) -> Any:
        """The local model on the CPU, in eval mode.

        Raises:
            UserError: It cannot be loaded.
        """
        import torch

        from lightning_mlc.checkpoints.restore import restore
        from lightning_mlc.models.loading import load_causal_lm
        from lightning_mlc.models.tensors import precision_kept

        with errors_about_models():
            if self.is_checkpoint:
                model = restore(self._checkpoint)
                with precision_kept(model):
                    model.to(getattr(torch, dtype))
            else:
                model = load_causal_lm(self.source, getattr(torch, dtype))
        return model.eval()

    def representation(self, hidden_size: int) -> tuple[int, Callable[[Tensor], Tensor]] | None:
        """The layer and the extractor of a checkpoint; None for other models, and for checkpoints without an extractor.

        The extractor takes hidden states (B, L, H). It also centres them if the training did.
        """
        if not self.is_checkpoint or self.provenance is None or self.provenance.representation is None:
            return None
        from lightning_mlc.consistency import Consistency, Representation
        from lightning_mlc.models.layers import resolve_layer

        prefix = "representation."
        state = self._checkpoint["state_dict"]
        weights = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if not weights:  # trained without a term that compares representations
            return None
        settings = Consistency(**self.provenance.representation)
        assert not isinstance(settings.layer, str), "a checkpoint has the number of the layer that was chosen"
        representation = Representation(settings, hidden_size)
        representation.load_state_dict(weights)
        config = self.provenance.config
        text = config.get("text_config") or config
        depth = int(text["num_hidden_layers"] if "num_hidden_layers" in text else text["n_layer"])
        return resolve_layer(settings.layer, depth), representation.float().extract


def parse_systems(specs: Sequence[str], chat_template: str | None = None) -> list[System]:
    """Parse the models of the command line: ``LABEL=SPEC``, or ``SPEC``, whose label is made from its last parts.

    Raises:
        UserError: Two models have the same label, or an endpoint has no model.
    """
    systems: list[System] = []
    for text in specs:
        label, equals, spec = text.partition("=")
        if not equals or "/" in label or ":" in label:
            label, spec = _default_label(text), text
        label = "".join(character if character.isalnum() or character in "-_." else "-" for character in label)
        system = System(label, spec, chat_template)
        if system.is_endpoint:
            require_address(spec, "models")
        if any(other.label == label for other in systems):
            raise UserError(
                "models", f"two models are named '{label}'; give them names: --models before={specs[0]} after={text}"
            )
        if not label.strip("-."):
            raise UserError("models", f"'{text}' has no name; write NAME={spec}")
        systems.append(system)
    if not systems:
        raise UserError("models", "is not set; give one or more models")
    return systems


def require_address(spec: str, option: str) -> None:
    """Refuse an endpoint that is not written as ``http://HOST/v1#MODEL``.

    Raises:
        UserError: It names no host or no model; or it has a password or a query, which may be a key. Addresses are
            shown and written to files, so these are not repeated.
    """
    form = "write an endpoint as http://HOST/v1#MODEL"
    try:
        parts = urlsplit(spec)
        _ = parts.port  # raises ValueError if it is not a number
    except ValueError as error:
        raise UserError(option, f"{form}, got another form of an address") from error
    if parts.username is not None or parts.password is not None or parts.query:
        raise UserError(option, f"{form}, without a user, a password or a '?'; give the key as {variable_of(spec)}")
    if not (parts.hostname and parts.fragment) or re.search(r"\s", spec):
        raise UserError(option, f"{form}, got {spec}")


def _default_label(spec: str) -> str:
    if spec.startswith(("http://", "https://")):
        return spec.partition("#")[2].strip("/").rpartition("/")[2] or "endpoint"
    path = Path(spec)
    if path.suffix == ".ckpt" and path.parent.name == "checkpoints":  # runs/NAME/checkpoints/last.ckpt
        return f"{path.parent.parent.name}-{path.stem}"
    if path.name == "model" and path.parent.name:  # runs/NAME/model
        return path.parent.name
    return path.stem if path.suffix in (".ckpt", ".gguf") else path.name.rpartition(":")[2]


def fingerprint(paths: Sequence[Path]) -> str:
    """A digest of the names, sizes and contents of files. Only samples are read of a large file."""
    sha = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        sha.update(f"{path.name}:{size}\n".encode())
        with path.open("rb") as file:
            if size <= SAMPLES_PER_FILE * SAMPLE_BYTES:
                sha.update(file.read())
                continue
            for index in range(SAMPLES_PER_FILE):
                file.seek(index * (size - SAMPLE_BYTES) // (SAMPLES_PER_FILE - 1))
                sha.update(file.read(SAMPLE_BYTES))
    return sha.hexdigest()[:20]


OPTIONS_OF_FIT = ("model.name_or_path", "model.gguf_file", "--ckpt_path", "ckpt_path")


def errors_about_models() -> AbstractContextManager[None]:
    """Rename the options in errors of loading: those of ``fit`` are ``models`` here."""
    return renamed(OPTIONS_OF_FIT, "models")
