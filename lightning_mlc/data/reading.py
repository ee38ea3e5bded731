"""Rows of a data source, each with where it stands. JSON is read by hand, to name the row that is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from lightning_mlc.data.layouts import Row
from lightning_mlc.errors import UserError

SAMPLE = "sample"
"""``train_path: sample`` is the data that ships with the package."""
HUB = "hf://"
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def locate(path: str, option: str) -> Path | None:
    """The file or folder that ``path`` names; None for a dataset on the hub.

    Raises:
        UserError: There is none, or it is of no known kind. The message starts with ``option``.
    """
    if path.startswith(HUB):
        return None
    if path == SAMPLE and not Path(path).exists():
        return Path(str(files("lightning_mlc.data") / "sample" / "sample.jsonl"))
    location = Path(path).expanduser()
    if not location.exists():
        raise UserError(
            option,
            f"there is no file {path}; give a file, a folder of datasets.save_to_disk, {HUB}owner/name, or '{SAMPLE}'",
        )
    if location.is_file():
        if location.suffix.lower() not in SUFFIXES:
            raise UserError(option, f"cannot read {path}; supported are {', '.join(SUFFIXES)} and saved datasets")
        if location.stat().st_size == 0:
            raise UserError(option, f"{path} is empty")
    return location


def read_rows(path: str, option: str) -> Iterator[tuple[str, Row]]:
    """Each row of ``path`` after where it stands (``train.jsonl row 3``, counted from 1).

    Raises:
        UserError: The source or one of its rows cannot be read.
    """
    location = locate(path, option)
    if location is None:
        yield from _hub_rows(path, option)
    elif location.is_dir():
        yield from _saved_rows(location, option)
    elif location.suffix.lower() == ".jsonl":
        yield from _json_lines(location, option)
    elif location.suffix.lower() == ".json":
        yield from _json_array(location, option)
    else:
        yield from _table_rows(location, option)


def _read_text(location: Path, option: str) -> str:
    try:
        return location.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(option, f"{location} is not UTF-8 (byte {error.start}); convert it") from error


def _json_lines(location: Path, option: str) -> Iterator[tuple[str, Row]]:
    # Not str.splitlines: U+2028 and its like end no line of JSON.
    for number, line in enumerate(_read_text(location, option).split("\n"), start=1):
        if line.strip():
            where = f"{location.name} row {number}"
            yield where, _json_object(line, where)


def _json_array(location: Path, option: str) -> Iterator[tuple[str, Row]]:
    text = _read_text(location, option)
    try:
        rows = json.loads(text, object_pairs_hook=_Pairs)
    except json.JSONDecodeError as error:
        raise UserError(option, f"{location} line {error.lineno} is not JSON ({error.msg})") from error
    if not isinstance(rows, list) or isinstance(rows, _Pairs):
        raise UserError(option, f"{location} must be a JSON array of objects; for one object a line use .jsonl")
    for number, row in enumerate(rows, start=1):
        where = f"{location.name} row {number}"
        yield where, _as_object(row, where)


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with its keys as written, repeated ones included."""


def _json_object(line: str, where: str) -> Row:
    try:
        parsed = json.loads(line, object_pairs_hook=_Pairs)
    except json.JSONDecodeError as error:
        raise UserError(where, f"is not JSON ({error.msg} at column {error.colno})") from error
    return _as_object(parsed, where)


def _as_object(parsed: Any, where: str) -> Row:
    if not isinstance(parsed, _Pairs):
        raise UserError(where, "is not a JSON object")
    row: Row = _as_mapping(parsed, where)
    return row


def _as_mapping(value: Any, where: str) -> Any:
    if isinstance(value, _Pairs):
        keys = [key for key, _ in value]
        for key in keys:
            if keys.count(key) > 1:
                raise UserError(where, f"has the key '{key}' twice")
        return {key: _as_mapping(item, where) for key, item in value}
    if isinstance(value, list):
        return [_as_mapping(item, where) for item in value]
    return value


def _table_rows(location: Path, option: str) -> Iterator[tuple[str, Row]]:
    from datasets import load_dataset

    try:
        kind = location.suffix.lower().removeprefix(".")
        table = load_dataset(kind, data_files=str(location), split="train")
    except Exception as error:  # `datasets` raises its own, pyarrow's and pandas' errors alike
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise UserError(option, f"cannot read {location} ({reason})") from error
    yield from _dataset_rows(table, location.name)


def _saved_rows(location: Path, option: str) -> Iterator[tuple[str, Row]]:
    from datasets import DatasetDict, load_from_disk

    try:
        table = load_from_disk(str(location))
    except FileNotFoundError as error:
        raise UserError(option, f"{location} is not a folder that datasets.save_to_disk wrote") from error
    if isinstance(table, DatasetDict):
        if "train" not in table:
            raise UserError(option, f"{location} has no split 'train', only {', '.join(table)}; give one's folder")
        table = table["train"]
    yield from _dataset_rows(table, location.name)


def _hub_rows(path: str, option: str) -> Iterator[tuple[str, Row]]:
    from datasets import load_dataset

    parts = urlsplit(path)
    query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
    name = f"{parts.netloc}{parts.path}".strip("/")
    unknown = query.keys() - {"split", "name", "revision"}
    if unknown or name.count("/") != 1:
        raise UserError(option, f"write {HUB}owner/name?split=train&name=CONFIG&revision=SHA, got {path}")
    try:
        table = load_dataset(
            name, name=query.get("name"), split=query.get("split", "train"), revision=query.get("revision")
        )
    except Exception as error:  # the hub's, the network's and the builder's errors alike
        raise UserError(option, f"cannot load {path} ({str(error).strip().splitlines()[0]})") from error
    yield from _dataset_rows(table, name)


def _dataset_rows(table: Any, name: str) -> Iterator[tuple[str, Row]]:
    for number, row in enumerate(table, start=1):
        # CSV readers turn an empty cell into NaN or None: both mean that there is no text.
        cells = {key: None if isinstance(cell, float) and math.isnan(cell) else cell for key, cell in row.items()}
        yield f"{name} row {number}", cells
