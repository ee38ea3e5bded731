"""The same text in two languages of a row."""

from __future__ import annotations

from collections.abc import Iterator

from lightning_mlc.lint.check import Check
from lightning_mlc.lint.families import are_related
from lightning_mlc.lint.findings import Finding
from lightning_mlc.lint.rows import LintRow, Pair
from lightning_mlc.lint.texts import Text

LETTERS = 12
"""Fewest letters: short texts may be the same in related languages."""


class SameText(Check):
    """A translation equals that of another language, apart from case, width and punctuation. One of the two is wrong.

    Both are reported, because which of them is wrong is for ``language`` to say. Languages of one family are not
    compared. Threshold: equality of at least 12 letters; no false alarm on the sample.
    """

    name = "same_text"
    severity = "error"
    title = "the same text in two languages"

    def check(self, file: int, row: LintRow) -> Iterator[Finding]:
        first: dict[tuple[str, str], list[Pair]] = {}
        for pair in row.pairs[1:]:
            if pair.text.letters >= LETTERS and not is_copy(pair.text, pair.source):
                first.setdefault((pair.part, pair.text.key), []).append(pair)
        for pairs in first.values():
            for pair in pairs if len(pairs) > 1 else ():
                others = [
                    other.text.language for other in pairs if not are_related(other.text.language, pair.text.language)
                ]
                if others:
                    yield self.found(pair, f"equals the text in {', '.join(others)}")


def is_copy(text: Text, source: Text) -> bool:
    """Whether ``text`` is its source, which is another check's to report."""
    return text.key == source.key
