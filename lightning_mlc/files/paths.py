"""Paths as users write them. ``~`` is expanded once, where an option is parsed, and nowhere else."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from lightning_mlc.errors import UserError


def expanded(path: str, option: str | None) -> str:
    """``path`` with a ``~`` or ``~name`` at its beginning replaced by the home folder of that user.

    A file name such as ``~notes.jsonl`` stays as it is.

    Args:
        path: A path, or another text that the option takes, such as ``hf://owner/name``.
        option: Its configuration key or flag, for the error.

    Raises:
        UserError: The user does not exist.
    """
    found = os.path.expanduser(path)
    if found.startswith("~") and "/" in found:
        user = found.partition("/")[0]
        raise UserError(option, f"there is no user {user[1:]}; write ./{user} for a folder of that name")
    return found


def user_path(text: str) -> Path:
    """The type of an ``argparse`` option that is a path. Raises as :func:`user_text`."""
    return Path(user_text(text))


def user_text(text: str) -> str:
    """The type of an ``argparse`` option that may be a path.

    Raises:
        argparse.ArgumentTypeError: It begins with ``~`` and a user that does not exist.
    """
    try:
        return expanded(text, None)
    except UserError as error:
        raise argparse.ArgumentTypeError(error.text) from error


def expand_all(options: Any, option: str = "") -> None:
    """Expand every text in ``options`` that begins with ``~``, in place. Such a text is always a path.

    Args:
        options: A namespace of ``jsonargparse``, a dict or a list; they may be nested.
        option: The key of ``options``, for errors.

    Raises:
        UserError: A text names a user that does not exist.
    """
    parts: Any = options if isinstance(options, list | dict) else vars(options)
    for key, value in list(enumerate(parts) if isinstance(parts, list) else parts.items()):
        name = f"{option}[{key}]" if isinstance(parts, list) else f"{option}.{key}" if option else str(key)
        if isinstance(value, str):
            parts[key] = expanded(value, name)
        elif isinstance(value, list | dict | argparse.Namespace):
            expand_all(value, name)
