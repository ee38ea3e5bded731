"""Characters that no text should have."""

from __future__ import annotations

import re

from lightning_mlc.lint.check import TextCheck
from lightning_mlc.lint.rows import Pair

_KINDS = (
    ("replacement character", re.compile("\ufffd")),
    ("unpaired surrogate", re.compile("[\ud800-\udfff]")),
    ("control character", re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")),
    ("private or unassigned character", re.compile("[\ue000-\uf8ff\ufdd0-\ufdef\ufffe\uffff]")),
    ("HTML entity", re.compile(r"&(?:amp|lt|gt|quot|apos|nbsp|#\d{1,7}|#[xX][0-9a-fA-F]{1,6});")),
)


class Characters(TextCheck):
    """Replacement characters, unpaired surrogates, control and private characters, and HTML entities.

    They come from a broken conversion. What the source has, too, is content: code, or a question about HTML. Training
    refuses a file with an unpaired surrogate. Threshold: one character; no false alarm on the sample.
    """

    name = "characters"
    severity = "error"
    title = "control characters, replacement characters, HTML entities"
    of_source = True

    def fault(self, pair: Pair) -> str | None:
        for kind, pattern in _KINDS:
            if pattern.search(pair.text.content):
                # An unpaired surrogate is refused wherever it is, and an entity of the source is content.
                if not pair.is_source and kind != "unpaired surrogate" and pattern.search(pair.source.content):
                    continue
                if pair.is_source and kind == "HTML entity":
                    continue
                return kind
        return None
