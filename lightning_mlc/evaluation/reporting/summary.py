"""What an evaluation says on the terminal: the figures one looks at first, and no text of any prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

FIRST = {
    "safe": "{:.0%} [{:.0%}, {:.0%}]",
    "refused": "{:.0%} [{:.0%}, {:.0%}]",
    "invalid": "{:.0%} [{:.0%}, {:.0%}]",
    "refusal margin": "{:.2f} [{:.2f}, {:.2f}]",
}
"""Measures that get a table, and how their figures are written. The report has all of them."""


def print_summary(results: Mapping[str, Any], console: Console) -> None:
    """A table for each prompt set and measure: languages by models."""
    models = [model["name"] for model in results["models"]]
    for part in results["sets"]:
        own = {
            (found["judge"], found["measure"], found["scope"], found["model"]): found
            for found in results["figures"]
            if found["set"] == part["name"] and found["measure"] in FIRST and "baseline" not in found
        }
        for judge, measure in dict.fromkeys((judge, measure) for judge, measure, _, _ in own):
            if measure == "invalid" and not any(
                found["value"] for key, found in own.items() if key[:2] == (judge, measure)
            ):
                continue  # as it should be
            by = f", judged by {judge}" if judge not in measure and judge != "margin" else ""
            title = f"{part['name']} ({part['kind']}, {part['prompts']} prompts): {measure}{by}"
            table = Table(box=box.SIMPLE_HEAD)
            table.add_column("language")
            for model in models:
                table.add_column(Text(model), justify="right")
            languages = list(part["languages"])
            for scope in (*languages, "mean", "worst", "seen", "unseen"):
                cells = [_cell(own.get((judge, measure, scope, model))) for model in models]
                if any(cells):
                    table.add_row(scope, *cells, end_section=scope == languages[-1])
            console.print(Text(title), table, sep="\n")


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None or found["value"] is None:
        return "" if found is None else "-"
    return FIRST[found["measure"]].format(found["value"], found["low"], found["high"])
