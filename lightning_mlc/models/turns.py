"""Where a response ends, in the words of a chat template."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that ends a response: what the chat template puts there, else EOS.

    They differ in models that have learnt to chat with a token of their own (Gemma's ``<end_of_turn>``, ``<|im_end|>``
    of Qwen's base models), and where a tokenizer names the wrong one, as those of GGUF files do in transformers 5.17.
    """
    response = "response"
    turns = [{"role": "user", "content": "prompt"}, {"role": "assistant", "content": response}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except TemplateError:  # one of a guard model, say, which wants another conversation
        text = ""
    _, found, ending = text.rpartition(response)
    own = {token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
    ids = tokenizer(ending, add_special_tokens=False)["input_ids"] if found else []
    return next((token for token in tokenizer.convert_ids_to_tokens(ids) if token in own), str(tokenizer.eos_token))


def end_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a response: those of the model's generation config, of the tokenizer and of its chat template."""
    own = model.generation_config.eos_token_id
    template = None if tokenizer.chat_template is None else tokenizer.convert_tokens_to_ids(end_of_turn(tokenizer))
    ids = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, template]
    return sorted({int(token) for token in ids if token is not None})
