"""The grid of a study: seeds, measurements, and cells, each of which is a set of options of ``lightning-mlc fit``.

Errors in the grid are reported before anything is trained: every cell is parsed in the same way as ``fit`` does.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from lightning_mlc.commands.estimate import EstimateCLI
from lightning_mlc.commands.training import make_cli
from lightning_mlc.errors import UserError, did_you_mean

BASE = "base"
"""The cell that every study has: the model before training."""

STUDY_OPTIONS = {
    "out": "each run has a folder of its own in --out",
    "seed_everything": "list the seeds under 'seeds'",
    "ckpt_path": "runs resume by themselves",
    "data.train_path": "give it as --data",
    "data.val_path": "held-out rows are those of 'data.heldout'",
    "data.val_share": "held-out rows are those of 'data.heldout'",
    "model.name_or_path": "give it as --model",
    "model.gguf_file": "give it as --model PATH/FILE.gguf",
}
"""Options of ``fit`` that the study sets itself, and where to give them instead."""


@dataclass(frozen=True)
class DataSettings:
    """Which rows are for training and which for measuring.

    Prompts that are measured, also the ordinary ones of ``evaluation.ordinary``, are never trained on.

    Args:
        heldout: Number of rows that are measured.
        max_prompt_tokens: Rows with a longer prompt in any language are not used; null keeps all.
        max_response_tokens: Rows with a longer response are not used; null keeps all.
        heldout_from: A file, or ``sample``, whose harmful rows are measured; null: rows of ``--data``.
    """

    heldout: int
    max_prompt_tokens: int | None = None
    max_response_tokens: int | None = None
    heldout_from: str | None = None


@dataclass(frozen=True)
class StudyEvaluation:
    """How every trained model is measured.

    Args:
        languages: Languages to measure; null: those of training.
        responses: ``all`` measures chosen and rejected responses after the prompt in every language, ``source`` after
            that in the source language alone, which takes a fraction of the time.
        generate: Number of held-out prompts, and of ordinary prompts, that are answered and judged in every language;
            0 for none.
        judges: Judges of these answers, as in ``lightning-mlc evaluate``.
        max_new_tokens: Largest number of tokens in an answer.
        ordinary: Prompts that a model should answer, in any layout; ``sample`` means the ordinary ones of the sample.
        ordinary_limit: Number of ordinary prompts to use.
        layers: Layers whose hidden states are compared, as in ``model.consistency.layer``.
        batch_tokens: Largest number of tokens in a batch.
        device: As in ``lightning-mlc evaluate``.
        dtype: Precision of the evaluated model.
    """

    languages: tuple[str, ...] | None = None
    responses: Literal["all", "source"] = "all"
    generate: int = 0
    judges: tuple[str, ...] = ("refusal",)
    max_new_tokens: int = 128
    ordinary: str = "sample"
    ordinary_limit: int = 16
    layers: tuple[float, ...] = (0.5, -1)
    batch_tokens: int = 8192
    device: str = "auto"
    dtype: str = "auto"


@dataclass(frozen=True)
class Question:
    """A question that the report answers with a table.

    Args:
        title: The question.
        compare: Maps each cell to the cell that it is compared with.
    """

    title: str
    compare: Mapping[str, str]


@dataclass(frozen=True)
class StudyGrid:
    """Everything that a study trains and measures.

    Args:
        name: Name of the study. The marks in the page and the names of pictures contain it.
        seeds: Seeds with which each cell is trained.
        cells: By cell, options of ``lightning-mlc fit`` in addition to those of ``fit``.
        data: Rows to train on and to measure.
        questions: Tables of the report.
        pictured: Cells in the picture of declined prompts, in its order; empty: all.
        configs: Configurations that every cell starts from, as ``--config`` of ``lightning-mlc fit``.
        fit: Options of ``lightning-mlc fit`` that all cells share.
        evaluation: How every trained model is measured.
    """

    name: str
    seeds: tuple[int, ...]
    cells: Mapping[str, Mapping[str, Any]]
    data: DataSettings
    questions: tuple[Question, ...] = ()
    pictured: tuple[str, ...] = ()
    configs: tuple[str, ...] = ()
    fit: Mapping[str, Any] = field(default_factory=dict)
    evaluation: StudyEvaluation = field(default_factory=StudyEvaluation)

    def options(self, cell: str) -> dict[str, Any]:
        """Return the options of ``cell``, including those that all cells share."""
        return {**self.fit, **self.cells[cell]}

    def arguments(self, cell: str, own: Mapping[str, Any]) -> list[str]:
        """Return the command ``fit`` with its arguments for ``cell``; ``own`` are options that the study sets."""
        options = {**self.options(cell), **own}
        return [
            "fit",
            *(f"--config={config}" for config in self.configs),
            *(f"--{key}={_argument(value)}" for key, value in options.items()),
        ]


def read_grid(path: Path) -> StudyGrid:
    """Read the grid in the YAML file ``path``. Options of ``fit`` are checked later, by :func:`check_cells`.

    Raises:
        UserError: The file cannot be read, a key is unknown or missing, or a value is invalid.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError("--config", f"cannot read {path} ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise UserError("--config", f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise UserError("--config", f"{path} must hold a mapping with name, seeds, cells and data")
    _check_keys(content, StudyGrid, "")
    if re.fullmatch(r"[\w.-]+", str(content["name"])) is None:
        raise UserError("name", f"must be letters, digits, '.', '-' and '_', got {content['name']!r}")
    seeds = content["seeds"]
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise UserError("seeds", "must be a list of one or more integers, each at least 0")
    if len(set(seeds)) < len(seeds):
        raise UserError("seeds", "must not contain a seed twice")
    cells = _read_cells(content["cells"])
    shared = _read_options(content.get("fit") or {}, "fit")
    for section, kind in (("data", DataSettings), ("evaluation", StudyEvaluation)):
        _check_keys(content.get(section) or {}, kind, f"{section}.")
    data = DataSettings(**content["data"])
    measured: dict[str, Any] = {
        key: tuple(v) if isinstance(v, list) else v for key, v in (content.get("evaluation") or {}).items()
    }
    evaluation = StudyEvaluation(**measured)
    for name, number, least in (
        ("data.heldout", data.heldout, 2),
        ("data.max_prompt_tokens", data.max_prompt_tokens, 1),
        ("data.max_response_tokens", data.max_response_tokens, 1),
        ("evaluation.generate", evaluation.generate, 0),
        ("evaluation.ordinary_limit", evaluation.ordinary_limit, 2),
    ):
        if number is not None and (type(number) is not int or number < least):
            raise UserError(name, f"must be an integer of at least {least}, got {number!r}")
    if evaluation.responses not in ("all", "source"):
        raise UserError("evaluation.responses", f"must be all or source, got {evaluation.responses!r}")
    source = shared.get("data.source_language", "en")
    if evaluation.languages is not None and evaluation.languages[:1] != (source,):
        raise UserError(
            "evaluation.languages", f"must begin with '{source}', the language of the responses, whose NLL is measured"
        )
    if 0 < evaluation.generate < 2 or evaluation.generate > data.heldout:
        raise UserError(
            "evaluation.generate",
            f"must be 0, or between 2 and data.heldout ({data.heldout}), got {evaluation.generate}",
        )
    return StudyGrid(
        name=str(content["name"]),
        seeds=tuple(seeds),
        cells=cells,
        data=data,
        questions=tuple(_read_questions(content.get("questions") or [], cells)),
        pictured=_read_pictured(content.get("pictured") or [], cells),
        configs=tuple(content.get("configs") or ()),
        fit=shared,
        evaluation=evaluation,
    )


class _Check(EstimateCLI):
    """Parses the options of ``fit`` and builds the module and the data from them, but loads and runs nothing."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def check_cells(grid: StudyGrid, own: Mapping[str, Any]) -> dict[str, Any]:
    """Parse every cell in the same way as ``fit`` will.

    Args:
        grid: The cells.
        own: Options that the study sets for all cells.

    Returns:
        The name of the model, by cell.

    Raises:
        UserError: A cell has an option that ``fit`` does not accept.
    """
    models = {}
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)  # it would log a seed per cell
    for cell in grid.cells:
        try:
            cli = make_cli(grid.arguments(cell, own), _Check)
        except (UserError, ValueError) as error:
            reported = error if isinstance(error, UserError) else error.__cause__
            if not isinstance(reported, UserError):
                raise
            if reported.option == "model.name_or_path":
                raise UserError("--model", f"{reported.text} (the grid's configs name no model)") from error
            raise UserError(f"cells.{cell}", str(reported)) from error
        models[cell] = cli.config.fit.model.name_or_path
    return models


def _argument(value: Any) -> str:
    """Return ``value`` as the command line accepts it."""
    return value if isinstance(value, str) else json.dumps(value)


def _read_cells(content: Any) -> dict[str, dict[str, Any]]:
    if not isinstance(content, dict) or not content:
        raise UserError("cells", "must be a mapping from names to options of fit")
    found = {}
    for name, options in content.items():
        if re.fullmatch(r"[\w.-]+", str(name)) is None:
            raise UserError("cells", f"{name!r} must be letters, digits, '.', '-' and '_'; it names a folder")
        if name == BASE:
            raise UserError(
                f"cells.{BASE}", "is the model before training, which is always measured; choose another name"
            )
        found[str(name)] = _read_options(options or {}, f"cells.{name}")
    return found


def _read_options(content: Any, where: str) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(where, "must be a mapping such as {model.objective: DPO}")
    for key in content:
        if key in STUDY_OPTIONS:
            raise UserError(f"{where}.{key}", f"cannot be set here; {STUDY_OPTIONS[key]}")
    return {str(key): value for key, value in content.items()}


def _read_questions(content: Any, cells: Mapping[str, Any]) -> list[Question]:
    found = []
    for number, item in enumerate(content):
        where = f"questions[{number}]"
        _check_keys(item, Question, f"{where}.")
        for cell in (*item["compare"], *item["compare"].values()):
            _check_cell(cell, cells, f"{where}.compare")
        found.append(Question(**item))
    return found


def _read_pictured(content: Any, cells: Mapping[str, Any]) -> tuple[str, ...]:
    if not isinstance(content, list):
        raise UserError("pictured", "must be a list of cells")
    for cell in content:
        _check_cell(str(cell), cells, "pictured")
    return tuple(map(str, content))


def _check_cell(cell: str, cells: Mapping[str, Any], where: str) -> None:
    if cell != BASE and cell not in cells:
        raise UserError(where, f"there is no cell '{cell}'" + _near(cell, [*cells, BASE]))


def _check_keys(content: Any, kind: type, where: str) -> None:
    """Raise UserError if ``content`` has keys that ``kind`` lacks, or lacks keys that ``kind`` needs."""
    if not isinstance(content, dict):
        raise UserError(where.rstrip("."), "must be a mapping")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    for key in content:
        if key not in fields:
            raise UserError(f"{where}{key}", "there is no such key" + _near(str(key), list(fields)))
    for name, f in fields.items():
        needed = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if needed and content.get(name) is None:
            raise UserError(f"{where}{name}", "is not set")


def _near(word: str, known: Sequence[str]) -> str:
    return did_you_mean(word, known, f" (known: {', '.join(known)})")
