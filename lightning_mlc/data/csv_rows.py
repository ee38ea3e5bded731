"""Read the rows of CSV files. Every cell is text, even if it looks like a number, and an empty cell is missing."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from lightning_mlc.data.json_rows import lines
from lightning_mlc.data.records import PAIR, RESPONSES, Place, Row
from lightning_mlc.errors import UserError, shortened

LABELS = {"true": True, "false": False}
"""Meaning of the cells of a column ``label``, in upper or lower case. Other texts stay texts."""
LARGEST_CELL = 2**31 - 1
"""Largest number of characters in a cell. The default limit of the module ``csv`` is too low for long prompts."""


def csv_rows(location: Path, option: str) -> Iterator[tuple[Place, Row]]:
    """Read the rows of a CSV file with a header.

    Rows are numbered from 1; the header and empty lines do not count. Spaces around names are removed. An empty cell is
    None, with one exception: if a row has only one response of a pair, or no single response, the empty cell is an
    empty response. The cells of ``label`` become true or false.

    Args:
        location: The file.
        option: Configuration key or flag of the file, for errors.

    Yields:
        The place of a row, and the row.

    Raises:
        UserError: The file is not UTF-8 or not CSV; a row has more or fewer cells than the header; or the header has a
            name twice, or no name for a column with text.
    """
    csv.field_size_limit(LARGEST_CELL)
    reader = csv.reader(_physical_lines(location, option), strict=True)
    number, names = 0, None
    try:
        for cells in reader:
            if not cells:
                continue
            if names is None:
                names = _header(cells, location, option)
                continue
            number += 1
            where = Place(location.name, number)
            if len(cells) != len(names):
                raise UserError(
                    where,
                    f"has {len(cells)} cells (line {reader.line_num}), but the header has {len(names)}; "
                    "quote cells that contain commas or line breaks",
                )
            yield where, _row(names, cells, where)
    except csv.Error as error:
        raise UserError(
            Place(location.name, number + 1), f'is not CSV ({error}, line {reader.line_num}); quote with " and ""'
        ) from error


def _physical_lines(location: Path, option: str) -> Iterator[str]:
    """Split lines for ``csv.reader``, which needs every line break, even a lone carriage return, at a line's end."""
    for _, line in lines(location, option):
        yield from io.StringIO(line, newline="") if "\r" in line else (line,)


def _header(cells: list[str], location: Path, option: str) -> list[str]:
    names = [name.strip() for name in cells]
    for name in names:
        if name and names.count(name) > 1:
            raise UserError(option, f"{location} has the column '{shortened(name)}' twice; rename or delete one")
    if len(names) == 1 and (separator := next((mark for mark in (";", "\t") if mark in names[0]), None)):
        shown = "tabs" if separator == "\t" else "semicolons"
        raise UserError(option, f"{location} has {shown} between its cells; write it with commas")
    return names


def _row(names: list[str], cells: list[str], where: str) -> Row:
    row: dict[str, str | bool | None] = {}
    for column, (name, cell) in enumerate(zip(names, cells, strict=True), start=1):
        if name:
            row[name] = cell or None
        elif cell and column > 1:  # pandas writes the index as a first column without a name
            raise UserError(where, f"has text in column {column}, which has no name; name it, or delete it")
    label = row.get("label")
    if isinstance(label, str):
        row["label"] = LABELS.get(label.strip().lower(), label)
    return row | _empty_responses(row)


def _empty_responses(row: Row) -> dict[str, str]:
    """Find the empty cell that means an empty response, because every row with a prompt has a response."""
    missing = [key for key in PAIR if key in row and row[key] is None]
    if len(missing) == 1 and all(key in row for key in PAIR):
        return {missing[0]: ""}
    present = [key for key in RESPONSES if key in row]
    if present and all(row[key] is None for key in (*present, *missing)) and all(row.get(key) is None for key in PAIR):
        return {present[0]: ""}
    return {}
