"""``lightning-mlc translate``: reads the options, translates, and says what came of it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser
from rich.console import Console

from lightning_mlc.commands.option_forms import OptionForms, parser_of, values_of
from lightning_mlc.commands.stopping import stoppable
from lightning_mlc.errors import UserError
from lightning_mlc.files.paths import expand_all
from lightning_mlc.translation.settings import TranslationSettings

DESCRIPTION = "translate the prompts of a file, never the responses"
STATUS_OF_LOST_LANGUAGES = 1
EPILOG = (
    "The exit status is 1 if the file has no prompt in a language that was asked for, because every translation "
    "failed; 0 if only some failed, with a warning as the last line; 2 if something cannot be used; 143 after a stop. "
    "docs/data.md explains the reasons."
)
FORMS = OptionForms(
    lists=("languages", "allow_remote", "redo"),
    by_comma=("languages", "redo"),
    switches=("system", "only_missing", "trust_remote_code"),
)


def parser() -> ArgumentParser:
    """The options of ``translate``."""
    found = parser_of(TranslationSettings, "lightning-mlc translate", DESCRIPTION)
    found.epilog = EPILOG
    return found


def parse(args: Sequence[str]) -> TranslationSettings:
    """The settings that the command line gives.

    Args:
        args: Arguments after ``lightning-mlc translate``. The first is the file, unless it is an option.

    Raises:
        UserError: An option is unknown, or its value is not allowed.
    """
    words = [f"--file={args[0]}", *args[1:]] if args and not args[0].startswith("-") else list(args)
    try:
        given = values_of(TranslationSettings, parser(), FORMS, words)
    except UserError as error:
        if error.option != "file":
            raise
        message = "is not set; write it first: lightning-mlc translate FILE --languages sw ..."
        raise UserError("file", message) from error
    expand_all(given)
    return TranslationSettings(**given)


def run(args: Sequence[str]) -> int:
    """Translate, write the file, and print a report and what ``lint`` finds in the file.

    Args:
        args: Arguments after ``lightning-mlc translate``.

    Returns:
        The exit status: 1 if the file has no prompt in a language that was asked for, else 0.

    Raises:
        UserError: An option or a file is wrong, or an endpoint did not answer every request.
        Interrupted: The user stopped the command.
    """
    settings = parse(args)
    logging.getLogger("transformers.generation.configuration_utils").setLevel(logging.ERROR)
    # Imported here, so that a wrong option is reported before torch is loaded.
    from lightning_mlc.lint.check import LintSettings
    from lightning_mlc.lint.linting import choose_checks, lint
    from lightning_mlc.lint.tables import show
    from lightning_mlc.progress.bars import terminal
    from lightning_mlc.translation.translating import Translation

    console = Console()
    with stoppable("stopped; what is done is kept, so run the same command again to resume"):
        translation = Translation(settings, terminal())
        report = translation.run()
        report.print(console, f"translations in {settings.out}")
        console.print("\nlint")
        source = translation.source.code
        checks = choose_checks(LintSettings(source, (settings.out,)))
        show(lint([settings.out], source, checks), console)
    print("wrote", settings.out, sep="\n  ", flush=True)
    if report.last_line is not None:
        print(report.last_line, file=sys.stderr)
    return STATUS_OF_LOST_LANGUAGES if report.without_any else 0
