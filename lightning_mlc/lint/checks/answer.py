"""An answer of the translating model in place of a translation."""

from __future__ import annotations

import re

from lightning_mlc.evaluation.judges.refusal import refuses
from lightning_mlc.lint.check import TextCheck
from lightning_mlc.lint.rows import Pair

_COMPLIES = re.compile(
    r"\s*(?:sure|certainly|of course|absolutely|great question|as an ai\b|i['’]m an ai\b|i am an ai\b"
    r"|here(?: is|['’]s| are) (?:a|an|some|the|your)\b(?! translat))",
    re.IGNORECASE,
)
_NEGATES = re.compile(
    r"\b(?:sorry|cannot|unable|refus\w+|declin\w+|apolog\w+|illegal|unethical|wrong|afraid|not?|\w+n['’]t)\b",
    re.IGNORECASE,
)
"""Words with which an English prompt itself declines or negates, so that its translation does, too."""
BEGINNING = 300
"""Characters in which a phrase is looked for."""
_LINES = 4
"""A text with this many lines more than its source is a list of steps and not a translation."""


class Answer(TextCheck):
    """The text declines, agrees or explains, and the source does not: the translator answered the prompt.

    A refusal is recognised by the phrases of the judge ``refusal`` of ``evaluate``, at the text's beginning.
    Translators answer harmful prompts most often, so such rows would teach the model to refuse requests that nobody
    made. A prompt that itself declines or negates ("I can't sleep"), one in six, is not checked for refusals. A text of
    four and more lines more than its source is an answer, too.

    Threshold: one phrase. No false alarm on the sample and on 350 rows of real data in nine languages.
    """

    name = "answer"
    severity = "error"
    title = "an answer or a refusal instead of a translation"

    def fault(self, pair: Pair) -> str | None:
        if pair.part != "prompt":  # a response may decline
            return None
        text, source = pair.text.content, pair.source.content
        # A model answers in the language of the prompt, in that of the translation, or in English.
        languages = dict.fromkeys((_base(pair.text.language), _base(pair.source.language), "en"))
        if refuses(text[:BEGINNING], languages) and not _NEGATES.search(source) and not refuses(source, languages):
            return "a refusal"
        if _COMPLIES.match(text) and not _COMPLIES.match(source):
            return "an answer"
        return "an answer of many lines" if _lines(text) >= _lines(source) + _LINES else None


def _base(language: str) -> str:
    return language.partition("-")[0]


def _lines(text: str) -> int:
    return sum(bool(line.strip()) for line in text.splitlines())
