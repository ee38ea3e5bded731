"""What an evaluation says on the terminal: the figures one looks at first, and no text of any prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

FIRST = ("safe", "refused", "refusal margin", "reward accuracy")
"""Measures, in the order of their columns."""


def print_summary(results: Mapping[str, Any], console: Console) -> None:
    """A table for each prompt set and model: languages by what was measured."""
    figures = [found for found in results["figures"] if "baseline" not in found and found["measure"] in FIRST]
    for part in results["sets"]:
        for model in results["models"]:
            own = {
                (found["judge"], found["measure"], found["scope"]): found
                for found in figures
                if (found["set"], found["model"]) == (part["name"], model["name"])
            }
            columns = dict.fromkeys((judge, measure) for judge, measure, _ in own)
            ordered = sorted(columns, key=lambda column: FIRST.index(column[1]))
            if not ordered:
                continue
            title = f"{model['name']}, {part['name']} ({part['kind']}, {part['prompts']} prompts)"
            table = Table(box=box.SIMPLE_HEAD, title=Text(title), title_justify="left")
            table.add_column("language")
            for judge, measure in ordered:
                table.add_column(
                    measure if judge == measure or judge in measure else f"{measure} ({judge})", justify="right"
                )
            languages = list(part["languages"])
            for scope in (*languages, "mean", "worst", "seen", "unseen"):
                cells = [_cell(own.get((*column, scope))) for column in ordered]
                if any(cells):
                    table.add_row(scope, *cells, end_section=scope == languages[-1])
            console.print(table)


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    value, low, high = (found[key] for key in ("value", "low", "high"))
    if value is None:
        return "-"
    if found["measure"] == "refusal margin":
        return f"{value:.2f} [{low:.2f}, {high:.2f}]"
    return f"{value:.0%} [{low:.0%}, {high:.0%}]"
