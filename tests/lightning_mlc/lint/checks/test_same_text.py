"""The same text in two languages."""

from __future__ import annotations

from translations import found, places, row

SOURCE = "How do I keep my bicycle from rusting?"
URDU = "میں اپنی سائیکل کو زنگ لگنے سے کیسے بچاؤں؟"
PASHTO = "زه څنګه خپل بایسکل له زنګ وهلو وساتم؟"


def test_both_are_found_and_name_each_other() -> None:
    texts = {"en": SOURCE, "ur": URDU, "ps": URDU.replace("؟", "?")}
    assert places("same_text", [row(1, texts)]) == [(1, "ur"), (1, "ps")]
    assert [finding.note for _, finding in found("same_text", [row(1, texts)])] == [
        "equals the text in ps",
        "equals the text in ur",
    ]


def test_near_misses() -> None:
    assert places("same_text", [row(1, {"en": SOURCE, "ur": URDU, "ps": PASHTO})]) == []
    assert places("same_text", [row(1, {"en": "Hotel?", "fr": "Hôtel ?", "de": "Hotel?", "nl": "Hotel?"})]) == []
    norwegian = "Hvordan beskytter jeg sykkelen min mot rust?"
    assert places("same_text", [row(1, {"en": SOURCE, "nb": norwegian, "no": norwegian})]) == []
    # Copies of the source are another check's.
    assert places("same_text", [row(1, {"en": SOURCE, "fr": SOURCE, "de": SOURCE})]) == []
    assert places("same_text", [row(1, {"en": SOURCE, "ur": URDU}), row(2, {"en": SOURCE, "ps": URDU})]) == []
