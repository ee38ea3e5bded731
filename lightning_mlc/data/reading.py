"""Read the rows of a data source, each with its place. Rows are read one by one, so a file may exceed the memory."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from lightning_mlc.data.csv_rows import csv_rows
from lightning_mlc.data.json_rows import json_array, json_lines
from lightning_mlc.data.records import Place, Row
from lightning_mlc.errors import UserError, first_line
from lightning_mlc.files.paths import expanded

if TYPE_CHECKING:
    from datasets import Dataset

SAMPLE = "sample"
"""``train_path: sample`` means the data that comes with this package."""
HUB = "hf://"
BATCH = 256
"""Number of rows of a Parquet file that are read at a time."""


def locate(path: str, option: str) -> Path | None:
    """Find the file or folder of a data source.

    Args:
        path: The path as the user wrote it. It is not a pattern.
        option: Configuration key or flag of the path, for errors.

    Returns:
        The file or folder. None: a data set on the hub.

    Raises:
        UserError: The file does not exist, cannot be read, or has an unknown format.
    """
    if path.startswith(HUB):
        return None
    if path == SAMPLE and not Path(path).exists():
        return Path(str(files("lightning_mlc.data") / "sample" / "sample.jsonl"))
    location = Path(expanded(path, option))
    if not location.exists():
        raise UserError(
            option,
            f"there is no file {path}; give a file, a folder of datasets.save_to_disk, {HUB}owner/name, or '{SAMPLE}'",
        )
    if not os.access(location, os.R_OK):
        raise UserError(option, f"no permission to read {path}; change its permissions")
    if location.is_dir():
        return location
    if location.suffix.lower() not in READERS:
        raise UserError(option, f"cannot read {path}; supported are {', '.join(READERS)} and saved datasets")
    if location.is_file() and location.stat().st_size == 0:
        raise UserError(option, f"{path} is empty")
    return location


def read_rows(path: str, option: str) -> Iterator[tuple[Place, Row]]:
    """Read the rows of a data source one by one. Memory holds one row and a few megabytes of a file.

    Args:
        path: A file, a folder of ``datasets.save_to_disk``, ``hf://owner/name`` or ``sample``.
        option: Configuration key or flag of the path, for errors.

    Yields:
        The place of a row (``train.jsonl row 3``, counted from 1), and the row.

    Raises:
        UserError: The source or one of its rows cannot be read, or it has no row.
    """
    is_empty = True
    for row in _rows(path, option):
        is_empty = False
        yield row
    if is_empty:
        raise UserError(option, f"{path} has no rows; give data with at least one")


def read_several(paths: Sequence[str], option: str) -> Iterator[tuple[Place, Row]]:
    """Read the rows of one or several data sources, one source after the other, as :func:`read_rows` does.

    Sources with the same name are told apart by their paths in the places of their rows.

    Args:
        paths: The sources.
        option: Configuration key of the paths, for errors.
    """
    names = [_name_in_places(path, option) for path in paths]
    for path, name in zip(paths, names, strict=True):
        for place, row in read_rows(path, option):
            yield place if names.count(name) == 1 else Place(path, place.number), row


def _name_in_places(path: str, option: str) -> str:
    """What :func:`read_rows` calls the source in the places of its rows."""
    location = locate(path, option)
    return _hub_name(path) if location is None else location.name


def _hub_name(path: str) -> str:
    parts = urlsplit(path)
    return f"{parts.netloc}{parts.path}".strip("/")


def _rows(path: str, option: str) -> Iterator[tuple[Place, Row]]:
    location = locate(path, option)
    if location is None:
        return _hub_rows(path, option)
    if location.is_dir():
        return _saved_rows(location, option)
    return READERS[location.suffix.lower()](location, option)


def _parquet_rows(location: Path, option: str) -> Iterator[tuple[Place, Row]]:
    # Not `load_dataset`, because it treats a name as a pattern and copies the file into a cache.
    import pyarrow
    from datasets import Dataset
    from datasets.table import InMemoryTable
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(location) as file:
            for batch in file.iter_batches(BATCH):
                table = Dataset(InMemoryTable(pyarrow.Table.from_batches([batch])))
                for row in table:
                    number += 1
                    yield Place(location.name, number), _without_nan(row)
    except (pyarrow.ArrowException, OSError, ValueError, NotImplementedError) as error:
        where = option if number == 0 else f"{location.name} row {number + 1}"
        raise UserError(where, f"cannot read {location} ({first_line(error)})") from error


READERS: dict[str, Callable[[Path, str], Iterator[tuple[Place, Row]]]] = {
    ".jsonl": json_lines,
    ".json": json_array,
    ".csv": csv_rows,
    ".parquet": _parquet_rows,
}
"""What reads a file, by the end of its name."""


def _saved_rows(location: Path, option: str) -> Iterator[tuple[Place, Row]]:
    from datasets import DatasetDict, load_from_disk

    try:
        table = load_from_disk(str(location))
    except FileNotFoundError as error:
        raise UserError(option, f"{location} is not a folder that datasets.save_to_disk wrote") from error
    if isinstance(table, DatasetDict):
        if "train" not in table:
            raise UserError(
                option, f"{location} has no split 'train', only {', '.join(table)}; give the folder of one split"
            )
        table = table["train"]
    yield from _dataset_rows(table, location.name)


def _hub_rows(path: str, option: str) -> Iterator[tuple[Place, Row]]:
    from datasets import load_dataset

    parts = urlsplit(path)
    # A plus joins splits here. In a URL's query it would mean a space.
    given = parse_qs(parts.query.replace("+", "%2B"), keep_blank_values=True)
    query = {key: values[0] for key, values in given.items() if len(values) == 1 and values[0]}
    name = _hub_name(path)
    wrong = given.keys() - {"split", "name", "revision"} or given.keys() - query.keys()
    if wrong or name.count("/") != 1 or parts.fragment:
        raise UserError(option, f"write {HUB}owner/name?split=train&name=CONFIG&revision=SHA, got {path}")
    try:
        table = load_dataset(
            name, name=query.get("name"), split=query.get("split", "train"), revision=query.get("revision")
        )
    except Exception as error:  # errors of the hub, the network and the builder have no common base
        raise UserError(option, f"cannot load {path} ({first_line(error)})") from error
    yield from _dataset_rows(table, name)


def _dataset_rows(table: Dataset, name: str) -> Iterator[tuple[Place, Row]]:
    for number, row in enumerate(table, start=1):
        yield Place(name, number), _without_nan(row)


def _without_nan(row: dict[str, Any]) -> Row:
    """Replace NaN by None, because pandas writes NaN for a missing text."""
    return {key: None if isinstance(cell, float) and math.isnan(cell) else cell for key, cell in row.items()}
