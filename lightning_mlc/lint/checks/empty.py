"""A text with nothing in it."""

from __future__ import annotations

from itertools import islice

from lightning_mlc.lint.check import TextCheck
from lightning_mlc.lint.rows import Pair

CHARACTERS = 2
"""Fewest letters or digits of a text."""


class Empty(TextCheck):
    """The text is empty, has one character, or consists of punctuation only.

    A translation may be as short as its source: of a source without two letters or digits (an emoji, "?") nothing is
    asked. An empty response is data, because silence is an answer, so responses are compared with their source, too.
    Training refuses a file with an empty prompt. Threshold: two letters or digits; no false alarm on the sample.
    """

    name = "empty"
    severity = "error"
    title = "empty, one character, or only punctuation"
    of_source = True

    def fault(self, pair: Pair) -> str | None:
        if pair.part == "prompt" and not pair.text.content.strip():
            return "empty"
        if not _has_content(pair.text.content) and _has_content(pair.source.content):
            return "fewer than two letters"
        return None


def _has_content(text: str) -> bool:
    return len(list(islice(filter(str.isalnum, text), CHARACTERS))) == CHARACTERS
