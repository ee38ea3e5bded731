"""Where a response ends, in the words of a chat template."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_mlc.data.templates import ChatTemplate, TemplateProblem
from lightning_mlc.errors import UserError


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The token that ends a response: what the chat template puts there, else EOS; None where there is neither.

    They differ in models that have learnt to chat with a token of their own (Gemma's ``<end_of_turn>``, ``<|im_end|>``
    of Qwen's base models), and where a tokenizer names the wrong one, as those of GGUF files do in transformers 5.17.
    """
    response = "response"
    turns = [{"role": "user", "content": "prompt"}, {"role": "assistant", "content": response}]
    try:
        (text,) = ChatTemplate(tokenizer).render([turns], header=False)
    except (TemplateProblem, UserError):  # no template of a conversation, or one of a guard model, say
        text = ""
    _, found, ending = text.rpartition(response)
    own = {token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
    ids = tokenizer(ending, add_special_tokens=False)["input_ids"] if found else []
    eos = None if tokenizer.eos_token is None else str(tokenizer.eos_token)
    return next((token for token in tokenizer.convert_ids_to_tokens(ids) if token in own), eos)


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a response: those of the model's generation config, of the tokenizer and of its chat template."""
    own = model.generation_config.eos_token_id
    end = end_of_turn(tokenizer)
    template = None if end is None else tokenizer.convert_tokens_to_ids(end)
    ids = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, template]
    return sorted({int(token) for token in ids if token is not None})
