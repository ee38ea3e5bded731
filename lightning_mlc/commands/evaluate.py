"""``lightning-mlc evaluate``: from the command line, a YAML file or both, to a report."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import typing
import warnings
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console

from lightning_mlc.commands.options import explain
from lightning_mlc.errors import Interrupted
from lightning_mlc.evaluation.settings import Settings
from lightning_mlc.files.paths import expand_all, expanded

DESCRIPTION = "is a model safe in every language, and what did it cost?"
LISTS = tuple(name for name, kind in typing.get_type_hints(Settings).items() if "list" in str(kind))
"""Options that take several values after one another."""
SWITCHES = tuple(f"--{name}" for name, kind in typing.get_type_hints(Settings).items() if kind is bool)
"""Options that may stand alone."""
BY_COMMA = ("languages", "seen", "judges")
"""Those whose values may be separated by commas, too."""

NAMED = ("models", "judges")
"""Those whose values may be ``NAME=PATH``."""


def parser() -> ArgumentParser:
    """The options of ``evaluate``."""
    found = ArgumentParser(prog="lightning-mlc evaluate", description=DESCRIPTION, exit_on_error=False)
    found.add_argument("--config", action="config", help="YAML file with any of these options")
    found.add_class_arguments(Settings)
    return found


def parse(args: Sequence[str]) -> Settings:
    """The settings that ``args`` give.

    Raises:
        UserError: An option is unknown or has a value that it cannot have.
    """
    options = parser()
    try:
        config = options.parse_args(_with_lists(args))
    except argparse.ArgumentError as error:
        raise explain(error, [options], "lightning-mlc evaluate") from error
    given: dict[str, Any] = {field.name: config[field.name] for field in dataclasses.fields(Settings)}
    expand_all(given)
    for option in NAMED:
        given[option] = [_expanded_after_name(text, option) for text in given[option]]
    return Settings(**given)


def _expanded_after_name(text: str, option: str) -> str:
    name, equals, rest = text.partition("=")
    return f"{name}={expanded(rest, option)}" if equals else text


def _with_lists(args: Sequence[str]) -> list[str]:
    """``--models A B`` as one argument, a JSON list, which is what the parser takes; ``--show_text`` with its value."""
    joined: list[str] = []
    index = 0
    while index < len(args):
        name, equals, value = args[index].partition("=")
        index += 1
        option = name.removeprefix("--")
        if args[index - 1] in SWITCHES and args[index : index + 1] not in (["true"], ["false"]):
            joined.append(f"{name}=true")
            continue
        if not name.startswith("--") or option not in LISTS:
            joined.append(args[index - 1])
            continue
        values = [value] if equals else []
        while not equals and index < len(args) and not args[index].startswith("--"):
            values.append(args[index])
            index += 1
        if len(values) == 1 and (values[0].startswith("[") or values[0] == "null"):
            joined.append(f"{name}={values[0]}")
            continue
        if option in BY_COMMA:
            values = [part for value in values for part in value.split(",") if part]
        joined.append(f"{name}={json.dumps(values)}")
    return joined


def run(args: Sequence[str]) -> None:
    """Evaluate as ``args`` say.

    Raises:
        UserError: Something the user gave is wrong, or an endpoint did not answer everything.
    """
    settings = parse(args)
    warnings.filterwarnings("ignore", message=".*generation flags are not valid.*")
    logging.getLogger("transformers.generation.configuration_utils").setLevel(logging.ERROR)
    # Imported here: a wrong option is told before torch is loaded.
    from lightning_mlc.evaluation.reporting.report import write_report
    from lightning_mlc.evaluation.reporting.results import collect
    from lightning_mlc.evaluation.reporting.summary import print_summary
    from lightning_mlc.evaluation.study import Study
    from lightning_mlc.progress.bars import terminal

    study = Study(settings, terminal())
    try:
        study.run()
    except KeyboardInterrupt as error:
        raise Interrupted(None, "stopped; what is done is kept, so run the same command again to go on") from error
    results = collect(study)
    written = write_report(study, results)
    print_summary(results, Console())
    print("wrote", *written, sep="\n  ")
