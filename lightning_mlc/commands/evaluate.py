"""``lightning-mlc evaluate``: reads the options, evaluates the models, and writes a report."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from jsonargparse import ArgumentParser
from rich.console import Console

from lightning_mlc.commands.options import explain
from lightning_mlc.errors import Interrupted
from lightning_mlc.evaluation.settings import EvaluationSettings
from lightning_mlc.files.paths import expand_all, expanded

DESCRIPTION = "is a model safe in every language, and what did it cost?"
LISTS = ("models", "prompts", "ordinary", "judges", "languages", "seen")
"""Options that take several values: ``--models A B``."""
SWITCHES = ("show_text",)
"""Options that need no value: ``--show_text``."""
BY_COMMA = ("languages", "seen", "judges")
"""List options whose values may also be separated by commas."""
NAMED = ("models", "judges")
"""List options whose values may be ``NAME=PATH``."""


def parser() -> ArgumentParser:
    """The options of ``evaluate``."""
    found = ArgumentParser(prog="lightning-mlc evaluate", description=DESCRIPTION, exit_on_error=False)
    found.add_argument("--config", action="config", help="YAML file with any of these options")
    found.add_class_arguments(EvaluationSettings)
    return found


def parse(args: Sequence[str]) -> EvaluationSettings:
    """The settings that the command line gives.

    Args:
        args: Arguments after ``lightning-mlc evaluate``.

    Raises:
        UserError: An option is unknown, or its value is not allowed.
    """
    options = parser()
    try:
        config = options.parse_args(_with_lists(args))
    except argparse.ArgumentError as error:
        raise explain(error, [options], "lightning-mlc evaluate") from error
    given: dict[str, Any] = {field.name: config[field.name] for field in dataclasses.fields(EvaluationSettings)}
    expand_all(given)
    for option in NAMED:
        given[option] = [_expanded_after_name(text, option) for text in given[option]]
    return EvaluationSettings(**given)


def _expanded_after_name(text: str, option: str) -> str:
    name, equals, rest = text.partition("=")
    return f"{name}={expanded(rest, option)}" if equals else text


def _with_lists(args: Sequence[str]) -> list[str]:
    """``args`` with each list option as one argument, a JSON list, which is the form that ``jsonargparse`` takes.

    Each ``--config`` keeps its place between the other options, because the later of two values wins.
    """
    starts = [index for index, word in enumerate(args) if word.partition("=")[0] == "--config"]
    return [word for start, end in pairwise([0, *starts, len(args)]) for word in _joined(args[start:end])]


def _joined(args: Sequence[str]) -> list[str]:
    """``args``, without a ``--config`` after the first word, with the list options joined and at the end."""
    lists = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in LISTS:
        lists.add_argument(f"--{name}", nargs="+", default=argparse.SUPPRESS)
    for name in SWITCHES:
        lists.add_argument(f"--{name}", nargs="?", const="true", default=argparse.SUPPRESS)
    given, others = lists.parse_known_args(args)
    return [*others, *(f"--{name}={_as_json(name, values)}" for name, values in vars(given).items())]


def _as_json(name: str, values: str | list[str]) -> str:
    if isinstance(values, str):  # of a switch
        return values
    if len(values) == 1 and (values[0].startswith("[") or values[0] == "null"):
        return values[0]
    if name in BY_COMMA:
        values = [part for value in values for part in value.split(",") if part]
    return json.dumps(values)


def run(args: Sequence[str]) -> None:
    """Evaluate, write the report and print a summary.

    Args:
        args: Arguments after ``lightning-mlc evaluate``.

    Raises:
        UserError: An option or a file is wrong, or an endpoint did not answer every request.
        Interrupted: The user stopped the command.
    """
    settings = parse(args)
    warnings.filterwarnings("ignore", message=".*generation flags are not valid.*")
    logging.getLogger("transformers.generation.configuration_utils").setLevel(logging.ERROR)
    # Imported here, so that a wrong option is reported before torch is loaded.
    from lightning_mlc.evaluation.reporting.report import write_report
    from lightning_mlc.evaluation.reporting.results import collect
    from lightning_mlc.evaluation.reporting.summary import print_summary
    from lightning_mlc.evaluation.study import Study
    from lightning_mlc.progress.bars import terminal

    study = Study(settings, terminal())
    try:
        study.run()
    except KeyboardInterrupt as error:
        raise Interrupted(None, "stopped; finished work is kept, so run the same command again to resume") from error
    results = collect(study)
    written = write_report(study, results)
    print_summary(results, Console())
    print("wrote", *written, sep="\n  ")
