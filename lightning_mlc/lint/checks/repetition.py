"""A text that repeats itself."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lightning_mlc.lint.check import TextCheck
from lightning_mlc.lint.rows import Pair
from lightning_mlc.lint.texts import Text

SIZE = 4
"""Words that are compared together; characters in scripts without spaces."""
TIMES = 5
"""A sequence may occur this often."""
SHARE = 0.25
"""A sequence may take up to this share of the text, because long texts repeat short sequences."""
SPACES = 1 / 20
"""Text with fewer spaces per character is compared by characters."""


class Repetition(TextCheck):
    """Four words in a row occur more than five times, and make up a quarter of the text.

    A model that loops writes such texts. In Chinese, Japanese and Thai, which have no spaces, it is four characters.
    What the source repeats as well is no fault. Threshold: more than 5 times and 25 %.
    """

    name = "repetition"
    severity = "warning"
    title = "the same words again and again"
    of_source = True

    def fault(self, pair: Pair) -> str | None:
        times = _most(pair.text)
        if not times or (not pair.is_source and _most(pair.source)):
            return None
        return f"four words in a row occur {times} times"


def _most(text: Text) -> int:
    """How often the most frequent sequence of a repetitive text occurs; 0: the text is not repetitive."""
    content = text.folded
    if len(content) < SIZE * (TIMES + 1):
        return 0
    parts: Sequence[str] = content if content.count(" ") < SPACES * len(content) else content.split(" ")
    if len(parts) < SIZE + TIMES:
        return 0
    grams = Counter(zip(*(parts[start:] for start in range(SIZE)), strict=False))
    times = grams.most_common(1)[0][1]
    # Sequences of one repeated word overlap, so a share is counted as if they did not.
    return times if times > TIMES and times >= SHARE * len(parts) / SIZE else 0
