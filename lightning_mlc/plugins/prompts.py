"""Prompts in several languages, tokenised, and which of them an optimizer step uses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from lightning_mlc.data.file_layouts import prompts_of_rows
from lightning_mlc.data.languages import canonical_language, canonical_languages
from lightning_mlc.data.reading import read_rows
from lightning_mlc.data.records import Message, Place
from lightning_mlc.data.rows import NO_RESPONSE, TokenSequence
from lightning_mlc.data.tokenization import ChatTokenizer
from lightning_mlc.errors import UserError, renamed
from lightning_mlc.progress.bars import track

if TYPE_CHECKING:
    from datasets import Dataset

AT_ONCE = 64
"""Number of rows that are rendered and encoded together."""
MANY = 2000
"""From this number of rows on, tokenising takes seconds and shows its progress."""

Conversations = dict[str, list[Message]]
"""A prompt as messages, by language."""


class PromptRows(NamedTuple):
    """Prompts that exist in two or more languages, before they are tokenised."""

    languages: tuple[str, ...]
    """The languages, the source language first."""
    groups: list[tuple[Place, Conversations]]
    """Each prompt in all of its languages, and its place."""
    left_out: int
    """Number of prompts that exist in one of the languages only."""


def read_prompts(
    prompts: str | Path | Dataset | Sequence[Mapping[str, Any]],
    languages: Sequence[str] | None = None,
    source_language: str = "en",
) -> PromptRows:
    """Read prompts without a tokenizer. Arguments are those of :class:`PromptGroups`.

    Raises:
        UserError: A row cannot be read, a language does not exist, or no prompt exists in two languages.
    """
    source = canonical_language(source_language, "source_language")
    name = str(prompts) if isinstance(prompts, str | Path) else "prompts"
    rows = list(_conversations(prompts, source))
    if not any(row for _, row in rows):
        raise UserError(name, "has no prompts; give at least one prompt in two languages")
    chosen = _chosen(languages, source, rows)
    ordered = [(where, {code: row[code] for code in chosen if code in row}) for where, row in rows]
    groups = [(where, row) for where, row in ordered if len(row) >= 2]
    if not groups and len(chosen) == 1:
        raise UserError(
            name,
            f"has prompts in '{chosen[0]}' alone; add translations, such as columns prompt_en and prompt_sw "
            "(`lightning-mlc translate` makes them)",
        )
    if not groups:
        raise UserError(
            name,
            f"has no prompt in two or more of the languages {', '.join(chosen)}; give prompts with translations, such "
            "as columns prompt_en and prompt_sw",
        )
    return PromptRows(chosen, groups, len(rows) - len(groups))


class PromptGroups:
    """Prompts that exist in two or more languages, as token ids. A group is one prompt in all of its languages.

    Args:
        prompts: A file in any layout that training reads (:mod:`lightning_mlc.data.file_layouts`), a
            ``datasets.Dataset`` with the same columns (``prompt`` and ``prompt_sw``, ..., or ``translations``), or a
            list of such rows, such as ``[{"en": "...", "sw": "..."}]``. Responses are not read.
        tokenizer: The tokenizer of the model, with a chat template.
        languages: BCP-47 codes of the languages to use. None: all.
        source_language: BCP-47 code of the column ``prompt``.
        max_prompt_length: Longest prompt in tokens, the chat template included. A longer one is cut at the end of
            the user's last message.

    Raises:
        UserError: A row cannot be read or rendered, or no prompt exists in two languages.
    """

    languages: tuple[str, ...]
    """The languages, the source language first."""
    left_out: int
    """Number of prompts that exist in one of the languages only."""

    def __init__(
        self,
        prompts: str | Path | Dataset | Sequence[Mapping[str, Any]],
        tokenizer: PreTrainedTokenizerBase,
        languages: Sequence[str] | None = None,
        source_language: str = "en",
        max_prompt_length: int = 512,
    ) -> None:
        with renamed(("model.name_or_path",), "tokenizer"):
            chat = ChatTokenizer(tokenizer, max_prompt_length, 1, "cut")
        self.languages, groups, self.left_out = read_prompts(prompts, languages, source_language)
        # Flat arrays, because a Python list of token ids takes 36 bytes for each token.
        ids = _tokenised(groups, chat)
        self._ids = np.concatenate(ids)
        self._ends = np.cumsum([0, *map(len, ids)])
        self._language = np.array([self.languages.index(code) for _, row in groups for code in row], np.int32)
        self._first = np.cumsum([0, *(len(row) for _, row in groups)])

    def __len__(self) -> int:
        return len(self._first) - 1

    @property
    def longest(self) -> int:
        """Number of tokens of the longest prompt."""
        return int(np.diff(self._ends).max())

    @property
    def highest_token(self) -> int:
        """Highest token id."""
        return int(self._ids.max())

    def sequences(self, groups: Sequence[int]) -> list[TokenSequence]:
        """Return the prompts of some groups in all of their languages.

        Args:
            groups: Indices of groups. ``TokenSequence.example`` is the place in this list.
        """
        return [
            TokenSequence(
                self._ids[self._ends[row] : self._ends[row + 1]].tolist(),
                (),
                place,
                int(self._language[row]),
                NO_RESPONSE,
            )
            for place, group in enumerate(groups)
            for row in range(self._first[group], self._first[group + 1])
        ]


def prompts_of_step(count: int, per_step: int, seed: int, step: int) -> list[int]:
    """Return the prompts of an optimizer step, as indices from 0 to ``count - 1``.

    Steps take them in turn from shuffled epochs, one after the other. So they follow from the arguments alone, and a
    resumed run needs to know nothing else.

    Args:
        count: Number of prompts.
        per_step: Number of prompts of a step, of all processes and micro-batches together.
        seed: Seed of the shuffle.
        step: Number of the optimizer step, from 0.
    """
    places = range(step * per_step, (step + 1) * per_step)
    return [int(_epoch(count, seed, place // count)[place % count]) for place in places]


@lru_cache(maxsize=4)
def _epoch(count: int, seed: int, epoch: int) -> np.ndarray:
    # The same order as that of training examples (lightning_mlc.data.windows).
    return np.random.default_rng([seed, epoch]).permutation(count)


def share_of(step: Sequence[int], part: int, parts: int) -> list[int]:
    """Return one of ``parts`` shares of a step, which differ by at most one prompt."""
    return list(step[part * len(step) // parts : (part + 1) * len(step) // parts])


def _conversations(
    prompts: str | Path | Dataset | Iterable[Mapping[str, Any]], source: str
) -> Iterator[tuple[Place, Conversations]]:
    """Generate the place and the conversations of each row."""
    rows = read_rows(str(prompts), "prompts") if isinstance(prompts, str | Path) else _rows(prompts)
    with renamed(("data.source_language",), "source_language"):
        for where, _, found in prompts_of_rows(rows, source):
            yield where, found


def _rows(prompts: Iterable[Any]) -> Iterator[tuple[Place, Mapping[str, Any]]]:
    if isinstance(prompts, Mapping) or not isinstance(prompts, Iterable):  # a DatasetDict is a mapping of splits
        raise UserError("prompts", f"must be a file, a data set or a list of rows, got {type(prompts).__name__}")
    for number, row in enumerate(prompts, start=1):
        where = Place("prompts", number)
        if not isinstance(row, Mapping):
            raise UserError(where, f"must be a mapping such as {{'en': ..., 'sw': ...}}, got {type(row).__name__}")
        yield where, row


def _chosen(
    languages: Sequence[str] | None, source: str, rows: Sequence[tuple[Place, Conversations]]
) -> tuple[str, ...]:
    """Return the languages to use, the source language first if it is one of them."""
    found = dict.fromkeys(code for _, row in rows for code in row)
    if languages is None:
        return tuple(sorted(found, key=lambda code: code != source))
    if isinstance(languages, str):
        raise UserError("languages", f"must be a list such as [en, sw], got '{languages}'")
    wanted = canonical_languages(languages, "languages")
    if len(wanted) < 2:
        given = ", ".join(wanted) or "none"
        raise UserError("languages", f"must be two or more, because the loss compares them; got {given}")
    for code in wanted:
        if code not in found:
            raise UserError("languages", f"no row has a prompt in '{code}' (found: {', '.join(found) or 'none'})")
    return tuple(sorted(wanted, key=lambda code: code != source))


def _tokenised(groups: Sequence[tuple[Place, Conversations]], chat: ChatTokenizer) -> list[np.ndarray]:
    """Return the token ids of all prompts, group by group."""
    found: list[np.ndarray] = []
    with track("tokenising prompts", len(groups), "prompts", shown=len(groups) >= MANY) as work:
        for start in range(0, len(groups), AT_ONCE):
            batch = groups[start : start + AT_ONCE]
            asked = [(messages, f"{where} ({code})") for where, row in batch for code, messages in row.items()]
            found += [np.array(ids, np.int32) for ids, _ in chat.prompts(asked)]
            work.advance(len(batch))
    return found
