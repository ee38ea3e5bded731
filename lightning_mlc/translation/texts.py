"""A text to translate: one message, from one language into another."""

from __future__ import annotations

from typing import NamedTuple

from lightning_mlc.evaluation.journal import digest
from lightning_mlc.translation.languages import Language


class Text(NamedTuple):
    """A message to be translated."""

    content: str
    source: Language
    target: Language

    @property
    def id(self) -> str:
        """A digest of the content and its language: equal texts of several rows are translated once."""
        return text_id(self.content, self.source.code)


class Reply(NamedTuple):
    """What a model made of a text: a translation, or the reason why there is none."""

    translation: str | None
    failed: str | None = None
    """One of :mod:`lightning_mlc.translation.failures`."""


def text_id(content: str, language: str) -> str:
    """The digest of a text and the code of its language."""
    return digest(content, language)
