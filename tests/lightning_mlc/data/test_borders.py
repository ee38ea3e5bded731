"""The border between prompt and response, for tokenizers and templates of many kinds, with values by hand."""

from __future__ import annotations

import dataclasses
import re
from datetime import datetime
from typing import Literal

import pytest
from conftest import byte_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from lightning_mlc.data.records import Example
from lightning_mlc.data.tokenization import ChatTokenizer
from lightning_mlc.errors import UserError

ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[{{ m['content'] }}]"
    "{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}"
)
"""A template without a generation header and with a space before the response."""
VICUNA = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}\nA: "
    "{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
)
"""A template whose prompt ends with a space."""
USER = [{"role": "user", "content": "Hi"}]


def tokenizer_of(
    template: str, pieces: tuple[str, ...], scheme: Literal["always", "first"] | None, eos: str | None = "</s>"
) -> PreTrainedTokenizerFast:
    """A tokenizer with a token per character and one for each of ``pieces``, merged as in SentencePiece or byte-level
    BPE."""
    characters = dict.fromkeys("".join(chr(c) for c in range(33, 127)) + ("▁\n" if scheme else "ĠĊ"))
    vocabulary = {character: i for i, character in enumerate(characters)}
    vocabulary |= {piece: len(vocabulary) + i for i, piece in enumerate(pieces)}
    merges = [(piece[0], piece[1:]) for piece in pieces]
    backend = Tokenizer(BPE(vocabulary, merges))
    if scheme:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        backend.decoder = decoders.Metaspace(prepend_scheme=scheme, split=False)
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, pad_token=eos)
    tokenizer.add_tokens([AddedToken(f"<|{role}|>", special=True, normalized=False) for role in ("user", "assistant")])
    tokenizer.chat_template = template
    return tokenizer


def border(tokenizer: PreTrainedTokenizerFast, response: str) -> tuple[list[str], list[str]]:
    """The tokens of the prompt "Hi" and those of ``response``."""
    chat = ChatTokenizer(tokenizer, 500, 500, "error")
    ids = chat.prompt(USER, "row 1")[0], chat.response(USER, response)
    prompt, answer = (tokenizer.convert_ids_to_tokens(part) for part in ids)
    return prompt, answer


@pytest.mark.parametrize("scheme", ["always", "first"])
def test_sentencepiece_puts_no_mark_before_a_response(scheme: Literal["always", "first"]) -> None:
    """The header ends with a line break, after which the mark of a text's beginning would come."""
    prompt, response = border(tokenizer_of(ZEPHYR, (), scheme), "Yes.")
    assert prompt[-1] == "\n"
    assert response == ["Y", "e", "s", ".", "</s>"]


def test_a_space_that_the_template_puts_before_a_response_is_kept() -> None:
    prompt, response = border(tokenizer_of(LLAMA_2, ("▁Y",), "first"), "Yes.")
    assert prompt == ["▁", "[", "H", "i", "]"]
    assert response == ["▁Y", "e", "s", ".", "▁", "</s>"]
    prompt, response = border(tokenizer_of(LLAMA_2, ("ĠY",), None), "Yes.")
    assert response == ["ĠY", "e", "s", ".", "Ġ", "</s>"]


@pytest.mark.parametrize("scheme", ["always", "first", None])
def test_no_token_lies_over_the_border(scheme: Literal["always", "first"] | None) -> None:
    """In the whole text, the last two tokens would be " Y" and "e", but in generation the space is already there."""
    space = "▁" if scheme else "Ġ"
    tokenizer = tokenizer_of(VICUNA, (f"{space}Y",), scheme)
    whole = tokenizer.tokenize("A: Ye")
    assert whole[-2:] == [f"{space}Y", "e"]
    prompt, response = border(tokenizer, "Yes.")
    assert prompt[-3:] == ["A", ":", space]
    assert response == ["Y", "e", "s", ".", "</s>"]


def test_line_breaks_that_would_become_one_token() -> None:
    tokenizer = tokenizer_of(ZEPHYR, ("ĊĊ",), None)
    prompt, response = border(tokenizer, "\nYes.")
    assert prompt[-2:] == ["<|assistant|>", "Ċ"]
    assert response == ["Ċ", "Y", "e", "s", ".", "</s>"]
    assert border(tokenizer, "\n\nYes.")[1] == ["ĊĊ", "Y", "e", "s", ".", "</s>"]


def test_what_follows_the_end_of_a_turn_is_not_trained() -> None:
    assert border(tokenizer_of(ZEPHYR, (), None), "Yes.")[1][-1] == "</s>"  # the template's line break is gone too


def test_many_examples_are_encoded_as_each_of_them_alone() -> None:
    chat = ChatTokenizer(byte_tokenizer(ZEPHYR.replace("</s>", "<|end|>")), 60, 20, "cut")
    examples = [
        Example(f"e{i}", f"a.jsonl row {i}", {"en": [{"role": "user", "content": "x" * (i * 9)}]}, "Yes" * i, "No.")
        for i in range(1, 8)
    ]
    examples[3] = dataclasses.replace(
        examples[3], prompts=examples[3].prompts | {"sw": USER}, translated={"sw": ("Ndiyo.", "Hapana.")}
    )
    assert chat.encode_all(examples, ("en", "sw")) == [chat.encode(example, ("en", "sw")) for example in examples]


# ---- templates that change or drop what they are given ---------------------------------------------------------------


def template_of(content: str, opens: str = "") -> str:
    """A template that writes ``content`` for a message ``m``, and ``opens`` after its generation header."""
    return ZEPHYR.replace("{{ m['content'] }}", content).replace("<|assistant|>\n", f"<|assistant|>\n{opens}")


def chat_of(template: str, eos: str | None = "</s>") -> ChatTokenizer:
    return ChatTokenizer(tokenizer_of(template, (), None, eos), 500, 500, "error")


def text_of(chat: ChatTokenizer, ids: list[int]) -> str:
    return str(chat.tokenizer.decode(ids))


SYSTEM = [{"role": "system", "content": "Be kind."}, *USER]
HISTORY = [*USER, {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Why?"}]


def test_a_template_that_reads_content_as_parts() -> None:
    chat = chat_of(template_of("{% for part in m['content'] %}{{ part['text'] }}{% endfor %}"))
    assert text_of(chat, chat.prompt(USER, "row 1")[0]) == "<|user|>\nHi</s>\n<|assistant|>\n"
    assert text_of(chat, chat.response(USER, "Yes.")) == "Yes.</s>"


@pytest.mark.parametrize(
    ("template", "messages", "told"),
    [
        (ZEPHYR.replace("<|{{", "{% if m['role'] == 'system' %}{% continue %}{% endif %}<|{{"), SYSTEM, "system"),
        (ZEPHYR.replace("in messages", "in messages[-1:]"), HISTORY, "user"),
        (ZEPHYR.replace("m['content']", "m.text"), USER, "user"),
    ],
)
def test_messages_that_a_template_drops(template: str, messages: list[dict[str, str]], told: str) -> None:
    with pytest.raises(
        UserError, match=rf"^row 1: .* has no place for the message of the {told} in this prompt; change the row"
    ):
        chat_of(template).prompt(messages, "row 1")


def test_text_that_a_template_drops() -> None:
    chat = chat_of(ZEPHYR.replace("m['content']", "m['content'].split('</t>')[-1]"))
    assert chat.prompt(USER, "row 1")
    with pytest.raises(UserError, match=r"row 1: .* leaves out some of the text of message 1 \(user\)"):
        chat.prompt([{"role": "user", "content": "<t>hm</t> Hi"}], "row 1")
    with pytest.raises(UserError, match=r"^row 1: .* leaves out some of the response"):
        chat.response(USER, "<t>hm</t> Hi", "row 1")


def test_parts_that_are_written_as_python_does_are_no_text() -> None:
    """A list with one part has at most five items; a text of five characters loses the rest."""
    chat = chat_of(template_of("{{ m['content'][:5] }}"))
    with pytest.raises(UserError, match=r"^row 1: .* has no place for the message of the user in this prompt"):
        chat.prompt(USER, "row 1")


def test_white_space_that_a_template_trims_is_no_text() -> None:
    chat = chat_of(ZEPHYR.replace("m['content']", "m['content'] | trim"))
    assert text_of(chat, chat.response(USER, "\n Yes. ")) == "Yes.</s>"


THINKING = template_of("{{ m['content'].split('</think>')[-1] }}", "<think>\n")
"""As in DeepSeek-R1: the header opens a block that finished turns do not have."""


@pytest.mark.parametrize("response", ["<think>\nHm.</think>Yes.", "<think>Hm.</think>Yes.", "Hm.</think>Yes."])
def test_a_response_goes_on_in_the_block_that_the_header_opens(response: str) -> None:
    chat = chat_of(THINKING)
    assert text_of(chat, chat.prompt(USER, "row 1")[0]).endswith("<|assistant|>\n<think>\n")
    assert text_of(chat, chat.response(USER, response)) == "Hm.</think>Yes.</s>"


@pytest.mark.parametrize(
    "template",
    [
        THINKING,
        template_of("{% if m['role'] == 'assistant' %}<think>\n{% endif %}{{ m['content'] }}", "<think>\n"),
    ],
)
def test_a_response_that_would_stay_in_the_block_is_refused(template: str) -> None:
    chat = chat_of(template)
    with pytest.raises(UserError, match=r"^row 1: .* opens <think> before each response, .* has no </think>"):
        chat.response(USER, "Yes.", "row 1")
    assert text_of(chat, chat.response(USER, "<think>\nHm.</think>Yes.")) == "Hm.</think>Yes.</s>"


@pytest.mark.parametrize(
    ("opened", "closed"),
    [
        ("<|START_THINKING|>", "<|END_THINKING|>"),  # as in Command A
        ("<|begin_of_thought|>", "<|end_of_thought|>"),
        ("◁think▷", "◁/think▷"),
        ("[THINK]", "[/THINK]"),
    ],
)
def test_a_block_may_have_other_marks(opened: str, closed: str) -> None:
    def chat_after(header: str) -> ChatTokenizer:
        template = template_of("{{ m['content'] }}", header).replace("</s>", "<|end|>")
        return ChatTokenizer(byte_tokenizer(template), 500, 500, "error")  # it knows every character

    chat, shut = chat_after(opened), chat_after(opened + closed)
    assert text_of(chat, chat.response(USER, f"{opened}Hm.{closed}Yes.")) == f"Hm.{closed}Yes.<|end|>"
    with pytest.raises(UserError, match=re.escape(f"opens {opened} before each response, and this response has no")):
        chat.response(USER, "Yes.", "row 1")
    assert text_of(shut, shut.response(USER, "Yes.")) == "Yes.<|end|>"


def test_a_template_that_closes_the_block_itself() -> None:
    content = "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}"
    chat = chat_of(template_of(content, "<think>\n"))
    assert text_of(chat, chat.response(USER, "Yes.")) == "\n</think>\n\nYes.</s>"


def test_no_token_could_end_a_response() -> None:
    with pytest.raises(UserError, match=r"^model\.name_or_path: .* has no EOS token, and its chat template ends no"):
        chat_of(ZEPHYR.replace("</s>", ""), eos=None)


@pytest.mark.parametrize(
    "refusal", ["{{ raise_exception('empty') }}", "{{ 1 + 'a' }}", "{{ [][3].x }}", "{{ 1 // 0 }}"]
)
def test_templates_that_refuse_an_empty_response(refusal: str) -> None:
    """Whatever error they raise."""
    chat = chat_of(ZEPHYR.replace("<|{{", f"{{% if not m['content'] %}}{refusal}{{% endif %}}<|{{{{"))
    assert chat.response(USER, "Yes.")
    with pytest.raises(UserError, match=r"^row 1: .* refuses an empty response \(.*\); change the row"):
        chat.response(USER, "", "row 1")


def test_named_templates() -> None:
    tokenizer = tokenizer_of(ZEPHYR, (), None)
    tokenizer.chat_template = {"tool_use": ZEPHYR, "rag": ZEPHYR}
    with pytest.raises(
        UserError, match=r"^model\.name_or_path: .* no default chat template, only tool_use, rag; write"
    ):
        ChatTokenizer(tokenizer, 500, 500, "error")
    tokenizer.chat_template = {"tool_use": "", "default": ZEPHYR}
    assert ChatTokenizer(tokenizer, 500, 500, "error").end == "</s>"


def test_a_template_is_told_the_same_date_every_day() -> None:
    template = "\n{{ strftime_now('%d %b %Y, %A, %Y-%m-%d, %B %-d') }}\n" + ZEPHYR
    chat = chat_of(template)
    text = text_of(chat, chat.prompt(USER, "row 1")[0])
    assert text.startswith("\n26 Jul 2024, Friday, 2024-07-26, July 26\n<|user|>")


def test_a_template_may_ask_for_any_part_of_the_date() -> None:
    codes = [f"%{code}" for code in "aAbBcdDeFhHIjmMpRSTuUVwWxXyYf"] + [f"%-{code}" for code in "dmHIMSyj"]
    chat = chat_of("{{ strftime_now('" + "|".join(codes) + "') }}\n" + ZEPHYR)
    (text,) = chat.template.render([USER], header=False)
    assert text.partition("\n")[0] == datetime(2024, 7, 26).strftime("|".join(codes))
