"""From the name of a model to what runs it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lightning_mlc.data.tokenization import ChatTokenizer, PromptTooLong
from lightning_mlc.errors import renamed
from lightning_mlc.evaluation.journal import digest
from lightning_mlc.evaluation.systems.api_keys import key_of
from lightning_mlc.evaluation.systems.endpoint import Endpoint, EndpointGenerator
from lightning_mlc.evaluation.systems.generation import Conversation, TransformersGenerator, out_of_memory
from lightning_mlc.evaluation.systems.local import (
    chat_of,
    choose_device,
    choose_dtype,
    context_length,
    load,
    warn_of_slow_dtype,
)
from lightning_mlc.evaluation.systems.system import System, require_address
from lightning_mlc.sources import ModelSource, from_pretrained, load_config
from lightning_mlc.translation.backends.base import Backend
from lightning_mlc.translation.backends.chat import ChatBackend
from lightning_mlc.translation.backends.codes import LanguageCodes
from lightning_mlc.translation.backends.seq2seq import Limits, Seq2SeqBackend
from lightning_mlc.translation.settings import TranslationSettings


@dataclass(frozen=True)
class TranslatorSystem(System):
    """A model that translates, as the command line names it."""

    trust_remote_code: bool = False

    @property
    def source(self) -> ModelSource:
        """Where a local model's weights, or a checkpoint's tokenizer, are."""
        return replace(super().source, trust_remote_code=self.trust_remote_code)


def system_of(settings: TranslationSettings) -> TranslatorSystem:
    """The model that ``settings`` name.

    Raises:
        UserError: It is an endpoint that does not say which model.
    """
    system = TranslatorSystem("translator", settings.model, trust_remote_code=settings.trust_remote_code)
    if system.is_endpoint:
        require_address(settings.model, "model")
    return system


def make_backend(settings: TranslationSettings) -> Backend:
    """What runs the model that ``settings`` name. Weights are not loaded yet.

    Raises:
        UserError: There is no such model, or it cannot translate.
    """
    system = system_of(settings)
    if system.is_endpoint:
        return _endpoint(system, settings)
    with renamed(("models",), "model"):  # evaluation's name of the option
        seq2seq = not system.is_checkpoint and _is_seq2seq(system)
        return _seq2seq(system, settings) if seq2seq else _chat(system, settings)


def _endpoint(system: System, settings: TranslationSettings) -> ChatBackend:
    key = key_of(system.spec, [system.spec])
    endpoint = Endpoint(
        system.spec, settings.max_new_tokens, key, settings.concurrency, settings.timeout, settings.retries
    )
    identity = {"model": system.identity, "max_new_tokens": settings.max_new_tokens}
    return ChatBackend("openai", identity, lambda: EndpointGenerator(endpoint))


def _is_seq2seq(system: System) -> bool:
    with renamed(("model.name_or_path", "model.gguf_file"), "model"):
        return bool(getattr(load_config(system.source), "is_encoder_decoder", False))


def _circumstances(system: System, settings: TranslationSettings, device: Any, dtype: str) -> dict[str, Any]:
    warn_of_slow_dtype(settings.dtype, device)
    return {
        "model": system.identity,
        "max_new_tokens": settings.max_new_tokens,
        "dtype": dtype,
        "device": device.type,
    }


def _chat(system: System, settings: TranslationSettings) -> ChatBackend:
    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    chat = chat_of(system, settings.max_new_tokens, remember=True)
    template = digest(str(chat.tokenizer.chat_template))

    def generator() -> TransformersGenerator:
        with renamed(("models",), "model"):
            local = load(system, chat, device, dtype)
        return TransformersGenerator(local, settings.max_new_tokens, settings.batch_tokens)

    identity = {**_circumstances(system, settings, device, dtype), "chat_template": template}
    return ChatBackend("transformers", identity, generator, lambda conversation: _fits(chat, conversation))


def _fits(chat: ChatTokenizer, conversation: Conversation) -> bool:
    try:
        chat.prompt(conversation, "translate")
    except PromptTooLong:
        return False
    return True


def _seq2seq(system: System, settings: TranslationSettings) -> Seq2SeqBackend:
    import torch
    from transformers import AutoModelForSeq2SeqLM

    device = choose_device(settings.device)
    dtype = choose_dtype(settings.dtype, device)
    tokenizer = system.tokenizer
    # The vocabulary of some tokenizers lacks the tokens of languages, which they convert all the same.
    unknown = (None, tokenizer.unk_token_id)
    codes = LanguageCodes.of(lambda token: tokenizer.convert_tokens_to_ids(token) not in unknown, system.spec)
    limits = Limits(context_length(system), settings.max_new_tokens, settings.batch_tokens)

    def weights() -> Any:
        with renamed(("model.name_or_path", "model.gguf_file"), "model"), out_of_memory():
            model: Any = from_pretrained(
                AutoModelForSeq2SeqLM.from_pretrained, system.source, "translation model", dtype=getattr(torch, dtype)
            )
            return model.eval().to(device)

    return Seq2SeqBackend(_circumstances(system, settings, device, dtype), tokenizer, codes, limits, weights)
