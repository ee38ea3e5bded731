"""Turn texts of chats into token ids, many at a time, and each different piece of text only once."""

from __future__ import annotations

import itertools
import re
import string
from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_TRIAL = ("", "x", " x", "x ", "\n", "\n\nX\n", "é", "你好 ", "▁x", "1.", "  ")
"""Texts around a border, to try whether tokens cross it. Tokenizers treat spaces and beginnings specially."""

_MARKS = set(string.punctuation) - {"_"}
"""Characters that are not part of a word."""


class ChatEncoder:
    """Returns the same ids as ``tokenizer(texts, add_special_tokens=False)`` in half the time.

    Texts of chats share many pieces: those that the template writes around messages, and prompts, which are repeated
    for each response. So texts are cut before each of the template's tokens (such as ``<|im_start|>``), and each
    different piece is encoded once. This is exact if the tokenizer searches for these tokens first, in the unchanged
    text, so that no other token crosses one. If it does not, texts are encoded whole.

    Args:
        tokenizer: The tokenizer.
        sample: A rendered chat, which contains the template's tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sample: str) -> None:
        self._tokenizer = tokenizer
        self._backend = _backend(tokenizer)
        self._borders: re.Pattern[str] | None = None
        borders = [] if self._backend is None else [token for token in _borders(self._backend) if token in sample]
        if borders:
            self._borders = re.compile(f"({'|'.join(map(re.escape, borders))})")
        trial = [f"{a}{token}{b}{token}{a}" for token in borders or [""] for a in _TRIAL for b in _TRIAL]
        if self.ids(trial) != self.plain(trial):
            self._backend = None

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each of ``texts``, without special tokens around them."""
        if self._backend is None:
            return self.plain(texts)
        pieces = [self._pieces(text) for text in texts]
        different = list(dict.fromkeys(itertools.chain.from_iterable(pieces)))
        # Earlier calls of the tokenizer may have turned these on.
        self._backend.no_padding()
        self._backend.no_truncation()
        found = self._backend.encode_batch_fast(different, add_special_tokens=False)
        ids = {piece: encoding.ids for piece, encoding in zip(different, found, strict=True)}
        return [list(itertools.chain.from_iterable(map(ids.__getitem__, its))) for its in pieces]

    def _pieces(self, text: str) -> list[str]:
        """Cut ``text`` before each border."""
        if self._borders is None:
            return [text]
        first, *rest = self._borders.split(text)
        return [first, *map(str.__add__, rest[::2], rest[1::2])]

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the same ids from the tokenizer itself."""
        if not texts:
            return []
        ids: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)[
            "input_ids"
        ]
        return ids


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """Return the fast tokenizer inside. None: the tokenizer changes texts itself, or is written in Python."""
    kind = type(tokenizer)
    if (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and kind.__call__ is PreTrainedTokenizerFast.__call__
        and kind._encode_plus is PreTrainedTokenizerFast._encode_plus
        and not tokenizer.split_special_tokens  # which would treat a template's tokens as text
    ):
        return tokenizer.backend_tokenizer
    return None


def _borders(backend: Tokenizer) -> list[str]:
    """Tokens whose text is always this token, whatever text is around it."""
    added = [token for token in backend.get_added_tokens_decoder().values() if token.content]
    raw = [token for token in added if not token.normalized]
    return [token.content for token in raw if _stands_alone(token, raw)]


def _stands_alone(token: AddedToken, others: Sequence[AddedToken]) -> bool:
    text = token.content
    # Some tokens depend on spaces or words next to them, and others may begin with the same characters. A cut would
    # hide that text from them.
    if token.lstrip or token.single_word or text[0] not in _MARKS:
        return False
    begins = tuple(text[:length] for length in range(1, len(text)))
    overlaps = any(other.content.endswith(begins) for other in others)
    return not overlaps and not any(text in other.content for other in others if other.content != text)
