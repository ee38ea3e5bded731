"""Tokenised tables: built once, then kept on disk under a fingerprint of everything that they depend on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from lightning_mlc.data.preparation import Encoder, encode_in_order, processes_for
from lightning_mlc.data.scratch import scratch_folder
from lightning_mlc.data.spool import Spool
from lightning_mlc.data.templates import TemplateProblem
from lightning_mlc.data.tokenised import COLUMNS
from lightning_mlc.data.tokenization import ChatTokenizer
from lightning_mlc.progress.bars import track

FORMAT = 4
"""Raised when the columns of a table, or what they mean, change."""

TABLE = "table.arrow"
"""The file of a table, in its folder."""

logger = logging.getLogger("lightning_mlc")


def default_cache_dir() -> Path:
    """``$LIGHTNING_MLC_CACHE``, or ``lightning_mlc`` in the user's cache folder."""
    if own := os.environ.get("LIGHTNING_MLC_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_mlc"


def tokenised_table(
    spool: Spool,
    languages: tuple[str, ...],
    chat: ChatTokenizer,
    cache_dir: Path,
    num_proc: int | None = None,
    name: str = "data",
    built: Callable[[Spool], None] | None = None,
) -> Dataset:
    """The table of the examples in ``spool``, from the cache if it has it.

    Its rows are :class:`~lightning_mlc.data.tokenised.TokenisedExample`. They stay on disk: the file is mapped into
    memory.

    Args:
        spool: The examples.
        languages: Those to use, the source language first.
        chat: The tokenizer with its chat template and length limits.
        cache_dir: Where tables are kept.
        num_proc: Number of processes that tokenise; None chooses by the number of rows and of cores. The table does
            not depend on it.
        name: Name of the data in progress messages.
        built: Is called with the examples after a table was built, and not if the cache has it.

    Raises:
        UserError: A row cannot be tokenised, or ``cache_dir`` cannot be written to.
    """
    folder = cache_dir / "tokenised" / _fingerprint(spool, languages, chat)
    if folder.is_dir():
        try:
            return _load(folder, spool.rows)
        except Exception:  # whatever is wrong with it, a table can be built again
            logger.warning("the cache %s cannot be read and is built again", folder)
            shutil.rmtree(folder, ignore_errors=True)
    with scratch_folder(folder.parent, "unfinished") as unfinished:
        _write(unfinished / TABLE, spool, Encoder(chat, languages, COLUMNS.arrow_schema), num_proc, name)
        # Once complete: neither a second process nor an interrupt leaves half a table.
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    if built is not None:
        built(spool)
    return _load(folder, spool.rows)


def _write(path: Path, spool: Spool, encoder: Encoder, num_proc: int | None, name: str) -> None:
    with (
        pyarrow.OSFile(str(path), "wb") as file,
        pyarrow.ipc.new_stream(file, encoder.schema) as writer,
        track(f"tokenising {name}", spool.rows, "rows") as work,
    ):
        for batch in encode_in_order(encoder, spool.read(), processes_for(spool.rows, num_proc)):
            writer.write_batch(batch)
            work.advance(len(batch))


def _load(folder: Path, rows: int) -> Dataset:
    table = Dataset.from_file(str(folder / TABLE))
    if len(table) != rows or table.features != COLUMNS:
        raise ValueError(f"{len(table)} rows")
    return table


def table_fingerprint(table: Dataset) -> str:
    """The fingerprint of a table of :func:`tokenised_table`: of everything that it depends on."""
    return Path(table.cache_files[0]["filename"]).parent.name


def _fingerprint(spool: Spool, languages: tuple[str, ...], chat: ChatTokenizer) -> str:
    settings = [FORMAT, languages, chat.max_prompt_length, chat.max_response_length, chat.on_long_prompt]
    parts = [*settings, _tokenizer_state(chat), spool.digest]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _tokenizer_state(chat: ChatTokenizer) -> list[Any]:
    tokenizer = chat.tokenizer
    # The last one is an option of tokenizer_config.json that the file of the vocabulary does not have.
    return [
        _vocabulary(tokenizer),
        tokenizer.chat_template,
        chat.end,
        _rendered(chat),
        bool(tokenizer.split_special_tokens),
    ]


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())


def _rendered(chat: ChatTokenizer) -> str:
    """A rendered conversation. It may depend on more than the template's text, such as a library's version."""
    messages = [{"role": "user", "content": "prompt"}]
    try:
        return chat.template.render([messages], header=True)[0]
    except TemplateProblem as problem:
        return problem.told("it")
