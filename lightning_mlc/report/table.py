"""Validation before and after, as tables."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.table import Table

from lightning_mlc.metrics.per_language import SUMMARIES

Results = Mapping[str, float]

PER_LANGUAGE = {
    "rewards/accuracies": ("reward accuracy", "{:.0%}"),
    "rewards/margins": ("reward margin", "{:.3f}"),
    "nll": ("NLL per token", "{:.3f}"),
}
OVERALL = {
    "loss": "loss",
    "mlc/raw/explained_variance": "explained variance, hidden states",
    "mlc/raw/min_cosine": "smallest cosine, hidden states",
    "mlc/extracted/explained_variance": "explained variance, extracted",
    "mlc/extracted/min_cosine": "smallest cosine, extracted",
    "mlc/extracted/excess": "MLC loss above its floor, extracted",
}


def before_after_tables(
    before: Results | None, after: Results, languages: Sequence[str], source: str
) -> tuple[Table, Table]:
    """A table with a row per language, and one of what concerns all of them.

    ``before`` and ``after`` have the names that are logged (``val/rewards/accuracies/sw``); None before
    shows the values after alone.
    """
    split = next(iter(after)).split("/")[0]
    metrics = [name for name in PER_LANGUAGE if f"{split}/{name}/mean" in after]
    per_language = Table(box=box.SIMPLE_HEAD, title=_title(split, before), title_justify="left")
    per_language.add_column("language")
    for name in metrics:
        per_language.add_column(PER_LANGUAGE[name][0], justify="right")
    for row in (*languages, *SUMMARIES):
        cells = [_change(before, after, f"{split}/{name}/{row}", PER_LANGUAGE[name][1]) for name in metrics]
        last_language = row == languages[-1]
        per_language.add_row(f"{row} (source)" if row == source else row, *cells, end_section=last_language)

    overall = Table(box=box.SIMPLE_HEAD, show_header=False)
    overall.add_column("measure")
    overall.add_column("values", justify="right")
    for name, label in OVERALL.items():
        if f"{split}/{name}" in after:
            overall.add_row(label, _change(before, after, f"{split}/{name}", "{:.4f}"))
    return per_language, overall


def _title(split: str, before: Results | None) -> str:
    what = {"val": "validation", "test": "test"}.get(split, split)
    return what if before is None else f"{what}, before → after"


def _change(before: Results | None, after: Results, name: str, form: str) -> str:
    shown = [
        form.format(results[name]) if name in results else "-" for results in (before, after) if results is not None
    ]
    return " → ".join(shown) if any(cell != "-" for cell in shown) else "-"


def write_table_csv(path: Path, before: Results | None, after: Results) -> None:
    """All results as rows of ``metric, before, after``."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["metric", "before", "after"])
        for name, value in after.items():
            writer.writerow([name, "" if before is None else before.get(name, ""), value])
