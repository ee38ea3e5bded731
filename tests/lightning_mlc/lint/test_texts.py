"""Features of texts."""

from __future__ import annotations

from lightning_mlc.lint.texts import Text


def test_what_is_taken_over_as_it_is() -> None:
    text = Text("See https://a.example/b, mail a.b@c.org, run `ls -l`; {name} owes %(sum)d <b>now</b>.", "en")
    assert text.verbatim == ["https://a.example/b,", "a.b@c.org", "`ls -l`", "{name}", "%(sum)d", "<b>", "</b>"]
    assert Text("100% sure, a < b", "en").verbatim == []
    assert "example" not in text.prose
    assert text.prose.startswith("See ")


def test_texts_that_differ_in_case_width_and_punctuation_have_one_key() -> None:
    assert Text("Ｗhere is  IT?", "en").folded == "where is it?"
    assert Text("Where, is it!", "en").key == Text("where is it", "en").key


def test_digits_of_all_scripts() -> None:
    assert Text("25 ২৫ ٢٥", "en").digits == {2: 3, 5: 3}


def test_similarity() -> None:
    one = Text("abcd", "en")
    assert one.similarity(Text("ABCD", "en")) == 1
    assert one.similarity(Text("abcx", "en")) == 0.5  # abc, bcd; abc, bcx
    assert one.similarity(Text("", "en")) == 0
