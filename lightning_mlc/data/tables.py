"""Tokenised tables: built once, kept on disk under a fingerprint of all that they depend on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Sequence, Value, disable_progress_bars, enable_progress_bars, load_from_disk
from transformers import PreTrainedTokenizerBase

from lightning_mlc.data.records import Example
from lightning_mlc.data.tokenization import ChatTokenizer
from lightning_mlc.models.turns import end_of_turn

FORMAT = 2
"""Raised when the columns of a table, or what they mean, change."""

_IDS = Sequence(Value("int64"))
COLUMNS = Features(
    {
        "id": Value("string"),
        "where": Value("string"),
        "languages": _IDS,
        "prompts": Sequence(_IDS),
        "chosen": _IDS,
        "rejected": _IDS,
        "translated": _IDS,
        "translated_chosen": Sequence(_IDS),
        "translated_rejected": Sequence(_IDS),
        "cut_prompts": Sequence(Value("string")),
        "cut_response": Value("bool"),
    }
)
"""Types of the columns. Not inferred: a column may be empty in all of the first rows."""

logger = logging.getLogger("lightning_mlc")


def default_cache_dir() -> Path:
    """``$LIGHTNING_MLC_CACHE``, or ``lightning_mlc`` in the user's cache folder."""
    if own := os.environ.get("LIGHTNING_MLC_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_mlc"


def tokenised_table(
    examples: list[Example], languages: tuple[str, ...], chat: ChatTokenizer, cache_dir: Path, name: str
) -> Dataset:
    """The table of ``examples``, from the cache if it is there.

    Columns: ``id``, ``where``, ``languages`` (indices), ``prompts`` (ids for each), ``chosen`` and
    ``rejected`` (empty where there is none), ``translated`` (indices of the languages with responses of their own),
    ``translated_chosen`` and ``translated_rejected`` (ids for each), ``cut_prompts``, ``cut_response``.
    """
    folder = cache_dir / "tokenised" / _fingerprint(examples, languages, chat)
    if folder.is_dir():
        try:
            return load_from_disk(str(folder))
        except Exception:  # whatever is wrong with a cache, it can be built again
            logger.warning("the cache %s cannot be read and is built again", folder)
            shutil.rmtree(folder, ignore_errors=True)
    source = Dataset.from_dict({"index": list(range(len(examples)))})
    # The function closes over examples that `datasets` cannot hash; our own fingerprint stands for them.
    table = source.map(
        lambda row: chat.encode(examples[row["index"]], languages),
        remove_columns=["index"],
        features=COLUMNS,
        desc=f"Tokenising {name}",
        new_fingerprint=folder.name,
        load_from_cache_file=False,
        keep_in_memory=True,
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Renamed into place once complete: neither a second process nor an interrupt leaves half a table.
    unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder.parent))
    try:
        disable_progress_bars()  # one bar is enough
        table.save_to_disk(str(unfinished))
        unfinished.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster
            raise
    finally:
        enable_progress_bars()
        shutil.rmtree(unfinished, ignore_errors=True)
    return load_from_disk(str(folder))


def table_fingerprint(table: Dataset) -> str:
    """The fingerprint of all that ``table``, as :func:`tokenised_table` returns it, depends on."""
    return Path(table.cache_files[0]["filename"]).parent.name


def _fingerprint(examples: list[Example], languages: tuple[str, ...], chat: ChatTokenizer) -> str:
    digest = hashlib.sha256()
    settings = [FORMAT, languages, chat.max_prompt_length, chat.max_response_length, chat.on_long_prompt]
    digest.update(json.dumps([*settings, _tokenizer_state(chat.tokenizer)]).encode())
    for example in examples:
        digest.update(json.dumps(asdict(example), sort_keys=True).encode())
    return digest.hexdigest()[:32]


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> Any:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return [vocabulary, tokenizer.chat_template, end_of_turn(tokenizer)]
