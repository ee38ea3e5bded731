"""The description of the model in a checkpoint, with which the checkpoint can be checked and exported on its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

from transformers import PreTrainedModel

from lightning_mlc import __version__
from lightning_mlc.consistency import Consistency
from lightning_mlc.errors import UserError
from lightning_mlc.models.lora import LoRA
from lightning_mlc.sources import ModelSource, read_chat_template

_FORM = ("layer", "extractor", "extractor_dim", "extractor_bias", "center")


@dataclass(frozen=True)
class Provenance:
    """Plain values only: a checkpoint must load with ``weights_only=True``."""

    KEY: ClassVar[str] = "lightning_mlc"
    FILE: ClassVar[str] = "lightning_mlc.json"
    """Its file in an exported folder."""

    source: dict[str, Any]
    """Fields of :class:`~lightning_mlc.sources.ModelSource`."""
    config: dict[str, Any]
    """Configuration of the Hugging Face model."""
    generation_config: dict[str, Any] | None
    lora: dict[str, Any] | None
    """Fields of :class:`~lightning_mlc.models.lora.LoRA`, if the model has adapters."""
    version: str = __version__
    languages: list[str] | None = None
    """BCP-47 codes of the prompts it was trained on, the source language first."""
    representation: dict[str, Any] | None = None
    """The layer of the extractor in the checkpoint, and its form: fields of
    :class:`~lightning_mlc.consistency.Consistency`."""
    recipe: dict[str, Any] | None = None
    """The training settings: :func:`~lightning_mlc.training.recipe.describe_run`."""

    @classmethod
    def of(
        cls,
        source: ModelSource,
        model: PreTrainedModel,
        lora: LoRA | None,
        languages: Sequence[str] | None = None,
        consistency: Consistency | None = None,
        recipe: dict[str, Any] | None = None,
    ) -> Provenance:
        """The description of ``model``, which was loaded from ``source`` and trained on prompts in ``languages``."""
        generation = getattr(model, "generation_config", None)
        return cls(
            source={
                "name_or_path": source.name_or_path,
                "gguf_file": source.gguf_file,
                "revision": source.revision,
                "trust_remote_code": source.trust_remote_code,
                # The text, because a checkpoint may be read where its file is not.
                "chat_template": None if source.chat_template is None else read_chat_template(source.chat_template),
            },
            config=_plain(model.config.to_dict()),
            generation_config=None if generation is None else _plain(generation.to_dict()),
            lora=None if lora is None else lora.as_dict(),
            languages=None if languages is None else list(languages),
            representation=None if consistency is None else {name: getattr(consistency, name) for name in _FORM},
            recipe=recipe,
        )

    def as_dict(self) -> dict[str, Any]:
        """The entry that a checkpoint stores under ``KEY``."""
        return {
            "source": self.source,
            "config": self.config,
            "generation_config": self.generation_config,
            "lora": self.lora,
            "version": self.version,
            "languages": self.languages,
            "representation": self.representation,
            "recipe": self.recipe,
        }

    def without_paths(self) -> Provenance:
        """A copy to publish: with the name of the model's folder instead of its path on this machine."""
        name = ModelSource(**self.source).short_name
        config = {key: value for key, value in self.config.items() if key != "_name_or_path"}
        return dataclasses.replace(self, source={**self.source, "name_or_path": name}, config=config)

    def model_source(self, trust_remote_code: bool = False) -> ModelSource:
        """The source that the model was loaded from. Whoever reads the checkpoint decides whether its code is run.

        Raises:
            UserError: The model has its own code, and that code is not trusted.
        """
        source = ModelSource(**self.source)
        if source.trust_remote_code and not trust_remote_code:
            raise UserError(
                "ckpt_path",
                f"the model was trained with Python code from {source}, and a checkpoint alone cannot allow that code "
                "to run; read the code, then export with --trust_remote_code",
            )
        return dataclasses.replace(source, trust_remote_code=trust_remote_code)

    @classmethod
    def read(cls, checkpoint: dict[str, Any]) -> Provenance:
        """The entry of a loaded ``checkpoint``.

        Raises:
            UserError: It has none.
        """
        if cls.KEY not in checkpoint:
            raise UserError("ckpt_path", "this is not a checkpoint of lightning-mlc; give one that `fit` wrote")
        try:
            found = cls(**checkpoint[cls.KEY])
            ModelSource(**found.source)
        except TypeError as error:
            raise UserError(
                "ckpt_path",
                "the checkpoint's description of its model cannot be read; "
                "the checkpoint is damaged, or a newer lightning-mlc wrote it",
            ) from error
        return found

    def require_same_model(self, own: Provenance) -> None:
        """Raises:
        UserError: The model of this checkpoint differs from ``own`` in its shape or its adapters.
        """
        for key in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
            theirs, ours = self._shape(key), own._shape(key)
            if theirs != ours:
                raise UserError(
                    "ckpt_path",
                    f"the checkpoint is of another model: its {key} is {theirs}, but that of "
                    f"{own.source['name_or_path']} is {ours} (it was trained from {self.source['name_or_path']})",
                )
        if self.lora != own.lora:
            raise UserError(
                "ckpt_path",
                f"the checkpoint was trained with model.lora {self.lora}, but the configuration has {own.lora}",
            )

    def _shape(self, key: str) -> Any:
        text = self.config.get("text_config") or {}
        return self.config.get(key, text.get(key))


def _plain(value: Any) -> Any:
    """``value`` with everything that is not plain data converted to text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Enum):
        return _plain(value.value)
    return value if value is None or type(value) in (str, bool, int, float) else str(value)
