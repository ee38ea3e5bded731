"""Write rows as JSON Lines, whatever format they were read from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from datetime import date, time
from typing import Any

from lightning_mlc.data.file_layouts import has_half_a_character
from lightning_mlc.errors import UserError, shortened


def json_line(row: Mapping[str, Any], where: str) -> bytes:
    """A row as a line of a JSON Lines file, with its line break. Dates and times become text (ISO 8601).

    Args:
        row: The row.
        where: Its place, for errors.

    Raises:
        UserError: A column has a value that JSON has no form for, such as bytes. The error names the column.
    """
    plain = {key: _plain(value, key, where) for key, value in row.items()}
    line = json.dumps(plain, ensure_ascii=False)
    if has_half_a_character(line):  # such as in a response; only in ASCII is there a form for it
        line = json.dumps(plain)
    return line.encode() + b"\n"


def _plain(value: Any, column: str, where: str) -> Any:
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {str(key): _plain(part, column, where) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part, column, where) for part in value]
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    kind = str(value) if isinstance(value, float) else f"a value of the type {type(value).__name__}"
    raise UserError(
        where, f"the column '{shortened(column)}' has {kind}, which JSON has no form for; remove the column"
    )
