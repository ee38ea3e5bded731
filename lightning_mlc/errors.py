"""The exceptions that a user is meant to read, and the words that their messages are made of."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Self

LONGEST_REASON = 200
"""Characters of another library's message that are quoted at most."""


class UserError(Exception):
    """Something the user gave is wrong: a file, a row, an option, a checkpoint.

    The command line prints ``option: text`` without a traceback and exits with status 2.

    Args:
        option: Where the error is: a configuration key (``model.lora.r``), a flag (``--out``), or a file and row
            (``train.jsonl row 3``). None if the text says all.
        text: One line: the fault, then the remedy.
    """

    is_shared = False
    """Whether all processes of the run have raised it, so that one of them can tell it for all."""

    def __init__(self, option: str | None, text: str) -> None:
        super().__init__(option, text)
        self.option = option
        self.text = text

    def __str__(self) -> str:
        return self.text if self.option is None else f"{self.option}: {self.text}"

    def of(self, option: str | None) -> Self:
        """The same error, of another option."""
        error = type(self)(option, self.text)
        error.is_shared = self.is_shared
        return error

    def is_within(self, key: str) -> bool:
        """Whether it is of the option ``key`` or of one below it, such as ``key.beta`` or ``key[1]``."""
        return self.option == key or (self.option or "").startswith((f"{key}.", f"{key}["))


class CheckpointError(UserError):
    """A checkpoint cannot be written. The run ends without an attempt to write another one."""


class Interrupted(UserError):
    """The run was asked to end before it was done. The command exits with status 143, as after SIGTERM itself."""


@contextmanager
def renamed(options: Collection[str], option: str) -> Iterator[None]:
    """Errors inside that are of one of ``options`` are of ``option``, because that is where the user gave it."""
    try:
        yield
    except UserError as error:
        raise error.of(option if error.option in options else error.option) from error


@contextmanager
def moved(key: str, place: str) -> Iterator[None]:
    """Errors inside that are of the option ``key``, or of one below it, are of the same option at ``place``.

    An error of no option is of ``place`` itself.
    """
    try:
        yield
    except UserError as error:
        if error.option is None:
            raise error.of(place) from error
        if error.is_within(key):
            raise error.of(place + error.option.removeprefix(key)) from error
        raise


def first_line(error: BaseException) -> str:
    """The first line of ``error``, for a message of one line; its type where it has none.

    Other libraries may say thousands of characters in it, so it is shortened to ``LONGEST_REASON``.
    """
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].strip()
    return line if len(line) <= LONGEST_REASON else f"{line[: LONGEST_REASON - 4].rstrip()} ..."


def shortened(text: str, most: int = 60) -> str:
    """``text``, which the user gave, for a message: at most ``most`` characters of it."""
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def some_of(parts: Sequence[str], most: int, between: str = ", ") -> str:
    """As many of ``parts`` as ``most`` characters have room for, one at least and shortened, and how many more."""
    shown = [shortened(parts[0], most)] if parts else []
    for part in parts[1:]:
        if len(between.join([*shown, part])) > most:
            break
        shown.append(part)
    left = len(parts) - len(shown)
    return between.join(shown) + (f"{between}{left} more" if left else "")


def did_you_mean(word: str, known: Sequence[str], otherwise: str) -> str:
    """How a message about an unknown ``word`` ends: with the nearest of those ``known``, or ``otherwise``."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else otherwise
