"""Prints a summary of an evaluation: the most important figures, and no text of prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_mlc.data.kinds import ORDINARY
from lightning_mlc.evaluation.judges.roster import MARGIN
from lightning_mlc.evaluation.reporting.cells import undefined_cell
from lightning_mlc.evaluation.reporting.measures import (
    DECLINE_GAP,
    INVALID,
    OVER_REFUSAL,
    REFUSAL_MARGIN,
    SAFE,
    SEPARATION,
    is_share,
)
from lightning_mlc.metrics.separation import LEAST_PROMPTS

SUMMARISED = tuple(m.name for m in (SAFE, OVER_REFUSAL, INVALID, REFUSAL_MARGIN, SEPARATION, DECLINE_GAP))
"""Names of the measures that get a table. The report has all measures."""
NOT_MEASURED = (
    "not measured: refusals of ordinary prompts. A model that refuses everything looks safe, so give ordinary prompts, "
    "too: --ordinary FILE"
)
TOO_FEW = f"too few: a language needs {LEAST_PROMPTS} prompts of each kind to be told apart"
SHARE_FORMAT = "{:.0%} [{:.0%}, {:.0%}]"
NUMBER_FORMAT = "{:.2f} [{:.2f}, {:.2f}]"


def print_summary(results: Mapping[str, Any], console: Console) -> None:
    """Print a table for each prompt set, judge and measure: languages by models.

    Args:
        results: The content of ``results.json``.
        console: Where to print.
    """
    models = [model["name"] for model in results["models"]]
    are_few = False
    for part in results["sets"]:
        own = {
            (found["judge"], found["measure"], found["scope"], found["model"]): found
            for found in results["figures"]
            if found["set"] == part["name"] and found["measure"] in SUMMARISED and "baseline" not in found
        }
        for judge, measure in dict.fromkeys((judge, measure) for judge, measure, _, _ in own):
            if measure == OVER_REFUSAL.name and part["kind"] != ORDINARY:
                continue  # `safe` and `told apart by declines` say it
            if measure == INVALID.name and not any(
                found["value"] for key, found in own.items() if key[:2] == (judge, measure)
            ):
                continue  # no response is invalid, so there is nothing to show
            by = f", judged by {judge}" if judge != MARGIN else ""
            title = f"{part['name']} ({part['kind']}, {part['prompts']} prompts): {measure}{by}"
            table = Table(box=box.SIMPLE_HEAD)
            table.add_column("language")
            for model in models:
                table.add_column(Text(model), justify="right")
            languages = list(part["languages"])
            for scope in (*languages, "mean", "worst", "seen", "unseen"):
                cells = [_cell(own.get((judge, measure, scope, model))) for model in models]
                if any(cells):
                    are_few = are_few or any(cell.startswith("too few") for cell in cells)
                    table.add_row(scope, *cells, end_section=scope == languages[-1])
            console.print(Text(title), table, sep="\n")
    if are_few:
        console.print(TOO_FEW, soft_wrap=True, highlight=False)
    if all(part["kind"] != ORDINARY for part in results["sets"]):
        console.print(NOT_MEASURED, soft_wrap=True, highlight=False)


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None or found["value"] is None:
        return "" if found is None else undefined_cell(found)
    form = SHARE_FORMAT if is_share(found["measure"]) else NUMBER_FORMAT
    return form.format(found["value"], found["low"], found["high"])
