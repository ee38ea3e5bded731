"""Texts of chats to token ids: many at a time, and no piece of text twice."""

from __future__ import annotations

import itertools
import re
import string
from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

_TRIAL = ("", "x", " x", "x ", "\n", "\n\nX\n", "é", "你好 ", "▁x", "1.", "  ")
"""Texts around a border, which show whether tokens reach over it. Spaces and beginnings are what tokenizers change."""

_MARKS = set(string.punctuation) - {"_"}
"""Characters that are no part of a word."""


class ChatEncoder:
    """Gives the ids that ``tokenizer(texts, add_special_tokens=False)`` gives, and takes half as long.

    The texts of chats have much in common: what a template writes around messages, and a prompt that comes again
    before each of its responses. So texts are cut before each of the template's tokens (``<|im_start|>``), and each
    different piece is encoded once. It is exact because a tokenizer looks for those tokens first, in the text as it is
    given, and no other token reaches over one. Where that does not hold, texts are encoded whole.

    Args:
        tokenizer: The tokenizer.
        sample: A chat as the template renders it, which has the template's tokens in it.
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
        """The ids of each of ``texts``, without special tokens around them."""
        if self._backend is None:
            return self.plain(texts)
        pieces = [self._pieces(text) for text in texts]
        different = list(dict.fromkeys(itertools.chain.from_iterable(pieces)))
        # They are set by whoever uses the tokenizer, and stay.
        self._backend.no_padding()
        self._backend.no_truncation()
        found = self._backend.encode_batch_fast(different, add_special_tokens=False)
        ids = {piece: encoding.ids for piece, encoding in zip(different, found, strict=True)}
        return [list(itertools.chain.from_iterable(map(ids.__getitem__, its))) for its in pieces]

    def _pieces(self, text: str) -> list[str]:
        """``text``, cut before each border."""
        if self._borders is None:
            return [text]
        first, *rest = self._borders.split(text)
        return [first, *map(str.__add__, rest[::2], rest[1::2])]

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """The same, from the tokenizer itself."""
        if not texts:
            return []
        ids: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)[
            "input_ids"
        ]
        return ids


def _backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """What ``tokenizer`` encodes with; None if it does anything else to a text, or encodes in Python."""
    kind = type(tokenizer)
    if (
        isinstance(tokenizer, PreTrainedTokenizerFast)
        and kind.__call__ is PreTrainedTokenizerFast.__call__
        and kind._encode_plus is PreTrainedTokenizerFast._encode_plus
        and not tokenizer.split_special_tokens  # a template's tokens are text, then
    ):
        return tokenizer.backend_tokenizer
    return None


def _borders(backend: Tokenizer) -> list[str]:
    """Tokens of which each occurrence in a text is one, whatever is around it."""
    added = [token for token in backend.get_added_tokens_decoder().values() if token.content]
    raw = [token for token in added if not token.normalized]
    return [token.content for token in raw if _stands_alone(token, raw)]


def _stands_alone(token: AddedToken, others: Sequence[AddedToken]) -> bool:
    text = token.content
    # Some tokens take the spaces before or after them, or ask whether a word is there. A cut would hide it from those,
    # and hide from others the beginning of this one.
    if token.lstrip or token.single_word or text[0] not in _MARKS:
        return False
    begins = tuple(text[:length] for length in range(1, len(text)))
    overlaps = any(other.content.endswith(begins) for other in others)
    return not overlaps and not any(text in other.content for other in others if other.content != text)
