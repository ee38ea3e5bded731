"""Numbers of the source that are lost, or numbers that it does not have."""

from __future__ import annotations

import re

from lightning_mlc.lint.check import TextCheck
from lightning_mlc.lint.rows import Pair

HAN = re.compile("[〇零一二三四五六七八九十百千万萬億亿两兩半]")
"""Numerals of Chinese, Japanese and Korean, which may stand for digits."""
LONG = 2
"""Digits of a number that must not be invented: a single one often stands for a word ("two")."""
_NUMBER = re.compile(r"\d+")


class Digits(TextCheck):
    """The digits of the text are not those of the source. Digits of all scripts count by their value.

    An order that differs is no fault, and separators do not count: 1,000.5 and ١٠٠٠٫٥ agree. A source without digits
    may become a text with single digits, because "two" may become "2". Texts with Chinese numerals are not checked.
    Threshold: any difference.
    """

    name = "digits"
    severity = "warning"
    title = "digits lost or invented"

    def fault(self, pair: Pair) -> str | None:
        source, text = pair.source, pair.text
        if source.digits == text.digits or HAN.search(text.prose):
            return None
        if not source.digits:
            invented = any(len(number) >= LONG for number in _NUMBER.findall(text.prose))
            return "digits invented" if invented else None
        lost = source.digits - text.digits
        return "digits lost" if lost else "digits invented"
