"""Models that run in this process: their device, precision, context length, chat template and weights."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch

from lightning_mlc.data.records import Message
from lightning_mlc.data.tokenization import ChatTokenizer, PromptTooLong
from lightning_mlc.errors import UserError, first_line
from lightning_mlc.evaluation.journal import Key, digest
from lightning_mlc.evaluation.systems.generation import Conversation, LocalModel
from lightning_mlc.evaluation.systems.system import System, errors_about_models
from lightning_mlc.models.precision import USUAL_WIDTH, Choice, Device, decide, slow_bfloat16, try_both
from lightning_mlc.sources import load_config

logger = logging.getLogger(__name__)

DType = Literal["auto", "float32", "bfloat16", "float16"]
NO_LIMIT = 2**31
"""The context length of a model whose configuration does not name one."""


def choose_device(device: str) -> torch.device:
    """The torch device; ``auto`` is an accelerator if one exists, otherwise the CPU.

    Raises:
        UserError: The device does not exist.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise UserError("device", f"cannot use {device} ({first_line(error)})") from error


def choose_dtype(dtype: DType, device: torch.device) -> str:
    """The precision; ``auto`` is bfloat16 if the device computes it faster, otherwise float32."""
    return dtype if dtype != "auto" else explain_dtype(device).dtype


def explain_dtype(device: torch.device) -> Choice:
    """The precision of ``auto`` on ``device``, with the reason, as for ``trainer.precision: auto``.

    It makes no trial, because a resumed evaluation must get the same answer.
    """
    index = None if device.index is None else [device.index]
    return decide(Device.of(device.type, index))


def warn_of_slow_dtype(dtype: DType, device: torch.device) -> None:
    """Warn if ``dtype`` is bfloat16 on a CPU that computes it slowly."""
    known = Device.of(device.type)
    warning = slow_bfloat16(dtype, known, lambda: try_both(USUAL_WIDTH, known))
    if warning is not None:
        logger.warning("dtype: %s", warning)


def context_length(system: System) -> int:
    """The longest sequence that a local model takes, in tokens."""
    with errors_about_models():
        if system.is_checkpoint:
            assert system.provenance is not None
            config = system.provenance.config
            length = (config.get("text_config") or config).get("max_position_embeddings", config.get("n_positions"))
        else:
            length = getattr(load_config(system.source).get_text_config(), "max_position_embeddings", None)
    return NO_LIMIT if length is None else int(length)


class RememberingChat(ChatTokenizer):
    """Renders and tokenises each prompt once, because generation, likelihoods and hidden states need the same ones."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._found: dict[str, tuple[list[int], bool]] = {}

    def prompt(self, messages: list[Message], where: str, header: bool = True) -> tuple[list[int], bool]:
        """See :class:`~lightning_mlc.data.tokenization.ChatTokenizer`."""
        key = digest(messages, header)
        if key not in self._found:
            self._found[key] = super().prompt(messages, where, header)
        return self._found[key]


def chat_of(
    system: System, room: int = 0, on_long_prompt: Literal["cut", "error"] = "error", remember: bool = False
) -> ChatTokenizer:
    """The chat template and tokenizer of a local model.

    Args:
        system: The model.
        room: Tokens of the context to leave for a response.
        on_long_prompt: Whether to cut or to refuse a prompt that leaves less room.
        remember: Whether to keep the token ids of every prompt.

    Raises:
        UserError: The model has no chat template.
    """
    length = context_length(system)
    kind = RememberingChat if remember else ChatTokenizer
    with errors_about_models():
        return kind(system.tokenizer, max(1, length - room), length, on_long_prompt)


def check_lengths(
    system: System, chat: ChatTokenizer, conversations: Sequence[tuple[Key, Conversation]], room: int
) -> None:
    """Refuse prompts that leave less ``room`` for a response, in tokens, before a model is loaded.

    Raises:
        UserError: A prompt is too long, or the chat template refuses it.
    """
    for key, messages in conversations:
        where = f"prompts: '{key.id}' ({key.language}) of the set '{key.set}'"
        try:
            chat.prompt(messages, where)
        except PromptTooLong as error:
            raise UserError(
                where,
                f"is too long for {system.label}, which takes {chat.max_prompt_length + room} tokens, "
                f"{room} of them for the response; remove the row, or reduce max_new_tokens",
            ) from error


def load(system: System, chat: ChatTokenizer, device: torch.device, dtype: str) -> LocalModel:
    """The model of ``system`` on its device."""
    return LocalModel(system.load_model(dtype), chat, device).to_device()
