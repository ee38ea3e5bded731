"""Links, code, placeholders and emoji of the source that are lost."""

from __future__ import annotations

from collections import Counter

import regex

from lightning_mlc.lint.check import TextCheck
from lightning_mlc.lint.rows import Pair

_EMOJI = regex.compile(r"\p{Emoji_Presentation}|\p{Extended_Pictographic}\ufe0f")


class Placeholders(TextCheck):
    """A link, an address, code, a placeholder (``{x}``, ``%s``), a tag or an emoji of the source is not in the text.

    A translation takes them over as they are. Marks around code and the order may differ. Threshold: one that is lost.
    """

    name = "placeholders"
    severity = "warning"
    title = "links, code, placeholders or emoji lost"

    def fault(self, pair: Pair) -> str | None:
        text = pair.text.content
        if any(part.strip("`.,") not in text for part in pair.source.verbatim):
            return "a link, code or a placeholder lost"
        source = pair.source.content
        if source.isascii():
            return None
        lost = Counter(_EMOJI.findall(source)) - Counter(_EMOJI.findall(text))
        return "an emoji lost" if lost else None
