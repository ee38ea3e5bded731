"""The command ``lightning-mlc``: chooses the subcommand, and prints its errors.

This module is cheap to import, so ``--help`` answers at once. The subcommands that need torch, Lightning and
transformers import them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lightning_mlc import __version__
from lightning_mlc.errors import Interrupted, UserError
from lightning_mlc.progress.quiet import quiet_libraries

COMMANDS = {
    "fit": "align a model: --config FILE, then any option as --key value",
    "validate": "measure a model or a checkpoint on the validation data, per language",
    "test": "the same on data.test_path",
    "predict": "generate responses to the prompts, in every language",
    "estimate": "estimate the memory that a configuration takes on each GPU, without loading a model",
    "evaluate": "is a model safe in every language: generate, judge, measure, compare",
    "translate": "translate the prompts of a file into other languages, never the responses",
    "lint": "find wrong translations in data files, without showing any text",
    "export": "turn a checkpoint into a Hugging Face folder",
}

USAGE = f"""\
usage: lightning-mlc COMMAND [options]

Make a language model safe in every language its users speak, with data in one language only.

commands:
{chr(10).join(f"  {name:<10}{text}" for name, text in COMMANDS.items())}

  lightning-mlc fit --config quickstart                                  run a configuration of the package
  lightning-mlc fit --config my.yaml --model.consistency.mlc.weight 0    override one key
  lightning-mlc fit --config quickstart --print_config                   show every option and its value
  lightning-mlc COMMAND --help                                           options of one command
  lightning-mlc --version
"""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line ``args`` (``sys.argv`` by default) and return the exit status."""
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if args else 2
    if args[0] == "--version":
        print(f"lightning-mlc {__version__}")
        return 0
    if args[0] not in COMMANDS:
        print(
            f"error: there is no command '{args[0]}'; choose one of {', '.join(COMMANDS)} (lightning-mlc --help)",
            file=sys.stderr,
        )
        return 2
    try:
        with quiet_libraries():
            return _run(args)
    except UserError as error:
        if not error.is_shared or _is_first():
            print(f"error: {error}", file=sys.stderr)
        return 143 if isinstance(error, Interrupted) else 2


def _run(args: Sequence[str]) -> int:
    """Run the command that ``args`` begin with, and return the exit status."""
    if args[0] == "lint":
        from lightning_mlc.commands.lint import run as lint

        return lint(args[1:])
    if args[0] == "translate":
        from lightning_mlc.commands.translate import run as translate

        return translate(args[1:])
    if args[0] == "export":
        from lightning_mlc.commands.export import run as export

        export(args[1:])
    elif args[0] == "estimate":
        from lightning_mlc.commands.estimate import run as run_estimate

        run_estimate(args[1:])
    elif args[0] == "evaluate":
        from lightning_mlc.commands.evaluate import run as evaluate

        evaluate(args[1:])
    else:
        from lightning_mlc.commands.training import run

        run(args)
    return 0


def _is_first() -> bool:
    from lightning_mlc.processes import is_first

    return is_first()
