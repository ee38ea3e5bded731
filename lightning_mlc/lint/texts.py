"""Texts as checks see them: each feature is computed once, when a check first asks for it."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import cached_property

import regex

from lightning_mlc.lint.scripts import count_scripts, main_script

_VERBATIM = regex.compile(
    r"```.*?```|`[^`\n]+`"  # code
    r"|(?:https?://|www\.)[^\s<>\"'）】」]+"  # links
    r"|(?<![\w.+-])[\w.+-]{1,64}@[\w-]+\.[\w.-]+"  # addresses of e-mail
    r"|\{\{?[\w.]*\}?\}|\$\{\w+\}|%\(\w+\)[sd]|%[sd]\b"  # placeholders
    r"|</?[a-zA-Z][^<>\n]*>",  # tags
    regex.DOTALL,
)
_HINT = re.compile(r"[`@{%<]|https?:|www\.")
"""What every match of it contains. Most texts have none, and this search takes a tenth of the time."""
_DIGIT = re.compile(r"\d")
SHINGLE = 3
"""Number of characters of the pieces that texts are compared by."""


class Text:
    """A text in a language.

    Args:
        content: The text.
        language: BCP-47 code of the language that it should be in.
    """

    def __init__(self, content: str, language: str) -> None:
        self.content = content
        self.language = language

    @cached_property
    def verbatim(self) -> list[str]:
        """What a translation takes over as it is: code, links, addresses, placeholders and tags."""
        return [str(part) for part in _VERBATIM.findall(self.content)] if _HINT.search(self.content) else []

    @cached_property
    def prose(self) -> str:
        """The text without :attr:`verbatim`."""
        return _VERBATIM.sub(" ", self.content) if self.verbatim else self.content

    @cached_property
    def scripts(self) -> Counter[str]:
        """Letters of the prose by script, see :func:`~lightning_mlc.lint.scripts.count_scripts`."""
        return count_scripts(self.prose)

    @cached_property
    def letters(self) -> int:
        """Letters of the prose. A Chinese character is worth three."""
        return sum(self.scripts.values())

    @cached_property
    def script(self) -> str | None:
        """The script of most letters; see :func:`~lightning_mlc.lint.scripts.main_script`. None: no letters."""
        return main_script(self.scripts, self.prose)

    @cached_property
    def folded(self) -> str:
        """The text without differences of case, width and white space."""
        return " ".join(unicodedata.normalize("NFKC", self.content).casefold().split())

    @cached_property
    def shingles(self) -> frozenset[str]:
        """All pieces of three characters of :attr:`folded`."""
        text = self.folded
        return frozenset(text[start : start + SHINGLE] for start in range(len(text) - SHINGLE + 1))

    @cached_property
    def key(self) -> str:
        """The letters and digits of :attr:`folded`: equal for texts that differ in punctuation only."""
        return "".join(filter(str.isalnum, self.folded))

    @cached_property
    def digits(self) -> Counter[int]:
        """How often each digit occurs in the prose, whatever its script."""
        return Counter(map(int, _DIGIT.findall(self.prose)))

    def similarity(self, other: Text) -> float:
        """Share of pieces of three characters that both texts have, from 0 to 1 (Dice coefficient)."""
        together = len(self.shingles) + len(other.shingles)
        return 2 * len(self.shingles & other.shingles) / together if together else 0.0
