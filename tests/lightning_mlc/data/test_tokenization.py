"""Prompts end with the generation header, even if they are cut; responses end with one EOS."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from conftest import TEMPLATE, byte_tokenizer

from lightning_mlc.data.records import Example
from lightning_mlc.data.tokenization import ChatTokenizer
from lightning_mlc.errors import UserError

HEADER = "<|end|>\n<|assistant|>"


def example(prompt: str, chosen: str = "Yes.", rejected: str | None = "No.") -> Example:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": prompt}]
    return Example("a", "a.jsonl row 1", {"en": messages, "zh": messages}, chosen, rejected)


def chat(template: str | None = TEMPLATE, **options: Any) -> ChatTokenizer:
    settings: dict[str, Any] = {"max_prompt_length": 500, "max_response_length": 50, "on_long_prompt": "cut"}
    return ChatTokenizer(byte_tokenizer(template), **{**settings, **options})


def decode(tokenizer: ChatTokenizer, ids: list[int]) -> str:
    return str(tokenizer.tokenizer.decode(ids))


def test_prompt_and_responses() -> None:
    tokenizer = chat()
    row = tokenizer.encode(example("Hi"), ("en", "sw", "zh"))
    assert row["languages"] == [0, 2]
    assert decode(tokenizer, row["prompts"][0]) == f"<|system|>Be kind.<|end|>\n<|user|>Hi{HEADER}"
    assert decode(tokenizer, row["chosen"]) == "Yes.<|end|>"
    assert decode(tokenizer, row["rejected"]) == "No.<|end|>"
    assert row["cut_prompts"] == []
    assert not row["cut_response"]


@pytest.mark.parametrize(
    "template",
    [
        # It puts an empty thinking block before the answer, which the rendering of the prompt does not have.
        TEMPLATE.replace(
            "{{ m['content'] }}", "{% if m['role'] == 'assistant' %}<think></think>{% endif %}{{ m['content'] }}"
        ),
        # It never marks the end of the answer.
        TEMPLATE.replace("<|end|>", ""),
    ],
)
def test_response_ends_with_eos_under_any_template(template: str) -> None:
    tokenizer = chat(template)
    text = decode(tokenizer, tokenizer.encode(example("Hi"), ("en",))["chosen"])
    assert text.endswith("Yes.<|end|>")
    assert text.count("<|end|>") == 1


def test_response_ends_as_the_template_ends_it_though_eos_is_another() -> None:
    tokenizer = chat(TEMPLATE.replace("<|end|>", "<|pad|>"))
    assert tokenizer.end == "<|pad|>"
    assert decode(tokenizer, tokenizer.encode(example("Hi"), ("en",))["chosen"]) == "Yes.<|pad|>"


def test_a_template_that_refuses_the_conversation_leaves_eos() -> None:
    refusing = "{{ raise_exception('one message, please') }}"
    assert chat(refusing).end == "<|end|>"


def test_an_empty_response_is_eos_alone() -> None:
    tokenizer = chat()
    assert decode(tokenizer, tokenizer.encode(example("Hi", chosen=""), ("en",))["chosen"]) == "<|end|>"


@pytest.mark.parametrize("limit", [40, 41, 42, 43, 60])
def test_a_long_prompt_keeps_its_header(limit: int) -> None:
    """One token is one byte here, and each of these characters has three bytes, none of which may be separated."""
    tokenizer = chat(max_prompt_length=limit)
    row = tokenizer.encode(example("什么是茶" * 20), ("en",))
    text = decode(tokenizer, row["prompts"][0])
    assert limit - 3 < len(row["prompts"][0]) <= limit
    assert text.startswith("<|system|>Be kind.<|end|>\n<|user|>什")
    assert text.endswith(HEADER)
    assert "\ufffd" not in text
    assert row["cut_prompts"] == ["en"]


def test_a_long_response_loses_its_end() -> None:
    tokenizer = chat(max_response_length=10)
    row = tokenizer.encode(example("Hi", chosen="0123456789abc"), ("en",))
    assert decode(tokenizer, row["chosen"]) == "0123456789"
    assert row["cut_response"]


def test_responses_of_other_languages() -> None:
    tokenizer = chat(max_response_length=10)
    translated = {"zh": ("不。", "好。"), "sw": ("Hapana.", "Ndiyo.")}
    row = tokenizer.encode(dataclasses.replace(example("Hi"), translated=translated), ("en", "sw", "zh"))
    assert row["languages"] == [0, 2]  # no prompt in Swahili
    assert row["translated"] == [2]
    for name, text in (("translated_chosen", "不。<|end|>"), ("translated_rejected", "好。<|end|>")):
        assert [decode(tokenizer, ids) for ids in row[name]] == [text]
    assert not row["cut_response"]
    short = chat(max_response_length=6)  # enough for "Yes." and its end, but not for six bytes and their end
    assert short.encode(dataclasses.replace(example("Hi"), translated=translated), ("en", "sw", "zh"))["cut_response"]
    assert not short.encode(example("Hi"), ("en", "sw", "zh"))["cut_response"]


def test_long_prompts_can_be_refused() -> None:
    with pytest.raises(UserError, match=r"a\.jsonl row 1 \(en\): the prompt has 37 tokens.*max_prompt_length is 36"):
        chat(max_prompt_length=36, on_long_prompt="error").encode(example("0123456789" * 2 + "12"), ("en",))


def test_a_limit_that_leaves_no_room() -> None:
    with pytest.raises(UserError, match="leaves no room"):
        chat(max_prompt_length=5).encode(example("Hello there"), ("en",))


def test_a_tokenizer_without_chat_template() -> None:
    with pytest.raises(UserError, match="has no chat template"):
        chat(None)
