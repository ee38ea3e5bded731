"""A tokenised example: what the tokenizer makes, tables keep and the collator reads."""

from __future__ import annotations

from typing import Any, TypedDict, get_type_hints

from datasets import Features, Sequence, Value


class TokenisedExample(TypedDict):
    """Token ids of one example. Languages are indices into the languages of the data; 0 is the source language."""

    id: str
    """As the file gives it, or ``file:row``."""
    where: str
    """File and row, for messages."""
    languages: list[int]
    """Languages that the prompt exists in, the source language first."""
    prompts: list[list[int]]
    """The prompt in each of ``languages``, at most ``max_prompt_length`` tokens, with the generation header."""
    chosen: list[int]
    """The chosen response in the source language, with the end of its turn; empty if there is none."""
    rejected: list[int]
    """The rejected response in the source language; empty if there is none."""
    translated: list[int]
    """Other languages that have responses of their own."""
    translated_chosen: list[list[int]]
    """The chosen response in each of ``translated``."""
    translated_rejected: list[list[int]]
    """The rejected response in each of ``translated``."""
    ordinary: bool
    """Whether a model should answer the prompt (``"kind": "ordinary"``)."""
    cut_prompts: list[str]
    """Codes of the languages whose prompt was too long and was cut."""
    cut_response: bool
    """Whether a response was too long and was cut."""
    empty_response: bool
    """Whether a response has no text."""
    same_prompt: int
    """Hash of the source prompt's token ids: equal for equal prompts."""
    prompt_text: int
    """Hash of the source prompt's text."""
    chosen_text: int
    """Hash of the chosen response's text; 0 if there is none."""
    rejected_text: int
    """Hash of the rejected response's text; 0 if there is none."""


_IDS = Sequence(Value("int32"))
_STORED_AS: dict[Any, Any] = {
    str: Value("string"),
    bool: Value("bool"),
    int: Value("int64"),
    list[int]: _IDS,
    list[str]: Sequence(Value("string")),
    list[list[int]]: Sequence(_IDS),
}
COLUMNS = Features({name: _STORED_AS[kind] for name, kind in get_type_hints(TokenisedExample).items()})
"""Types of a table's columns. They are given, not inferred: a column may be empty in all of the first rows."""
