"""Convert the errors of jsonargparse and argparse for wrong options to :class:`~lightning_mlc.errors.UserError`.

jsonargparse has no exception for each kind of error, only texts of several lines. This is the one place that parses
them.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import NoReturn

from lightning_mlc.errors import UserError, did_you_mean

_UNKNOWN = re.compile(r"unrecognized arguments: (--[^ =]+)", re.IGNORECASE)
_MISSING = re.compile(r"arguments are required: (?P<option>[\w.-]+)")
_AMBIGUOUS = re.compile(r"ambiguous option: (--[^ =]+)\S* could match (--\w[^ ,]*)")
_OF_KEY = re.compile(r'^Parser key "([\w.\[\]-]+)":\s*(.*)')
_UNION = re.compile(
    r"Does not validate against any of the Union subtypes.* Errors: - (.*?) - Expected a <class 'NoneType'>.*"
)
_SUBTYPES = re.compile(r"Subtypes: \[(?P<types>.*)\] Errors: .* Given value type: .*? Given value: (?P<value>.*)")
_TYPE = re.compile(r"<class '\w+'>|list\[str\]|typing\.Literal\[[^\]]*\]")
_TYPE_NAMES = {
    "<class 'str'>": "text",
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'bool'>": "true or false",
    "list[str]": "a list of texts",
    "<class 'NoneType'>": "null",
}
_TRUTH_VALUE = re.compile(r"Expected a <class 'str'>\. Got value: (True|False)\b")
LONGEST = 300
"""The most characters of a message."""


class OneLineParser(argparse.ArgumentParser):
    """A parser of the standard library that reports a wrong option in one line, as the other commands do."""

    def error(self, message: str) -> NoReturn:
        """Raise the error that ``message`` tells of.

        Raises:
            UserError: Always.
        """
        raise explain(argparse.ArgumentError(None, message), [self], self.prog)


def explain(error: argparse.ArgumentError, parsers: Sequence[argparse.ArgumentParser], command: str) -> UserError:
    """The error in a command line.

    Args:
        error: As jsonargparse or argparse raised it.
        parsers: The parsers whose options the user may have meant.
        command: The command, such as ``lightning-mlc fit``.
    """
    message = " ".join(str(error).split())
    message = _of_several_types(message) or message
    # For an option that may be null, keep the first error only. The second says that the value is not null.
    message = _UNION.sub(r"\1", message)
    if unknown := _UNKNOWN.search(message):
        options = [option for parser in parsers for action in parser._actions for option in action.option_strings]
        near = did_you_mean(unknown[1], options, f"; see {command} --help")
        return UserError(None, f"there is no option {unknown[1]}{near}")
    if missing := _MISSING.search(message):
        return UserError(missing["option"], f"is not set; give it (see {command} --help)")
    if ambiguous := _AMBIGUOUS.search(message):
        return UserError(None, f"there is no option {ambiguous[1]}; did you mean {ambiguous[2]}?")
    option = None
    if of_key := _OF_KEY.match(message):
        option, message = of_key.groups()
    if truth := _TRUTH_VALUE.search(message):
        written = "yes or on" if truth[1] == "True" else "no or off"
        return UserError(
            option, f"must be text, got {truth[1]}; YAML reads {written} as a truth value, so put it in quotes"
        )
    return UserError(option, message if len(message) <= LONGEST else f"{message[: LONGEST - 4].rstrip()} ...")


def _of_several_types(message: str) -> str | None:
    """Which types an option may have, and what it got. None if the message is not about plain types, or about one."""
    found = _SUBTYPES.search(message)
    if found is None:
        return None
    types = _TYPE.findall(found["types"])
    if ", ".join(types) != found["types"] or len(types) - ("<class 'NoneType'>" in types) < 2:
        return None
    if "<class 'float'>" in types and "<class 'int'>" in types:  # a whole number is a number
        types.remove("<class 'int'>")
    literals = (name.removeprefix("typing.Literal[").removesuffix("]").replace("'", "") for name in types)
    *names, last = (_TYPE_NAMES.get(name, literal) for name, literal in zip(types, literals, strict=True))
    wanted = f"{', '.join(names)} or {last}" if names else last
    return f"{message[: found.start()].partition('Does not validate')[0]}must be {wanted}, got {found['value']}"
