"""Marks that end sentences, in all scripts."""

from __future__ import annotations

QUESTION = "?？؟;՞፧⸮꘏"
"""Question marks. The Greek one looks like a semicolon, and NFC makes it one."""
_END = QUESTION + ".!。．！।۔…։።။៕॥᙮:："
_PARTICLES = ("か", "吗", "嗎", "呢", "ไหม", "หรือไม่", "까", "나요")
"""Words at the end of questions in languages that may do without a question mark."""
_AFTER = "\"'”’»）)」』】]›*_`~ \n\t"


def ending(text: str) -> str:
    """The last character of a text, apart from closing quotes and brackets; empty if there is none."""
    return text.rstrip(_AFTER)[-1:]


def has_end(text: str) -> bool:
    """Whether a text ends with a mark that ends a sentence."""
    return (last := ending(text)) != "" and last in _END


def is_question(text: str) -> bool:
    """Whether a text ends with a question mark."""
    return (last := ending(text)) != "" and last in QUESTION and not (last == ";" and not _is_greek(text))


def has_question(text: str) -> bool:
    """Whether a text has a question mark anywhere, or ends with a word that marks a question."""
    return any(mark in text for mark in QUESTION) or text.rstrip(_AFTER + "。.").endswith(_PARTICLES)


def _is_greek(text: str) -> bool:
    return any("\u0370" <= character <= "\u03ff" for character in text)
