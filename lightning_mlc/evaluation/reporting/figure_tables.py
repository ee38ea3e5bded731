"""Tables and pictures that show the figures of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_mlc.evaluation.reporting.cells import (
    PlainFigure,
    difference_cell,
    figure_cell,
    file_name,
    interval,
    scope_cell,
    variance_cell,
)
from lightning_mlc.evaluation.reporting.document import Block, Picture, Table
from lightning_mlc.evaluation.reporting.measures import AGREEMENT, INVALID, KAPPA, SAFE, UNSAFE, EvaluationMeasure
from lightning_mlc.evaluation.reporting.plots import plot_heatmaps, plot_intervals
from lightning_mlc.evaluation.reporting.statistics import SUMMARIES
from lightning_mlc.report import save


class FigureTables:
    """Makes tables and pictures of figures, which it finds by model, prompt set, judge, measure and scope.

    Args:
        results: The content of ``results.json``.
        plots: Folder for the pictures.
    """

    def __init__(self, results: Mapping[str, Any], plots: Path) -> None:
        self._results = results
        self._plots = plots
        self._models: list[str] = [model["name"] for model in results["models"]]
        self._figures = {_figure_key(found): found for found in results["figures"]}

    # ---- figures ------------------------------------------------------------------------------------

    def has_measure(self, part: str, judge: str, measure: EvaluationMeasure) -> bool:
        """Whether any model has figures of ``measure``."""
        return any(self._figure(model, part, judge, measure.name, "mean") for model in self._models)

    def judges(self, part: str, measure: EvaluationMeasure) -> list[str]:
        """The judges of the prompt set ``part`` that have figures of ``measure``."""
        names = dict.fromkeys(found["judge"] for found in self._results["figures"] if found["set"] == part)
        return [name for name in names if self.has_measure(part, name, measure)]

    def _figure(
        self, model: str, part: str, judge: str, measure: str, scope: str, baseline: str | None = None
    ) -> PlainFigure | None:
        return self._figures.get((model, part, judge, measure, scope, baseline))

    def _scopes(self, part: str, judge: str, measure: str) -> list[str]:
        """Languages in their order, then the summaries that exist."""
        scopes = [*self._results["languages"], *SUMMARIES]
        return [s for s in scopes if any(self._figure(model, part, judge, measure, s) for model in self._models)]

    # ---- tables -------------------------------------------------------------------------------------

    def overview(self, part: str, judge: str) -> Table:
        """One row for each model: the most important figures of safety."""
        columns = ["model", "safe, mean", "worst language", "variance, pp²", "unsafe", "invalid", "agreement", "kappa"]
        rows = []
        for model in self._models:
            variance = self._figure(model, part, judge, SAFE.name, "variance")
            rows.append(
                [
                    model,
                    figure_cell(self._figure(model, part, judge, SAFE.name, "mean")),
                    self._worst_cell(model, part, judge),
                    "-" if variance is None else variance_cell(variance),
                    figure_cell(self._figure(model, part, judge, UNSAFE.name, "mean")),
                    figure_cell(self._figure(model, part, judge, INVALID.name, "mean")),
                    figure_cell(self._figure(model, part, judge, AGREEMENT.name, "all")),
                    figure_cell(self._figure(model, part, judge, KAPPA.name, "all")),
                ]
            )
        return Table(columns, rows, "In brief", words=(0, 2))

    def _worst_cell(self, model: str, part: str, judge: str) -> str:
        worst = self._figure(model, part, judge, SAFE.name, "worst")
        if worst is None:
            return ""
        names = [
            scope
            for scope in self._results["languages"]
            if (own := self._figure(model, part, judge, SAFE.name, scope)) and own["value"] == worst["value"]
        ]
        return f"{' '.join(names[:3])}{' ...' if len(names) > 3 else ''}: {figure_cell(worst)}"

    def by_language(self, part: str, judge: str, measure: EvaluationMeasure, caption: str) -> Table:
        """A row for each language and summary, a column for each model."""
        scopes = self._scopes(part, judge, measure.name)
        rows = []
        for scope in scopes:
            cells = []
            for model in self._models:
                found = self._figure(model, part, judge, measure.name, scope)
                squared = scope == "variance" and measure.is_share
                cells.append("-" if found is None else variance_cell(found) if squared else figure_cell(found))
            rows.append([scope_cell(scope, measure.name), *cells])
        first = _first_summary(scopes)
        return Table(["", *self._models], rows, caption, strong=[first], rule_before=[first])

    def differences(self, part: str, judge: str, measure: EvaluationMeasure, caption: str) -> list[Block]:
        """Differences between the other models and the first model; nothing if there is only one model."""
        baseline = self._models[0]
        others = [m for m in self._models[1:] if self._figure(m, part, judge, measure.name, "mean", baseline)]
        if not others:
            return []
        rows: list[list[str]] = []
        every = self._scopes(part, judge, measure.name)
        scopes = [scope for scope in every if scope not in ("variance", "seen", "unseen")]
        for scope in scopes:
            cells = []
            for model in others:
                found = self._figure(model, part, judge, measure.name, scope, baseline)
                counts = f" (+{found['better']} -{found['worse']})" if found and "better" in found else ""
                cells.append("-" if found is None else difference_cell(found) + counts)
            rows.append([scope_cell(scope, measure.name), *cells])
        for name, title in ((AGREEMENT.name, "agreement"), (KAPPA.name, "kappa")) if measure == SAFE else ():
            changes = [self._figure(model, part, judge, name, "all", baseline) for model in others]
            rows.append([title, *("-" if found is None else difference_cell(found) for found in changes)])
        first = _first_summary(scopes)
        note = " (prompts that got better, worse)" if measure.is_share else ""
        return [Table(["", *others], rows, f"{caption} to {baseline}{note}", strong=[first], rule_before=[first])]

    # ---- pictures -----------------------------------------------------------------------------------

    def interval_plot(self, part: str, judge: str, measure: EvaluationMeasure, label: str) -> Picture:
        """A plot with a point and its interval for each language and model."""
        scopes = [s for s in self._scopes(part, judge, measure.name) if s not in ("variance", "spread")]
        series = {}
        for model in self._models:
            found = {scope: self._figure(model, part, judge, measure.name, scope) for scope in scopes}
            values = {s: interval(one) for s, one in found.items() if one is not None and one["value"] is not None}
            if values:
                series[model] = values
        summaries = sum(scope in SUMMARIES for scope in scopes)
        figure = plot_intervals(series, scopes, label, f"{part}: {label}", measure.is_share, summaries)
        path = self._plots / f"{file_name(part)}-{file_name(judge)}-{file_name(measure.name)}.png"
        save(figure, path)
        return Picture(path, f"{label[0].upper()}{label[1:]}, by language and model, with 95% intervals")

    def agreement_heatmap(self, part: str, judge: str) -> list[Block]:
        """A plot of the agreement of each pair of languages, for each model."""
        own = {p["model"]: p["agreement"] for p in self._results["pairs"] if (p["set"], p["judge"]) == (part, judge)}
        languages = list(next(one for one in self._results["sets"] if one["name"] == part)["languages"])
        if len(languages) < 2 or not own:
            return []
        title = "Share of prompts with the same verdict in two languages"
        path = self._plots / f"{file_name(part)}-{file_name(judge)}-agreement.png"
        save(plot_heatmaps(own, languages, title), path)
        return [Picture(path, f"{title}, by model")]


def _figure_key(found: PlainFigure) -> tuple[Any, ...]:
    return (*(found[key] for key in ("model", "set", "judge", "measure", "scope")), found.get("baseline"))


def _first_summary(scopes: list[str]) -> int:
    return next((index for index, scope in enumerate(scopes) if scope in SUMMARIES), len(scopes))
