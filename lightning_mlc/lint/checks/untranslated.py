"""A stretch of the source that was left as it is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lightning_mlc.lint.check import TextCheck
from lightning_mlc.lint.families import are_related
from lightning_mlc.lint.rows import Pair
from lightning_mlc.lint.scripts import is_written_in, scripts_of, share_of_others
from lightning_mlc.lint.texts import Text

SHARE = 0.3
"""Share of letters that may be of another script."""
LETTERS = 20
"""Fewest letters of a text."""
FEW_WORDS = 3
"""Words in a row that are the source's, in another script: single names and terms are often left as they are."""
WORDS = 5
"""The same in languages of one script, which share words."""
WORD_LETTERS = 20
"""Fewest characters of five such words, spaces included."""


class Untranslated(TextCheck):
    """More than 30 % of the letters are of a script that is not the column's, or five words in a row are the source's.

    Where the letters are of the source's script, three words in a row must be the source's, because names and terms are
    often left as they are. Code, links and placeholders do not count, and a Chinese character is worth three letters.
    Texts in which most letters are of another script are errors, see ``script``. Threshold: 30 %, or five words of 20
    characters together.
    """

    name = "untranslated"
    severity = "warning"
    title = "a stretch left untranslated"

    def fault(self, pair: Pair) -> str | None:
        text, source = pair.text, pair.source
        scripts = scripts_of(text.language)
        if text.letters < LETTERS or not scripts or text.script is None or text.key == source.key:
            return None
        if not any(is_written_in(text.script, script) for script in scripts):
            return None
        share = share_of_others(text.scripts, text.language)
        if share > SHARE and (source.script not in text.scripts or _has_run(text, source, FEW_WORDS, 0)):
            return f"{share:.0%} of the letters are of another script"
        if are_related(text.language, source.language):
            return None
        return "a run of the source's words" if _has_run(text, source, WORDS, WORD_LETTERS) else None


def _has_run(text: Text, source: Text, count: int, characters: int) -> bool:
    """Whether ``text`` has ``count`` words of ``source`` in a row that have at least ``characters`` characters."""
    # The words inside a run stand alone in the text, too. To look for every run there would take quadratic time.
    inside = set(_grams(text.folded.split(), count - 2))
    words = source.folded.split()
    for start, gram in enumerate(_grams(words[1:-1], count - 2)):
        if gram in inside:
            run = " ".join(words[start : start + count])
            if len(run) >= characters and run in text.folded:
                return True
    return False


def _grams(words: Sequence[str], count: int) -> Iterator[tuple[str, ...]]:
    """All ``count`` neighbouring words."""
    return zip(*(words[start:] for start in range(count)), strict=False)
