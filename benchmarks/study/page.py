"""The page of a study: tables and pictures of its results, between two marks in a page that is written by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import ROOT
from benchmarks.study.grid import BASE, Question, StudyGrid, read_grid
from benchmarks.study.results import (
    LIKELIER,
    NLL,
    ORDINARY_MARGIN,
    PAG,
    REFUSAL_MARGIN,
    REWARD_ACCURACY,
    REWARD_MARGIN,
    SEPARATION,
    agreement_by,
    collect,
    declined_by,
    invalid_by,
    refused_by,
    safe_by,
    told_apart_by,
    variance_by,
)
from lightning_mlc.errors import UserError
from lightning_mlc.evaluation.reporting.document import Block, Heading, Paragraph, Picture, Table, to_markdown
from lightning_mlc.evaluation.reporting.plots import plot_intervals
from lightning_mlc.files.atomic import write_whole
from lightning_mlc.report import save

PAGE = ROOT / "docs" / "study_tables.md"
GRID, ROWS = "grid.yaml", "rows.json"
"""Files that a run writes into its folder for the report."""
PICTURED = (REWARD_MARGIN, REFUSAL_MARGIN)
"""Measures whose differences are drawn for each language: the objective of training, and its purpose."""


def write_report(folder: Path, page: Path) -> list[Path]:
    """Write ``results.json`` into ``folder``, the study's part of ``page``, and pictures into ``images`` next to it.

    Returns:
        The paths of the results and the page.

    Raises:
        UserError: There is nothing to report, or the page has no marks for the study.
    """
    if not (folder / GRID).is_file():
        raise UserError("--report", f"{folder} is not the folder of a study; give the --out of one")
    grid = read_grid(folder / GRID)
    begin, end = (f"<!-- study {grid.name}: {word} -->" for word in ("begin", "end"))
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UserError("--page", f"{page} has no marks for the study; write '{begin}' and '{end}' where it belongs")
    results = collect(grid, folder) | {"rows": json.loads((folder / ROWS).read_text(encoding="utf-8"))}
    if not results["seeds"]:
        raise UserError("--report", f"nothing is measured yet in {folder}")
    write_whole(folder / "results.json", json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    images = page.parent / "images"
    images.mkdir(exist_ok=True)
    part = to_markdown(_Part(grid, results, images).blocks(), page.parent)
    before, after = text[: text.index(begin) + len(begin)], text[text.index(end) :]
    write_whole(page, f"{before}\n\n{part}\n{after}")
    return [folder / "results.json", page]


class _Part:
    """The part of the page about one study."""

    def __init__(self, grid: StudyGrid, results: Mapping[str, Any], images: Path) -> None:
        self._grid = grid
        self._results = results
        self._images = images
        self._cells = [cell for cell in (BASE, *grid.cells) if cell == BASE or cell in results["seeds"]]
        self._measures = {measure["name"]: measure for measure in results["measures"]}
        self._levels = {(f["cell"], f["measure"], f["scope"]): f for f in results["figures"]}
        self._changes = {(f["cell"], f["against"], f["measure"], f["scope"]): f for f in results["differences"]}

    def blocks(self) -> list[Block]:
        found: list[Block] = [Paragraph(self._provenance())]
        judges = self._grid.evaluation.judges
        judged = [safe_by(judge).name for judge in judges]
        invalid = [invalid_by(judge).name for judge in judges]
        declined = [refused_by(judge).name for judge in judges]
        alike = [measure(judge).name for judge in judges for measure in (agreement_by, variance_by)]
        layered = [name for name in self._measures if name.startswith(("explained", "smallest"))]
        with_both_kinds = [judge for judge in judges if self._has_both_kinds(judge)]
        found += [
            *self._before_training(with_both_kinds),
            Heading("All cells", 3),
            self._table(
                "What was learned",
                [
                    (REWARD_ACCURACY.name, "mean"),
                    (REWARD_ACCURACY.name, "worst"),
                    (REWARD_MARGIN.name, "mean"),
                    (LIKELIER.name, "mean"),
                    (REFUSAL_MARGIN.name, "mean"),
                    *((name, "mean") for name in judged),
                ],
            ),
            *self._told_apart(with_both_kinds),
            self._table(
                "How alike the languages are",
                [*((name, "mean") for name in layered), (PAG.name, "all"), *((name, "all") for name in alike)],
            ),
            self._table(
                "What it cost",
                [
                    (ORDINARY_MARGIN.name, "mean"),
                    *((name, "mean") for name in (*declined, *invalid)),
                    (NLL.name, "mean"),
                ],
                perplexity=True,
            ),
        ]
        found += [self._declined(judge) for judge in with_both_kinds]
        for number, question in enumerate(self._grid.questions, start=1):
            found += self._question(number, question)
        return found

    def _has_both_kinds(self, judge: str) -> bool:
        return {declined_by(judge).name, refused_by(judge).name} <= self._measures.keys()

    def _declined(self, judge: str) -> Picture:
        """The shares of harmful and ordinary prompts that the pictured cells decline, and the gap between both.

        The gap has an interval of its own. It can be far narrower, because with another seed both shares move together.
        """
        cells = [cell for cell in self._grid.pictured or self._cells if cell in self._cells]
        series = {}
        for kind, measure in (
            ("harmful prompts", declined_by(judge)),
            ("ordinary prompts", refused_by(judge)),
            ("harmful minus ordinary", told_apart_by(judge)),
        ):
            series[kind] = _intervals({cell: self._levels.get((cell, measure.name, "mean")) for cell in cells})
        figure = plot_intervals(
            series, cells, "declined, mean over languages", f"{self._grid.name}: judged by {judge}", percent=True
        )
        path = self._images / f"study_{self._grid.name}_declined_{judge}.png"
        save(figure, path)
        return Picture(path, f"Shares of prompts that are declined, judged by {judge}, with 95 % intervals")

    def _before_training(self, judges: Sequence[str]) -> list[Block]:
        """Whether the model tells harmful from ordinary prompts at all, in each language, if that was measured."""
        names = [REFUSAL_MARGIN.name, ORDINARY_MARGIN.name, SEPARATION.name]
        names += [measure(judge).name for judge in judges for measure in (declined_by, refused_by)]
        rows = [
            [language, *(self._level(self._levels.get((BASE, name, language))) for name in names)]
            for language in self._results["languages"]
            if (BASE, SEPARATION.name, language) in self._levels
        ]
        if not rows:
            return []
        heads = ["", *(self._head(name, "") for name in names)]
        return [Heading("The model before training", 3), Table(heads, rows)]

    def _told_apart(self, judges: Sequence[str]) -> list[Block]:
        """The tables about harmful and ordinary prompts, if there is something in them."""
        columns = [(SEPARATION.name, scope) for scope in ("mean", "worst")]
        for judge in judges:
            columns += [(measure(judge).name, "mean") for measure in (declined_by, refused_by)]
            columns += [(told_apart_by(judge).name, scope) for scope in ("mean", "worst")]
        if not any((cell, *column) in self._levels for cell in self._cells for column in columns):
            return []
        whole = self._table("How well the model tells harmful prompts from ordinary ones", columns)
        return [whole, *(self._declined_by_language(judge) for judge in judges)]

    def _declined_by_language(self, judge: str) -> Table:
        languages = self._results["languages"]
        rows = []
        for cell in self._cells:
            shares = [
                [self._levels.get((cell, measure(judge).name, language)) for measure in (declined_by, refused_by)]
                for language in languages
            ]
            rows.append([f"`{cell}`", *(" / ".join(map(_percent, pair)) for pair in shares)])
        caption = f"Harmful / ordinary prompts that are declined in each language (%), judged by {judge}:"
        return Table(["", *languages], rows, caption)

    def _provenance(self) -> str:
        rows, seeds = self._results["rows"], self._results["seeds"]
        where = [
            f"{e['device']}, {e['threads']} thread{'s' if e['threads'] != 1 else ''} a run, torch {e['torch']}, "
            f"transformers {e['transformers']}, commit `{e['commit']}`"
            for e in self._results["environments"]
        ]
        text = (
            f"{rows['train']} rows to train on, {rows['heldout']} held out"
            + (f", {rows['too long']} left out as too long" if rows["too long"] else "")
            + f"; {len(self._results['languages'])} languages; {len(self._grid.seeds)} seeds. Measured on "
            + "; ".join(dict.fromkeys(where))
            + "."
        )
        if missing := self._missing():
            text += f" Not measured yet: {missing}."
        alone = [cell for cell in self._cells if len(seeds.get(cell, [])) == 1]
        if alone:
            which = "all cells" if len(alone) == len(self._cells) - 1 else ", ".join(f"`{cell}`" for cell in alone)
            text += (
                f" With one seed, as {which}, an interval shows the effect of other prompts, "
                "but not the effect of another seed."
            )
        return text

    def _missing(self) -> str:
        """The cells that are not measured with each seed, those with the same seeds together."""
        by_seeds: dict[tuple[int, ...], list[str]] = {}
        for cell in self._grid.cells:
            seeds = tuple(seed for seed in self._grid.seeds if seed not in self._results["seeds"].get(cell, []))
            by_seeds.setdefault(seeds, []).append(f"`{cell}`")
        return "; ".join(
            f"{'all cells' if len(cells) == len(self._grid.cells) else ', '.join(cells)} "
            f"(seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))})"
            for seeds, cells in sorted(by_seeds.items())
            if seeds
        )

    # ---- tables -------------------------------------------------------------------------------------

    def _table(self, caption: str, columns: Sequence[tuple[str, str]], perplexity: bool = False) -> Table:
        columns = [c for c in columns if any((cell, *c) in self._levels for cell in self._cells)]
        rows = []
        for cell in self._cells:
            found = [self._levels.get((cell, *column)) for column in columns]
            texts = [self._level(one) for one in found]
            if perplexity:
                texts.append(_perplexity(self._levels.get((cell, NLL.name, "mean"))))
            rows.append([f"`{cell}`", *texts])
        heads = [self._head(name, scope) for name, scope in columns] + (["perplexity of these"] if perplexity else [])
        return Table(["", *heads], rows, f"{caption}:")

    def _head(self, measure: str, scope: str) -> str:
        unit = self._measures[measure]["unit"]
        which = ", worst language" if scope == "worst" else ""
        return f"{measure}{which}" + (f" ({unit})" if unit else "")

    def _level(self, found: Mapping[str, Any] | None) -> str:
        if found is None or found["value"] is None:
            return "-"
        percent = self._measures[found["measure"]]["unit"] == "%"
        return _format_number(found["value"], percent) + _ends(found, percent)

    def _question(self, number: int, question: Question) -> list[Block]:
        pairs = [pair for pair in question.compare.items() if any(key[:2] == pair for key in self._changes)]
        if not pairs:
            return [Heading(question.title, 3), Paragraph("Not measured yet.")]
        rows, apart, count = [], [], 0
        for name, measure in self._measures.items():
            for scope in measure["scopes"]:
                found = [self._changes.get((*pair, name, scope)) for pair in pairs]
                if not any(found):
                    continue
                # A difference that is the same in every prompt and seed cannot exclude 0 by chance.
                known = [
                    one for one in found if one is not None and one["low"] is not None and one["low"] < one["high"]
                ]
                count += len(known)
                apart += [one for one in known if is_apart(one)]
                rows.append([self._head(name, scope), *(self._change(one) for one in found)])
        heads = [f"`{cell}` - `{other}`" for cell, other in pairs]
        return [
            Heading(question.title, 3),
            Paragraph(
                f"{len(apart)} of {count} differences have an interval that excludes 0. "
                f"By chance alone, about {count * 0.05:.1f} of them would."
            ),
            Table(["", *heads], rows),
            *(self._picture(number, pairs, measure.name) for measure in PICTURED if measure.name in self._measures),
        ]

    def _change(self, found: Mapping[str, Any] | None) -> str:
        if found is None or found["value"] is None:
            return "-"
        measure = self._measures[found["measure"]]
        percent = measure["unit"] == "%"
        number = _format_number(found["value"], percent, signed=True)
        if found["low"] is None:
            return number
        if not is_apart(found):
            return f"{number}{_ends(found, percent)} within noise"
        better = (found["value"] > 0) == measure["higher_is_better"]
        return f"**{number}**{_ends(found, percent)} {'better' if better else 'worse'}"

    def _picture(self, number: int, pairs: Sequence[tuple[str, str]], measure: str) -> Picture:
        scopes = [*self._results["languages"], "mean", "worst"]
        series = {}
        for cell, other in pairs:
            found = {scope: self._changes.get((cell, other, measure, scope)) for scope in scopes}
            series[f"{cell} - {other}"] = _intervals(found)
        unit = self._measures[measure]["unit"]
        figure = plot_intervals(
            series, scopes, unit, f"{self._grid.name}: {measure}, difference", percent=False, separate=2
        )
        path = self._images / f"study_{self._grid.name}_{number}_{measure.split()[0]}.png"
        save(figure, path)
        return Picture(path, f"Difference of the {measure} in each language, with 95 % intervals")


def is_apart(found: Mapping[str, Any]) -> bool:
    """Whether the interval of a difference excludes 0."""
    return bool(found["low"] > 0 or found["high"] < 0)


def _format_number(value: float, percent: bool, signed: bool = False) -> str:
    if percent:
        return f"{100 * value:{'+' if signed else ''}.1f}"
    sign = "+" if signed else ""
    return f"{value:{sign}.0f}" if abs(value) >= 1000 else f"{value:{sign}.3g}"  # never 1e+03


def _percent(found: Mapping[str, Any] | None) -> str:
    return "-" if found is None or found["value"] is None else f"{100 * found['value']:.0f}"


def _ends(found: Mapping[str, Any], percent: bool) -> str:
    if found["low"] is None:
        return ""
    return f" [{_format_number(found['low'], percent)}, {_format_number(found['high'], percent)}]"


def _perplexity(found: Mapping[str, Any] | None) -> str:
    if found is None or found["value"] is None:
        return "-"
    low, high = (None if found[end] is None else math.exp(found[end]) for end in ("low", "high"))
    return _format_number(math.exp(found["value"]), False) + _ends({"low": low, "high": high}, False)


def _intervals(found: Mapping[str, Mapping[str, Any] | None]) -> dict[str, tuple[float, float, float]]:
    """Value, low and high end of the figures that exist."""
    return {name: _interval(one) for name, one in found.items() if one is not None and one["value"] is not None}


def _interval(found: Mapping[str, Any]) -> tuple[float, float, float]:
    low, high = (math.nan if found[end] is None else found[end] for end in ("low", "high"))
    return found["value"], low, high
