"""The exceptions that users read, and helpers for their messages."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Self

LONGEST_REASON = 200
"""The most characters that are quoted from another library's message."""


class UserError(Exception):
    """Something that the user gave is wrong: a file, a row, an option or a checkpoint.

    The command line prints ``option: text`` without a traceback and exits with status 2.

    Args:
        option: Where the error is: a configuration key (``model.lora.r``), a flag (``--out``), or a file and row
            (``train.jsonl row 3``). None if the text is enough.
        text: One line: what is wrong, then what to do.
    """

    is_shared = False
    """Whether all processes of the run raise this error, so that only the first prints it."""

    def __init__(self, option: str | None, text: str) -> None:
        super().__init__(option, text)
        self.option = option
        self.text = text

    def __str__(self) -> str:
        return self.text if self.option is None else f"{self.option}: {self.text}"

    def of(self, option: str | None) -> Self:
        """The same error, for another option."""
        error = type(self)(option, self.text)
        error.is_shared = self.is_shared
        return error

    def is_within(self, key: str) -> bool:
        """Whether its option is ``key`` or one below it, such as ``key.beta`` or ``key[1]``."""
        return self.option == key or (self.option or "").startswith((f"{key}.", f"{key}["))


class CheckpointError(UserError):
    """A checkpoint cannot be written. The run ends without an attempt to write another one."""


class Interrupted(UserError):
    """The run was stopped before it was done. The command exits with status 143, the status of SIGTERM."""


@contextmanager
def renamed(options: Collection[str], option: str) -> Iterator[None]:
    """Report errors inside for one of ``options`` as errors for ``option``, which is the one that the user gave."""
    try:
        yield
    except UserError as error:
        raise error.of(option if error.option in options else error.option) from error


@contextmanager
def moved(key: str, place: str) -> Iterator[None]:
    """Report errors inside for ``key`` or an option below it as errors for ``place`` or the same option below it.

    An error without an option becomes one for ``place``.
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
    """The first line of ``error``, for a message of one line. If it has no text, the name of its type.

    It is shortened to ``LONGEST_REASON``, because lines of other libraries may have thousands of characters.
    """
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].strip()
    return line if len(line) <= LONGEST_REASON else f"{line[: LONGEST_REASON - 4].rstrip()} ..."


def shortened(text: str, most: int = 60) -> str:
    """``text`` from the user, cut to at most ``most`` characters for a message."""
    return text if len(text) <= most else f"{text[: most - 4]} ..."


def some_of(parts: Sequence[str], most: int, between: str = ", ") -> str:
    """As many of ``parts`` as fit into ``most`` characters, and how many are left out. One is always shown."""
    shown = [shortened(parts[0], most)] if parts else []
    for part in parts[1:]:
        if len(between.join([*shown, part])) > most:
            break
        shown.append(part)
    left = len(parts) - len(shown)
    return between.join(shown) + (f"{between}{left} more" if left else "")


def did_you_mean(word: str, known: Sequence[str], otherwise: str) -> str:
    """The end of a message about an unknown ``word``: the most similar of the ``known`` words, or ``otherwise``."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else otherwise
