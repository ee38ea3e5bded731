"""An example as every layout is turned into it: texts, before tokenisation."""

from __future__ import annotations

from dataclasses import dataclass, field

Message = dict[str, str]
"""``{"role": ..., "content": ...}``."""


@dataclass(frozen=True)
class Example:
    """A prompt in one or more languages, and one or two responses: in the source language at least."""

    id: str
    where: str
    """File and row, for messages: ``train.jsonl row 7``."""
    prompts: dict[str, list[Message]]
    """Conversation up to and including the user's last message, by language."""
    chosen: str
    """The preferred response, or the only one."""
    rejected: str | None
    translated: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Chosen and rejected response by language, in those other languages that have their own."""
