"""Ends of sentences and questions in several scripts."""

from __future__ import annotations

import pytest

from lightning_mlc.lint.punctuation import has_end, has_question, is_question


@pytest.mark.parametrize("text", ["Go.", "走。", "যাও।", "جاؤ۔", "Go!”", "(Go.)", "go…", "كيف؟"])
def test_ends(text: str) -> None:
    assert has_end(text)


@pytest.mark.parametrize("text", ["", "Go", "走", "Go,", "a; b"])
def test_no_ends(text: str) -> None:
    assert not has_end(text)


def test_questions() -> None:
    assert all(map(is_question, ["Why?", "为什么？", "لماذا؟", "Γιατί;", 'He said "why?"']))
    assert not any(map(is_question, ["Why? Because.", "a; b;", "どこですか。", ""]))
    assert all(map(has_question, ["Why? Because.", "どこですか。", "你好吗"]))
    assert not has_question("好。")
