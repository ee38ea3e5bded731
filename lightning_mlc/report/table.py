"""Tables of the validation before and after training."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from lightning_mlc.files.atomic import write_whole

Results = Mapping[str, float]

PER_LANGUAGE = {
    "rewards/accuracies": ("reward accuracy", "{:.0%}"),
    "rewards/chosen": ("reward, desirable", "{:.3f}"),
    "rewards/rejected": ("reward, undesirable", "{:.3f}"),
    "rewards/margins": ("reward margin", "{:.3f}"),
    "nll": ("NLL per token", "{:.3f}"),
    "declined/harmful": ("harmful declined", "{:.0%}"),
    "declined/ordinary": ("ordinary declined", "{:.0%}"),
}
"""Metrics of each language: their label and the format of their values."""
SUMMARIES = ("mean", "worst", "spread")
"""Rows over all languages."""
OVERALL = {
    "loss": "loss",
    "mlc/raw/explained_variance": "explained variance, hidden states",
    "mlc/raw/min_cosine": "smallest cosine, hidden states",
    "mlc/extracted/explained_variance": "explained variance, extracted",
    "mlc/extracted/min_cosine": "smallest cosine, extracted",
    "mlc/extracted/excess": "MLC loss above its floor, extracted",
    "contrast/loss": "contrast loss",
    "retain/loss": "retain loss",
    "pairwise_cosine/loss": "pairwise cosine loss",
    "source_cosine/loss": "source cosine loss",
    "mpo/loss": "MPO loss",
    "dco/loss": "DCO loss",
    "self_distillation/loss": "self-distillation loss",
}


class _Change:
    """Text with an arrow, or with ``->`` if the output cannot show one, such as a file in Latin-1 or ASCII.

    The text is plain: the name of a language is not read as markup.
    """

    def __init__(self, text: str) -> None:
        self._text = text

    def _shown(self, options: ConsoleOptions) -> Text:
        return Text(self._text.replace("→", "->") if options.ascii_only else self._text, justify="right")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._shown(options)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement.get(console, options, self._shown(options))


def before_after_tables(
    before: Results | None, after: Results, languages: Sequence[str], source: str
) -> tuple[Table, Table]:
    """A table with a row per language, and a table of metrics over all languages.

    Args:
        before: Results by the names that are logged (``val/rewards/accuracies/sw``). None: show only ``after``.
        after: The same after training.
        languages: BCP-47 codes, in the order of the rows.
        source: The code of the source language.
    """
    split = next(iter(after), "val").split("/")[0]
    rows = (*languages, *SUMMARIES)
    metrics = [name for name in PER_LANGUAGE if any(f"{split}/{name}/{row}" in after for row in rows)]
    per_language = Table(box=box.SIMPLE_HEAD, title=Text(_title(split, before)), title_justify="left")
    per_language.add_column("language")
    for name in metrics:
        per_language.add_column(PER_LANGUAGE[name][0], justify="right")
    for index, row in enumerate(rows):
        cells = [_change(before, after, f"{split}/{name}/{row}", PER_LANGUAGE[name][1]) for name in metrics]
        heading = Text(f"{row} (source)" if row == source else row)
        per_language.add_row(heading, *cells, end_section=index == len(languages) - 1)

    overall = Table(box=box.SIMPLE_HEAD, show_header=False)
    overall.add_column("measure")
    overall.add_column("values", justify="right")
    for name, label in OVERALL.items():
        if f"{split}/{name}" in after:
            overall.add_row(label, _change(before, after, f"{split}/{name}", "{:.4f}"))
    return per_language, overall


def _title(split: str, before: Results | None) -> str:
    what = {"val": "validation", "test": "test"}.get(split, split)
    return what if before is None else f"{what}, before and after"


def _change(before: Results | None, after: Results, name: str, form: str) -> _Change:
    shown = [_number(results.get(name), form) for results in (before, after) if results is not None]
    return _Change(" → ".join(shown) if any(cell != "-" for cell in shown) else "-")


def _number(value: float | None, form: str) -> str:
    if value is None:
        return "-"
    return form.format(value) if math.isfinite(value) else str(value)


def write_table_csv(path: Path, before: Results | None, after: Results) -> None:
    """Write all results as rows of ``metric,before,after``, in full precision. A missing value is empty."""
    before = before or {}
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["metric", "before", "after"])
    for name in dict.fromkeys([*after, *before]):  # each once, in order
        writer.writerow([name, before.get(name, ""), after.get(name, "")])
    write_whole(path, text.getvalue())
