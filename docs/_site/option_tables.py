"""Write ``docs/commands.md`` and ``docs/options.md`` from the code: ``python docs/_site/option_tables.py``.

The tables come from signatures, docstrings and help texts. An option without a description is an error.
"""

from __future__ import annotations

import argparse
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from docstring_parser import parse

from lightning_mlc import consistency, objectives
from lightning_mlc.cli import COMMANDS
from lightning_mlc.commands import export, lint
from lightning_mlc.consistency import Consistency
from lightning_mlc.data.datamodule import MultilingualData
from lightning_mlc.distributed.sharding import FSDP2
from lightning_mlc.evaluation.settings import EvaluationSettings
from lightning_mlc.models.lora import LoRA
from lightning_mlc.plugins import MLCRegularizer
from lightning_mlc.reference.settings import ReferenceSettings
from lightning_mlc.training.declined import Declined
from lightning_mlc.training.module import AlignmentModule
from lightning_mlc.training.schedules import Warmup
from lightning_mlc.translation.settings import TranslationSettings


class Option(NamedTuple):
    """One row of a table."""

    name: str
    default: str
    text: str


WRITTEN_BY = "<!-- Written by `python docs/_site/option_tables.py`, from docstrings and help texts. -->"
LIGHTNING = "https://lightning.ai/docs/pytorch/stable"
GIVEN_BY_MODEL = {"name_or_path", "gguf_file", "revision", "trust_remote_code", "chat_template"}
"""Options of the data that `fit` takes from those of the model."""


def options_page() -> str:
    """The page with every key of a configuration of ``fit``."""
    terms = {
        name: kind
        for name, kind in vars(consistency).items()
        if inspect.isclass(kind) and issubclass(kind, consistency.ConsistencyTerm) and not inspect.isabstract(kind)
    }
    losses = {
        name: kind
        for name, kind in vars(objectives).items()
        if inspect.isclass(kind) and issubclass(kind, objectives.Objective) and not inspect.isabstract(kind)
    }
    data = [option for option in options_of(MultilingualData) if option.name not in GIVEN_BY_MODEL]
    return "\n\n".join(
        [
            "# Configuration keys",
            WRITTEN_BY,
            "A key can stand in a YAML file (`--config FILE`) or on the command line (`--model.lora.r 16`). "
            "`lightning-mlc fit --config dpo_mlc --print_config` prints every key with its value. "
            "The keys of `trainer` are those of Lightning's "
            f"[`Trainer`]({LIGHTNING}/common/trainer.html#trainer-flags), those of `checkpoint` those of its "
            f"[`ModelCheckpoint`]({LIGHTNING}/api/lightning.pytorch.callbacks.ModelCheckpoint.html).",
            *section("model", "The model and how it is trained.", options_of(AlignmentModule)),
            "## model.objective",
            "The class is named by `--model.objective DPO` or `class_path`; its options stand below `init_args`.",
            *(part for name, kind in losses.items() for part in section(name, summary(kind), options_of(kind), 3)),
            *section("model.consistency", summary(Consistency), options_of(Consistency)),
            *(part for name, kind in terms.items() for part in section(name, summary(kind), options_of(kind), 3)),
            *section("model.reference", summary(ReferenceSettings), options_of(ReferenceSettings)),
            *section("model.lora", summary(LoRA), options_of(LoRA)),
            *section("model.declined", summary(Declined), options_of(Declined)),
            *section("Warmup", summary(Warmup) + " A `model.scheduler`.", options_of(Warmup)),
            *section("data", summary(MultilingualData), data),
            *section("FSDP2", summary(FSDP2) + " A `trainer.strategy`.", options_of(FSDP2)),
        ]
    )


def commands_page() -> str:
    """The page with every command and its options."""
    settings = {
        "evaluate": options_of(EvaluationSettings),
        "translate": options_of(TranslationSettings),
        "lint": list(options_of_parser(lint.parser())),
        "export": list(options_of_parser(export.parser())),
    }
    parts = ["# Commands", WRITTEN_BY, "`lightning-mlc COMMAND --help` prints the same."]
    for name, does in COMMANDS.items():
        if name in settings:
            parts += section(f"lightning-mlc {name}", sentence(does), settings[name])
        else:
            parts += [f"## lightning-mlc {name}", sentence(does) + " Its options are [configuration keys](options.md)."]
    parts += section("add_mlc", "Options of the [plug-ins](plugins.md).", options_of(MLCRegularizer))
    return "\n\n".join(parts)


def section(title: str, text: str, options: Sequence[Option], level: int = 2) -> list[str]:
    """A heading, a sentence and a table."""
    found = [f"{'#' * level} {title}", text]
    if options:
        rows = [f"| `{name}` | {default} | {words} |" for name, default, words in options]
        found.append("\n".join(["| key | default | |", "|---|---|---|", *rows]))
    return found


def options_of(kind: Callable[..., Any]) -> list[Option]:
    """The parameters of a class.

    Raises:
        ValueError: One of them has no description.
    """
    described = {parameter.arg_name: parameter.description for parameter in described_by(kind)}
    found = []
    for name, parameter in inspect.signature(kind).parameters.items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        text = described.get(name)
        if not text:
            raise ValueError(f"{kind.__qualname__} does not describe its option {name}")
        found.append(Option(name, default_of(parameter.default), cell(text)))
    return found


def described_by(kind: Any) -> Iterator[Any]:
    """The descriptions of parameters in the docstrings of a class and those that it extends."""
    for part in inspect.getmro(kind) if inspect.isclass(kind) else [kind]:
        for text in (part.__doc__, getattr(part.__dict__.get("__init__"), "__doc__", None)):
            if text:
                yield from parse(inspect.cleandoc(text)).params


def options_of_parser(parser: argparse.ArgumentParser) -> Iterator[Option]:
    """The options of a parser.

    Raises:
        ValueError: One of them has no description.
    """
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        name = max(action.option_strings, key=len, default=str(action.metavar))
        if not action.help:
            raise ValueError(f"{parser.prog} does not describe its option {name}")
        is_set = action.default is not None and action.default is not False and action.default != []
        yield Option(name, f"`{action.default}`" if is_set else "", cell(action.help))


def default_of(value: Any) -> str:
    """A default as YAML has it; empty if there is none, or if it has a table of its own."""
    if value is inspect.Parameter.empty:
        return "*required*"
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if callable(value):
        return f"`{getattr(value, '__name__', type(value).__name__)}`"
    plain = isinstance(value, int | float | str) or (isinstance(value, list | tuple) and len(value) > 0)
    return f"`{value}`" if plain else ""


def summary(kind: type) -> str:
    """The first paragraph of a docstring."""
    return cell(inspect.cleandoc(kind.__doc__ or "").split("\n\n")[0])


def sentence(text: str) -> str:
    """Text with a capital letter and a full stop."""
    return text[0].upper() + text[1:] + ("" if text.endswith(("?", ".")) else ".")


def cell(text: str) -> str:
    """Text of a docstring as one line of Markdown, for a cell of a table."""
    text = re.sub(r":\w+:`~?([^`]+)`", lambda found: f"`{found[1].rpartition('.')[2]}`", text)
    return re.sub(r"\s+", " ", text.replace("``", "`").replace("|", "\\|")).strip()


PAGES = {"commands.md": commands_page, "options.md": options_page}
"""The pages, by their files in ``docs/``."""

if __name__ == "__main__":
    for name, page in PAGES.items():
        (Path(__file__).parents[1] / name).write_text(page() + "\n", encoding="utf-8")
