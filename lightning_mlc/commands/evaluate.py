"""``lightning-mlc evaluate``: reads the options, evaluates the models, and writes a report."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence

from jsonargparse import ArgumentParser
from rich.console import Console

from lightning_mlc.commands.option_forms import OptionForms, parser_of, values_of
from lightning_mlc.commands.stopping import stoppable
from lightning_mlc.evaluation.settings import EvaluationSettings
from lightning_mlc.files.paths import expand_all, expanded

DESCRIPTION = "is a model safe in every language, and what did it cost?"
FORMS = OptionForms(
    lists=("models", "prompts", "ordinary", "judges", "languages", "seen"),
    by_comma=("languages", "seen", "judges"),
    switches=("show_text",),
)
NAMED = ("models", "judges")
"""List options whose values may be ``NAME=PATH``."""


def parser() -> ArgumentParser:
    """The options of ``evaluate``."""
    return parser_of(EvaluationSettings, "lightning-mlc evaluate", DESCRIPTION)


def parse(args: Sequence[str]) -> EvaluationSettings:
    """The settings that the command line gives.

    Args:
        args: Arguments after ``lightning-mlc evaluate``.

    Raises:
        UserError: An option is unknown, or its value is not allowed.
    """
    given = values_of(EvaluationSettings, parser(), FORMS, args)
    expand_all(given)
    for option in NAMED:
        given[option] = [_expanded_after_name(text, option) for text in given[option]]
    return EvaluationSettings(**given)


def _expanded_after_name(text: str, option: str) -> str:
    name, equals, rest = text.partition("=")
    return f"{name}={expanded(rest, option)}" if equals else text


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
    with stoppable("stopped; finished work is kept, so run the same command again to resume"):
        study.run()
    results = collect(study)
    written = write_report(study, results)
    print_summary(results, Console())
    print("wrote", *written, sep="\n  ")
