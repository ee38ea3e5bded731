"""The exceptions that a user is meant to read, and what they are worded with."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class UserError(Exception):
    """Something the user gave is wrong: a file, a row, an option, a checkpoint.

    The message is one line that says what is wrong, where (file and row, or config key) and what to
    do about it. The command line prints it without a traceback and exits with status 2.
    """

    is_shared = False
    """Whether all processes of the run have raised it, so that one of them can tell it for all."""


class Interrupted(UserError):
    """The run was asked to end before it was done. The command exits with status 143, as after SIGTERM itself."""


def first_line(error: BaseException) -> str:
    """What ``error`` says, for a message of one line; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def did_you_mean(word: str, known: Sequence[str], otherwise: str) -> str:
    """How a message about an unknown ``word`` ends: with the nearest of those ``known``, or ``otherwise``."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else otherwise
