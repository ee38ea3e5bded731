"""A column whose texts are in several scripts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from lightning_mlc.lint.check import Check
from lightning_mlc.lint.findings import Finding
from lightning_mlc.lint.rows import LintRow
from lightning_mlc.lint.scripts import is_written_in, script_name, scripts_of

LETTERS = 10
"""Fewest letters of a text."""


class MixedScripts(Check):
    """A text is in another script than most texts of its column, and the column's code allows both.

    Such a column holds two languages or varieties under one code: Sorani and Kurmanji as ``ku``, simplified and
    traditional Chinese as ``zh``, Cyrillic and Latin Serbian as ``sr``. Training would pull them together as one.
    Split the column (``ckb`` and ``kmr``, ``zh-Hans`` and ``zh-Hant``), or keep one of the two.

    Threshold: none, each text of a rarer script is found. Chinese characters that both standards have count as
    either. In the test set of MLC's authors, 134 of 180 Kurdish prompts are Sorani in Arabic script and 46 Kurmanji in
    Latin script.
    """

    name = "mixed_scripts"
    severity = "error"
    title = "another script than most of its column"

    def __init__(self) -> None:
        self._counts: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def learn(self, file: int, row: LintRow) -> None:
        for language, _, script in _scripts(row):
            self._counts[language][script] += 1

    def check(self, file: int, row: LintRow) -> Iterator[Finding]:
        for language, index, script in _scripts(row):
            usual = self._counts[language].most_common(1)[0][0]
            if script != usual:
                yield self.found(row.pairs[index], f"{script_name(script)}, most of the column is {script_name(usual)}")


def _scripts(row: LintRow) -> Iterator[tuple[str, int, str]]:
    """Language, index and script of each text whose language is written in several scripts."""
    for index, pair in enumerate(row.pairs):
        text = pair.text
        allowed = scripts_of(text.language)
        # A text of yet another script is an error of its own, and ambiguous Chinese characters say nothing.
        if len(allowed) > 1 and text.letters >= LETTERS and text.script is not None and text.script != "Hani":
            for script in allowed:
                if is_written_in(text.script, script):
                    yield text.language, index, script
                    break
