"""A text that is the source once more."""

from __future__ import annotations

from lightning_mlc.lint.check import TextCheck
from lightning_mlc.lint.families import are_related
from lightning_mlc.lint.rows import Pair
from lightning_mlc.lint.scripts import scripts_of

SAME_SCRIPT = 0.7
"""Lowest similarity of a near copy, if both languages share their script: related languages share words."""
OTHER_SCRIPT = 0.5
"""The same for languages of different scripts, whose texts share only names and numbers."""
COMMON = 0.3
"""Share of the letters that must be of the same scripts in a near copy."""
LETTERS = 12
"""Fewest letters: a short title or a name may be the same in both languages."""


class Copy(TextCheck):
    """The text equals the source, or nearly, apart from case and width. The translator left it as it was.

    Similarity is the share of common pieces of three characters (Dice coefficient), which takes linear time.
    Threshold: 0.7, or 0.5 between scripts. Translations of the sample have 0.4 at most; the same sentence in Spanish
    and Portuguese about 0.5. Languages of one family (Croatian and Serbian) are not compared.
    """

    name = "copy"
    severity = "error"
    title = "the source text, or nearly"

    def fault(self, pair: Pair) -> str | None:
        source, text = pair.source, pair.text
        if source.letters < LETTERS or text.letters < LETTERS:
            return None
        if are_related(text.language, source.language):  # varieties of one language (en and en-GB) may agree
            return None
        if text.key == source.key:
            return "a copy"
        # Without common letters there are no common pieces, and comparing takes time.
        if (text.scripts & source.scripts).total() < COMMON * min(text.letters, source.letters):
            return None
        shared = set(scripts_of(text.language)) & set(scripts_of(source.language))
        return "a near copy" if text.similarity(source) > (SAME_SCRIPT if shared else OTHER_SCRIPT) else None
