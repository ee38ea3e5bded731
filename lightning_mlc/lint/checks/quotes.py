"""Quotes and prefaces that a translating model leaves around its translation."""

from __future__ import annotations

import re

from lightning_mlc.lint.check import TextCheck
from lightning_mlc.lint.rows import Pair

_QUOTES = {'"': '"', "'": "'", "“": "”", "„": "“", "«": "»", "‘": "’", "「": "」", "『": "』", "```": "```"}
_WORDS = (
    r"translat(?:ion|ed)|翻译|翻譯|译文|譯文|翻訳|訳|번역|перевод|переклад|الترجمة|ترجمة|ترجمه|ترجمہ|ژباړه|ژباړل|অনুবাদ|अनुवाद"
    r"|tafsiri|werger|wergerandin|وەرگێڕان|çeviri|terjemahan|bản dịch|คำแปล|übersetzung|traduction|traducción"
    r"|traduzione|tradução"
)
"""The word "translation"."""
_PREFACE = re.compile(
    r"\s*\W{0,3}(?:(?:here(?: is|['’]s)|this is|below is)\b[^\n:]{0,60}\btranslat[^\n:]{0,40}[:\n]"
    rf"|(?:{_WORDS})[^\n:：]{{0,40}}[:：])",
    re.IGNORECASE,
)
_ABOUT_TRANSLATION = re.compile(rf"translat|{_WORDS}", re.IGNORECASE)


class Quotes(TextCheck):
    """The whole text is in quotes, or begins with a preface such as "Translation:", and the source is not.

    Threshold: one pair of quotes around the text; a word for "translation" followed by a colon at its beginning, where
    the source speaks of no translation.
    """

    name = "quotes"
    severity = "warning"
    title = "quotes around it, or a preface"

    def fault(self, pair: Pair) -> str | None:
        text, source = pair.text.content, pair.source.content
        if _PREFACE.match(text) and not _ABOUT_TRANSLATION.search(source):
            return "a preface"
        return "quotes around the text" if _is_quoted(text) and not _is_quoted(source) else None


def _is_quoted(text: str) -> bool:
    text = text.strip()
    for opening, closing in _QUOTES.items():
        inside = text[len(opening) : -len(closing)]
        if inside and text.startswith(opening) and text.endswith(closing):
            return opening not in inside and closing not in inside
    return False
