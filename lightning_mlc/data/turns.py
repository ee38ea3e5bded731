"""The tokens that end a response."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_mlc.data.templates import ChatTemplate, TemplateProblem
from lightning_mlc.errors import UserError


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Find the token that ends a response: the one that the chat template writes there, or else EOS.

    The two differ if a model has learnt to chat with another token (``<end_of_turn>`` of Gemma, ``<|im_end|>`` of
    Qwen's base models), or if the tokenizer names a wrong EOS, as those of GGUF files do in transformers 5.17.

    Args:
        tokenizer: The tokenizer, with or without a chat template.

    Returns:
        The token. None: there is neither.
    """
    response = "response"
    turns = [{"role": "user", "content": "prompt"}, {"role": "assistant", "content": response}]
    try:
        (text,) = ChatTemplate(tokenizer).render([turns], header=False)
    except (TemplateProblem, UserError):  # no template, or one that is not for conversations (a guard model's)
        text = ""
    _, found, ending = text.rpartition(response)
    own = {token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
    ids = tokenizer(ending, add_special_tokens=False)["input_ids"] if found else []
    eos = None if tokenizer.eos_token is None else str(tokenizer.eos_token)
    return next((token for token in tokenizer.convert_ids_to_tokens(ids) if token in own), eos)


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return all token ids that end a response, ascending.

    Args:
        model: The model, whose generation configuration may name some.
        tokenizer: The tokenizer, which may have an EOS token and a chat template.
    """
    own = model.generation_config.eos_token_id
    end = end_of_turn(tokenizer)
    template = None if end is None else tokenizer.convert_tokens_to_ids(end)
    ids = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, template]
    return sorted({int(token) for token in ids if token is not None})
