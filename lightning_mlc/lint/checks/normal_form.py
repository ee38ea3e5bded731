"""Characters that look right and are encoded in an unusual way."""

from __future__ import annotations

import re
import unicodedata

from lightning_mlc.lint.check import TextCheck
from lightning_mlc.lint.rows import Pair

_KINDS = (
    ("invisible marks of direction", re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069]")),
    ("Arabic presentation forms", re.compile("[\ufb50-\ufdcf\ufdf0\ufdf1\ufdf3-\ufdf9\ufe70-\ufefe]")),
    ("invisible characters", re.compile("[\u00ad\u200b\u2060\ufeff]")),
)


class NormalForm(TextCheck):
    """The text is not in Unicode's form NFC, or has marks of direction, presentation forms or invisible characters.

    Tokenizers give such texts other tokens than the same text in the usual form. Signs that have no other form (ﷺ) are
    no fault, nor are joiners (U+200C, U+200D), which Persian, Kurdish and Indian scripts need. Threshold: one
    character.
    """

    name = "normal_form"
    severity = "warning"
    title = "unusual encoding: not NFC, marks of direction, invisible characters"
    of_source = True

    def fault(self, pair: Pair) -> str | None:
        text = pair.text.content
        if text.isascii():
            return None
        if not unicodedata.is_normalized("NFC", text):
            return "not NFC"
        return next((kind for kind, pattern in _KINDS if pattern.search(text)), None)
