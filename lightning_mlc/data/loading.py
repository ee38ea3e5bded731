"""From data files to tokenised tables."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset

from lightning_mlc.data.file_layouts import parse_rows
from lightning_mlc.data.reading import HUB, locate, read_several
from lightning_mlc.data.records import KIND_NAMES, DataKind
from lightning_mlc.data.remarks import warn_of_cut_texts, warn_of_empty_responses
from lightning_mlc.data.scratch import scratch_folder
from lightning_mlc.data.spool import Spool
from lightning_mlc.data.tables import tokenised_table
from lightning_mlc.data.tokenization import ChatTokenizer
from lightning_mlc.errors import UserError


@dataclass(frozen=True)
class TableLoader:
    """Reads, checks and tokenises data files.

    Args:
        source_language: BCP-47 code of the language of the responses.
        languages: Codes to use, the source language among them; None takes all that the first split has.
        tokenizer: Gives the tokenizer. It is called once all files have been read without a mistake.
        cache_dir: Folder of the tokenised tables.
        num_proc: Number of processes that tokenise; None chooses.
        inspect: Is called with the paths and the examples of each table that is built, and not for those of the cache.
    """

    source_language: str
    languages: tuple[str, ...] | None
    tokenizer: Callable[[], ChatTokenizer]
    cache_dir: Path
    num_proc: int | None
    inspect: Callable[[Sequence[str], Spool], None] | None = None

    def load(
        self, paths: Mapping[str, Sequence[str]], chosen: tuple[str, ...], kind: DataKind
    ) -> tuple[dict[str, Dataset], tuple[str, ...], DataKind]:
        """The tables of ``paths`` by split, their languages (the source language first) and their kind.

        Args:
            paths: Files of each split.
            chosen: Languages of the tables that were loaded before; empty before the first.
            kind: Kind of their responses.

        Raises:
            UserError: A file does not exist, cannot be read or tokenised, or does not go together with the others.
        """
        for split, of_split in paths.items():
            for path in of_split:
                locate(path, f"data.{split}_path")
        with scratch_folder(self.cache_dir, "reading") as folder:
            spools = {split: self._read(split, of_split, folder / split) for split, of_split in paths.items()}
            first = next(iter(spools.values()))
            if not chosen:
                chosen, kind = self._choose_languages(first.languages), first.kind
            for split, spool in spools.items():
                if spool.kind != kind:
                    raise UserError(
                        f"data.{split}_path",
                        f"{named(paths[split])} has {KIND_NAMES[spool.kind]}, the other data {KIND_NAMES[kind]}; "
                        "give data of one kind",
                    )
            chat = self.tokenizer()
            tables = {}
            for split, spool in spools.items():
                built = None if self.inspect is None else partial(self.inspect, paths[split])
                names = ", ".join(map(short_name, paths[split]))
                table = tables[split] = tokenised_table(
                    spool, chosen, chat, self.cache_dir, self.num_proc, names, built
                )
                warn_of_empty_responses(table)
                warn_of_cut_texts(table, chat.max_prompt_length, chat.max_response_length)
        return tables, chosen, kind

    def _read(self, split: str, paths: Sequence[str], spool: Path) -> Spool:
        rows = read_several(paths, f"data.{split}_path")
        return Spool.write(parse_rows(rows, self.source_language), spool)

    def _choose_languages(self, found: Collection[str]) -> tuple[str, ...]:
        for language in self.languages or ():
            if language not in found:
                raise UserError("data.languages", f"no row has a prompt in '{language}' (found: {', '.join(found)})")
        others = [code for code in self.languages or found if code != self.source_language]
        return (self.source_language, *others)


def by_split(**given: str | list[str] | None) -> dict[str, tuple[str, ...]]:
    """The paths of each split, from options that take one path or several. A split that is not set has none.

    Raises:
        UserError: An option is neither a path nor a list of paths, or names a file twice.
    """
    return {split: _paths(f"data.{split}_path", paths) for split, paths in given.items()}


def _paths(option: str, given: Any) -> tuple[str, ...]:
    if given is None:
        return ()
    each = [given] if isinstance(given, str | os.PathLike) else given
    if not isinstance(each, list | tuple) or not all(path and isinstance(path, str | os.PathLike) for path in each):
        raise UserError(option, f"must be a path, a list of paths or null, got {given!r}")
    if not each:
        raise UserError(option, "is an empty list; name a file, or give null")
    found = tuple(os.fspath(path) for path in each)
    # A file has many names, such as a.jsonl and ./a.jsonl.
    files = [os.path.realpath(path) if os.path.exists(path) else path for path in found]
    for path, file in zip(found, files, strict=True):
        if files.count(file) > 1:
            raise UserError(option, f"names {path} twice")
    return found


def short_name(path: str) -> str:
    """A path without its folders; a data set on the hub keeps its whole name."""
    return path if path.startswith(HUB) else Path(path).name


def named(paths: Sequence[str]) -> str:
    """The paths, for messages."""
    return ", ".join(paths)
