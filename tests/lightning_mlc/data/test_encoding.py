"""A text encoded in pieces gets the same tokens as the whole text, with any tokenizer."""

from __future__ import annotations

import gc
import random
from pathlib import Path
from typing import Any, Literal

import pytest
from conftest import TEMPLATE, byte_tokenizer, translated_rows, write_jsonl
from tokenizers import AddedToken, normalizers
from transformers import PreTrainedTokenizerFast

from lightning_mlc.data.encoding import ChatEncoder, _borders
from lightning_mlc.data.file_layouts import parse_rows
from lightning_mlc.data.reading import read_rows
from lightning_mlc.data.spool import Spool
from lightning_mlc.data.tables import TABLE, table_fingerprint, tokenised_table
from lightning_mlc.data.templates import ChatTemplate
from lightning_mlc.data.tokenization import ChatTokenizer

from .test_borders import LLAMA_2, VICUNA, ZEPHYR, tokenizer_of

MERGED = ("ĊĊ", "ĠY", "YY", "a<", "|>")


def pieces_of(scheme: Literal["always", "first"] | None) -> tuple[str, ...]:
    return tuple(piece.replace("Ġ", "▁").replace("Ċ", "\n") if scheme else piece for piece in MERGED)


def sentencepiece(scheme: Literal["always", "first"], template: str = ZEPHYR) -> PreTrainedTokenizerFast:
    return tokenizer_of(template, pieces_of(scheme), scheme)


def old_sentencepiece(template: str = ZEPHYR) -> PreTrainedTokenizerFast:
    """A tokenizer made like the fast tokenizers of Llama 2, whose normalizer adds the word mark."""
    tokenizer = tokenizer_of(template, pieces_of("first"), "first")
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.backend_tokenizer.pre_tokenizer = None
    return tokenizer


def with_difficult_tokens() -> PreTrainedTokenizerFast:
    tokenizer = tokenizer_of(ZEPHYR, MERGED, None)
    tokenizer.add_tokens(
        [
            AddedToken("<l>", lstrip=True, normalized=False),
            AddedToken("<r>", rstrip=True, normalized=False),
            AddedToken("<w>", single_word=True, normalized=False),
            AddedToken("<n>", normalized=True),
            AddedToken("<|user|>Y", normalized=False),  # the longer match is used
            AddedToken("$a", normalized=False),
            AddedToken("b$", normalized=False),  # overlaps the one before
            AddedToken("]x]", normalized=False),  # overlaps itself
        ]
    )
    return tokenizer


TOKENIZERS = {
    "bytes": byte_tokenizer,
    "byte-level": lambda: tokenizer_of(ZEPHYR, MERGED, None),
    "always": lambda: sentencepiece("always"),
    "first": lambda: sentencepiece("first"),
    "prepend": old_sentencepiece,
    "difficult": with_difficult_tokens,
}
PARTS = [" ", "  ", "\n", "\n\n", "Y", "YY", "a", "b", "[", "]x", "]x]x]", "x", "$", ".", "▁", "é", "你好", "<", "|>"]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_are_encoded_as_the_whole(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values()]
    encoder = ChatEncoder(tokenizer, "".join(tokens))
    draw = random.Random(name)
    texts = ["", *("".join(draw.choices(PARTS + tokens, k=draw.randrange(12))) for _ in range(2000))]
    assert encoder.ids(texts) == encoder.plain(texts)
    assert encoder._backend is not None
    assert encoder._borders is not None


def test_texts_are_cut_only_where_a_token_stands_alone() -> None:
    assert _borders(with_difficult_tokens().backend_tokenizer) == ["</s>", "<|assistant|>", "<r>"]


def test_no_piece_is_encoded_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = ChatEncoder(byte_tokenizer(), "<|user|><|end|><|assistant|>")
    given: list[list[str]] = []

    class Backend:
        def __getattr__(self, name: str) -> Any:
            return getattr(byte_tokenizer().backend_tokenizer, name)

        def encode_batch_fast(self, texts: list[str], **options: Any) -> Any:
            given.append(texts)
            return byte_tokenizer().backend_tokenizer.encode_batch_fast(texts, **options)

    monkeypatch.setattr(encoder, "_backend", Backend())
    encoder.ids(["<|user|>a<|end|>\n<|assistant|>", "<|user|>a<|end|>\n<|assistant|>b<|end|>"])
    assert given == [["", "<|user|>a", "<|end|>\n", "<|assistant|>", "<|assistant|>b", "<|end|>"]]


class Rewriting(PreTrainedTokenizerFast):
    """Changes some texts before its backend gets them."""

    def _encode_plus(self, text: Any, *args: Any, **options: Any) -> Any:  # type: ignore[override]
        return super()._encode_plus([each.replace("AB", "ab") for each in text], *args, **options)


def test_a_tokenizer_with_code_of_its_own_is_asked() -> None:
    tokenizer = byte_tokenizer()
    rewriting = Rewriting(tokenizer_object=tokenizer.backend_tokenizer)
    assert ChatEncoder(rewriting, "<|end|>").ids(["AB"]) == tokenizer(["ab"])["input_ids"]


def test_a_tokenizer_whose_pieces_differ_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial finds what no rule covers."""
    monkeypatch.setattr("lightning_mlc.data.encoding._stands_alone", lambda token, others: True)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<l>", lstrip=True, normalized=False)])
    encoder = ChatEncoder(tokenizer, "<l>")
    assert encoder.ids(["a <l>"]) == encoder.plain(["a <l>"]) == [tokenizer.convert_tokens_to_ids(["a", "<l>"])]


def test_padding_and_truncation_that_others_asked_for_do_not_stay() -> None:
    tokenizer = byte_tokenizer()
    encoder = ChatEncoder(tokenizer, "<|end|>")
    tokenizer(["abc", "a"], padding=True, truncation=True, max_length=2)
    assert [len(ids) for ids in encoder.ids(["abc", "a"])] == [3, 1]


@pytest.mark.parametrize(
    "tokenizer",
    [
        byte_tokenizer(),
        tokenizer_of(ZEPHYR, MERGED, None),
        tokenizer_of(LLAMA_2, MERGED, None),
        sentencepiece("always"),
        sentencepiece("first", VICUNA),
        old_sentencepiece(LLAMA_2),
    ],
    ids=["bytes", "byte-level", "space", "always", "ends with a space", "prepend"],
)
def test_tables_are_those_of_one_text_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Rows, ids and fingerprints for each number of rows per batch and of processes."""
    path = str(write_jsonl(tmp_path / "a.jsonl", translated_rows(40)))
    languages = ("en", "sw", "zh")
    tables = {}
    for name, together, processes in (("plain", 1, 1), ("few", 7, 1), ("many", 16, 1), ("two", 16, 2)):
        with monkeypatch.context() as patch:
            patch.setattr("lightning_mlc.data.spool.ROWS", together)
            if name == "plain":
                patch.setattr(
                    ChatEncoder, "ids", lambda self, texts: [self.plain([text])[0] for text in texts], raising=True
                )
                patch.setattr(ChatTemplate, "_compiled", lambda self: None)
            spool = Spool.write(parse_rows(read_rows(path, "data.train_path"), "en"), tmp_path / name)
            chat = ChatTokenizer(tokenizer, 42, 20, "cut")
            tables[name] = tokenised_table(spool, languages, chat, tmp_path / f"{name}-cache", processes)
    plain = tables.pop("plain")
    assert any(plain["cut_prompts"])
    assert any(plain["cut_response"])
    for name, table in tables.items():
        assert table.to_list() == plain.to_list(), name
        assert table_fingerprint(table) == table_fingerprint(plain), name
    files = [next((tmp_path / f"{name}-cache").rglob(TABLE)).read_bytes() for name in ("many", "two")]
    assert files[0] == files[1]


def test_a_tokenizer_that_applies_its_template_itself_is_asked() -> None:
    class Own(PreTrainedTokenizerFast):
        def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
            return [f"{text}!" for text in super().apply_chat_template(conversation, **options)]

    tokenizer = Own(tokenizer_object=byte_tokenizer().backend_tokenizer)
    tokenizer.chat_template = TEMPLATE
    assert ChatTemplate(tokenizer).render_unchecked([[{"role": "user", "content": "HI"}]], header=False) == [
        "<|user|>HI<|end|>\n!"
    ]


def test_templates_are_told_what_transformers_tells_them(monkeypatch: pytest.MonkeyPatch) -> None:
    template = (
        "{{ [bos_token, eos_token, pad_token, tools, documents, add_generation_prompt, messages[0]] }}"
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    )
    tokenizer = byte_tokenizer(template)
    messages = [{"role": "user", "content": "Hi <&"}]
    (text,) = ChatTemplate(tokenizer).render([messages], header=True)
    assert text == tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert "Hi <&" in text


def test_old_objects_are_collected_again_afterwards(tmp_path: Path) -> None:
    frozen = []
    rows = ({**row, "seen": frozen.append(gc.get_freeze_count())} for row in translated_rows(2))
    places = ((f"row {n}", row) for n, row in enumerate(rows))
    with pytest.raises(AttributeError):  # a text is not a location: the error occurred on the way
        Spool.write(parse_rows(places, "en"), tmp_path / "spool")  # type: ignore[arg-type]
    assert min(frozen) > 1000
    assert gc.get_freeze_count() == 0
