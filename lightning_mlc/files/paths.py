"""Paths as users write them. ``~`` is expanded once, where an option is parsed, and nowhere else."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from lightning_mlc.errors import UserError


def expanded(path: str, option: str | None) -> str:
    """``path`` with the folder of a user in place of a ``~`` or ``~name`` that it begins with.

    A name such as ``~notes.jsonl``, which is no folder, stays as it is.

    Args:
        path: A path, or something else that is given in its place, such as ``hf://owner/name``.
        option: Its configuration key or flag, for the error.

    Raises:
        UserError: There is no such user.
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
        argparse.ArgumentTypeError: It begins with ``~`` and a user that there is not.
    """
    try:
        return expanded(text, None)
    except UserError as error:
        raise argparse.ArgumentTypeError(error.text) from error


def expand_all(options: Any, option: str = "") -> None:
    """Expand every text in ``options`` that begins with ``~``, in place: no option is anything but a path then.

    Args:
        options: A namespace of ``jsonargparse``, or mappings and lists, in each other.
        option: Key of ``options``, for errors.

    Raises:
        UserError: A text names a user that there is not.
    """
    parts: Any = options if isinstance(options, list | dict) else vars(options)
    for key, value in list(enumerate(parts) if isinstance(parts, list) else parts.items()):
        name = f"{option}[{key}]" if isinstance(parts, list) else f"{option}.{key}" if option else str(key)
        if isinstance(value, str):
            parts[key] = expanded(value, name)
        elif isinstance(value, list | dict | argparse.Namespace):
            expand_all(value, name)
