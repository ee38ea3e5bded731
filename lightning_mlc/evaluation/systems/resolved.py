"""A local model with its engine, device, precision and chat template.

Each choice is made once, before any weights are loaded. Journals, generation, likelihoods and hidden states all read
the same :class:`ResolvedSystem`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lightning_mlc.data.tokenization import ChatTokenizer
from lightning_mlc.evaluation.journal import digest
from lightning_mlc.evaluation.settings import EvaluationSettings
from lightning_mlc.evaluation.systems.engines import Engine, engine_of
from lightning_mlc.evaluation.systems.generation import (
    Generator,
    LocalModel,
    TransformersGenerator,
    VLLMGenerator,
    free_memory,
)
from lightning_mlc.evaluation.systems.local import chat_of, choose_device, choose_dtype, load
from lightning_mlc.evaluation.systems.system import System


@dataclass(frozen=True)
class Placement:
    """Where the local models of an evaluation run, and in which precision."""

    device: torch.device
    dtype: str
    """``float32``, ``bfloat16`` or ``float16``."""

    @classmethod
    def of(cls, settings: EvaluationSettings) -> Placement:
        """The placement that ``settings`` ask for.

        Raises:
            UserError: The device does not exist.
        """
        device = choose_device(settings.device)
        return cls(device, choose_dtype(settings.dtype, device))


@dataclass(frozen=True)
class ResolvedSystem:
    """A local model, and everything that its results depend on.

    Args:
        system: The model as the command line names it.
        engine: The library that generates.
        placement: Device and precision.
        chat: Renders and tokenises prompts, with room for a response.
        max_new_tokens: Longest response, in tokens.
    """

    system: System
    engine: Engine
    placement: Placement
    chat: ChatTokenizer
    max_new_tokens: int

    @classmethod
    def of(
        cls,
        system: System,
        settings: EvaluationSettings,
        placement: Placement,
        max_new_tokens: int,
        on_long_prompt: Literal["cut", "error"] = "error",
        remember: bool = False,
    ) -> ResolvedSystem:
        """Make every choice for ``system``, without loading its weights.

        Args:
            system: The model as the command line names it.
            settings: Names the engine.
            placement: Device and precision.
            max_new_tokens: Longest response, in tokens.
            on_long_prompt: Whether to cut or to refuse a prompt that leaves no room for a response.
            remember: Whether to keep the token ids of every prompt, because the same prompts are needed again.

        Raises:
            UserError: The model has no chat template, or the engine cannot run it.
        """
        chat = chat_of(system, max_new_tokens, on_long_prompt, remember)
        return cls(system, engine_of(system, settings.engine), placement, chat, max_new_tokens)

    @property
    def journal_settings(self) -> dict[str, Any]:
        """Everything that likelihoods and hidden states depend on in addition to the model, as plain JSON values."""
        return {
            "dtype": self.placement.dtype,
            "device": self.placement.device.type,
            "chat_template": digest(str(self.chat.tokenizer.chat_template)),
        }

    def load(self) -> LocalModel:
        """The weights, on their device.

        Raises:
            UserError: The model cannot be loaded, or does not fit on the device.
        """
        return load(self.system, self.chat, self.placement.device, self.placement.dtype)

    def generator(
        self, batch_tokens: int, header: bool = True, loaded: Callable[[], LocalModel] | None = None
    ) -> Generator:
        """Start the engine, which loads the weights.

        Args:
            batch_tokens: Maximum number of tokens in a batch; vLLM plans its own batches.
            header: Whether to ask the chat template for its generation header.
            loaded: Gives a model that is shared with other phases; None loads one. vLLM always loads its own.

        Raises:
            UserError: The model cannot be loaded, or does not fit on the device.
        """
        if self.engine == "vllm":
            return self._vllm(header)
        return TransformersGenerator((loaded or self.load)(), self.max_new_tokens, batch_tokens, header)

    def _vllm(self, header: bool) -> Generator:
        from vllm import LLM

        location, keywords = self.system.source.resolve()
        revision = keywords["revision"]
        free_memory()  # vLLM takes a share of all memory, and fails if a model that ran before still holds it
        llm = LLM(model=location, dtype=self.placement.dtype, revision=revision, tokenizer_revision=revision)
        return VLLMGenerator(llm, self.chat, self.max_new_tokens, header)
