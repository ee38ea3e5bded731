"""Read the rows of JSON files one by one: JSON Lines, and arrays of objects. Errors name the row."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator
from json.decoder import scanstring  # type: ignore[attr-defined]
from pathlib import Path
from typing import Any, BinaryIO

from lightning_mlc.data.records import Place, Row
from lightning_mlc.errors import UserError, shortened

CHUNK = 1 << 20
"""Number of bytes of an array that are read at a time."""
_SPACE = " \t\r\n"
_VALUES = '"[-0123456789tfnNI'
"""First characters of JSON values other than objects."""
_NEAR = 16
"""An error within this many characters of the end of the text may vanish when more of the file is read."""


class _Refused(ValueError):
    """A value that a row must not have. The message continues a sentence that begins with the row."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in found if keys.count(key) > 1)
        raise _Refused(f"has the key '{shortened(twice)}' twice")
    return found


def _constant(name: str) -> None:
    raise _Refused(f"has {name}, which is not JSON; write null for a missing value")


def _integer(digits: str) -> int:
    try:
        return int(digits)
    except ValueError as error:  # Python limits the digits of a number
        raise _Refused(f"has a number of {len(digits)} digits; write it as a string, in quotes") from error


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_int=_integer)


def lines(location: Path, option: str) -> Iterator[tuple[int, str]]:
    """Read the lines of a text file.

    Args:
        location: The file.
        option: Configuration key or flag of the file, for errors.

    Yields:
        The position of the line's first byte, and the line with its line break and without a byte-order mark.

    Raises:
        UserError: The file is not UTF-8.
    """
    begin = 0
    with location.open("rb") as file:
        for line in file:  # only line feeds end a line, not U+2028 or similar
            mark = len(codecs.BOM_UTF8) if begin == 0 and line.startswith(codecs.BOM_UTF8) else 0
            try:
                yield begin, line[mark:].decode("utf-8")
            except UnicodeDecodeError as error:
                raise _not_utf8(location, option, begin + mark + error.start) from error
            begin += len(line)


def _not_utf8(location: Path, option: str, byte: int) -> UserError:
    return UserError(option, f"{location} is not UTF-8 (byte {byte}); convert it")


def json_lines(location: Path, option: str) -> Iterator[tuple[Place, Row]]:
    """Read the rows of a JSON Lines file. Empty lines are skipped, but they count for the numbers of rows.

    Args:
        location: The file.
        option: Configuration key or flag of the file, for errors.

    Yields:
        The place of a row, and the row.

    Raises:
        UserError: A line is not UTF-8, not a JSON object, or has a value that a row must not have.
    """
    for number, (_, line) in enumerate(lines(location, option), start=1):
        if not line.strip():
            continue
        where = Place(location.name, number)
        row = _guarded(where, _DECODER.decode, line.strip(_SPACE), lambda error: f"column {error.colno}")
        if not isinstance(row, dict):
            raise UserError(where, "is not a JSON object")
        yield where, row


def _guarded(where: str, decode: Callable[[str], Any], text: str, place: Callable[[json.JSONDecodeError], str]) -> Any:
    try:
        return decode(text)
    except json.JSONDecodeError as error:
        raise UserError(where, f"is not JSON ({error.msg} at {place(error)})") from error
    except _Refused as error:
        raise UserError(where, str(error)) from error
    except RecursionError as error:
        raise UserError(where, "is nested too deeply; write its texts as strings or lists of messages") from error


def json_array(location: Path, option: str) -> Iterator[tuple[Place, Row]]:
    """Read the rows of a JSON file that contains an array of objects. Memory holds one row and one chunk of the file.

    Args:
        location: The file.
        option: Configuration key or flag of the file, for errors.

    Yields:
        The place of a row, and the row.

    Raises:
        UserError: The file is not UTF-8 or not an array; or an element is not a JSON object, or has a value that a
            row must not have.
    """
    with location.open("rb") as file:
        text = _Window(file, location, option)
        if text.next_character() != "[":
            raise UserError(option, f"{location} must be a JSON array of objects; for one object per line use .jsonl")
        text.skip()
        number = 0
        while text.next_character() != "]" or number:
            number += 1
            where = Place(location.name, number)
            yield where, text.row(where)
            if (after := text.next_character()) == "]":
                break
            if after != ",":
                raise UserError(where, f"is not followed by a comma or ] (line {text.line()}); repair the file")
            text.skip()
        text.skip()
        if text.next_character():
            raise UserError(option, f"{location} has text after its array (line {text.line()}); remove it")


class _Window:
    """The part of a text file that was read and not yet used."""

    def __init__(self, file: BinaryIO, location: Path, option: str) -> None:
        self._file = file
        self._location = location
        self._option = option
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._position = 0
        self._lines_before = 0
        self._bytes_read = 0
        self._at_end = False

    def next_character(self) -> str:
        """Return the next character that is not white space, without moving past it. Empty: the end of the file."""
        while True:
            while self._position < len(self._text):
                if (character := self._text[self._position]) not in _SPACE:
                    return character
                self._position += 1
            if self._at_end:
                return ""
            self._read(CHUNK)

    def skip(self) -> None:
        """Move past one character."""
        self._position += 1

    def line(self, position: int | None = None) -> int:
        """Return the number of the line at ``position`` in the text (by default the current position)."""
        return 1 + self._lines_before + self._text.count("\n", 0, self._position if position is None else position)

    def row(self, where: str) -> Row:
        """Read the object that begins at the next character."""
        if (character := self.next_character()) != "{":
            if character and character in _VALUES:
                raise UserError(where, "is not a JSON object")
            raise UserError(where, f"is not JSON (Expecting value, line {self.line()})")
        while True:
            row = _guarded(where, self._decode, self._text, lambda error: f"line {self.line(error.pos)}")
            if row is not None:
                return dict(row)
            # Double the text each time, so that a long row is not decoded too often.
            self._read(max(CHUNK, len(self._text) - self._position))

    def _decode(self, text: str) -> dict[str, Any] | None:
        """Decode the row at the current position. None: more of the file must be read first."""
        try:
            row: dict[str, Any]
            row, self._position = _DECODER.raw_decode(text, self._position)
        except json.JSONDecodeError as error:
            if self._at_end or not self._may_be_cut(error.pos):
                raise
            return None
        return row

    def _may_be_cut(self, position: int) -> bool:
        """Whether the error at ``position`` may come from a row that is not completely read."""
        if position >= len(self._text) - _NEAR:
            return True
        if self._text[position] != '"':
            return False
        try:
            scanstring(self._text, position + 1)
        except json.JSONDecodeError:  # a string whose end was not read yet
            return True
        return False

    def _read(self, size: int) -> None:
        chunk = self._file.read(size)
        self._bytes_read += len(chunk)
        self._at_end = not chunk
        try:
            more = self._decoder.decode(chunk, final=self._at_end)
        except UnicodeDecodeError as error:
            byte = self._bytes_read - len(error.object) + error.start
            raise _not_utf8(self._location, self._option, byte) from error
        self._lines_before += self._text.count("\n", 0, self._position)
        self._text = self._text[self._position :] + more
        self._position = 0
