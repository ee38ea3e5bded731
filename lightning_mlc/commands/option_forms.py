"""Commands whose options are the fields of a dataclass, with short forms: ``--models A B`` and ``--show_text``."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from jsonargparse import ArgumentParser

from lightning_mlc.commands.options import explain


def parser_of(settings: type, command: str, description: str) -> ArgumentParser:
    """Make a parser whose options are the fields of a dataclass, and ``--config``.

    Args:
        settings: The dataclass.
        command: The command, such as ``lightning-mlc evaluate``.
        description: What it does.
    """
    found = ArgumentParser(prog=command, description=description, exit_on_error=False)
    found.add_argument("--config", action="config", help="YAML file with any of these options")
    found.add_class_arguments(settings)
    return found


def values_of(settings: type, parser: ArgumentParser, forms: OptionForms, args: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a dataclass as a command line gives them.

    Args:
        settings: The dataclass.
        parser: Its :func:`parser_of`.
        forms: The short forms of its options.
        args: Arguments after the command.

    Raises:
        UserError: An option is unknown, or its value is not allowed.
    """
    try:
        config = parser.parse_args(forms.written_out(args))
    except argparse.ArgumentError as error:
        raise explain(error, [parser], parser.prog) from error
    return {field.name: config[field.name] for field in dataclasses.fields(settings)}


@dataclass(frozen=True)
class OptionForms:
    """Which options of a command have a short form.

    Args:
        lists: Options that take several values: ``--models A B``.
        by_comma: Those of ``lists`` whose values may also be separated by commas.
        switches: Options that need no value: ``--show_text``.
    """

    lists: tuple[str, ...]
    by_comma: tuple[str, ...]
    switches: tuple[str, ...]

    def written_out(self, args: Sequence[str]) -> list[str]:
        """``args`` with each list option as one argument, a JSON list, which is the form that ``jsonargparse`` takes.

        Each ``--config`` keeps its place between the other options, because the later of two values wins.
        """
        starts = [index for index, word in enumerate(args) if word.partition("=")[0] == "--config"]
        return [word for start, end in pairwise([0, *starts, len(args)]) for word in self._joined(args[start:end])]

    def _joined(self, args: Sequence[str]) -> list[str]:
        """``args``, without a ``--config`` after the first word, with the list options joined and at the end."""
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
        for name in self.lists:
            parser.add_argument(f"--{name}", nargs="+", default=argparse.SUPPRESS)
        for name in self.switches:
            parser.add_argument(f"--{name}", nargs="?", const="true", default=argparse.SUPPRESS)
        given, others = parser.parse_known_args(args)
        return [*others, *(f"--{name}={self._as_json(name, values)}" for name, values in vars(given).items())]

    def _as_json(self, name: str, values: str | list[str]) -> str:
        if isinstance(values, str):  # of a switch
            return values
        if len(values) == 1 and (values[0].startswith("[") or values[0] == "null"):
            return values[0]
        if name in self.by_comma:
            values = [part for value in values for part in value.split(",") if part]
        return json.dumps(values)
