"""Pictures of before and after. matplotlib is imported when one is drawn, and pyplot never."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BEFORE, AFTER, WORST = "#b8c4d0", "#2b6cb0", "#b7410e"
Matrix = Sequence[Sequence[float]]


def figure_and_axes(ax: Any = None, width: float = 7.0, height: float = 4.0) -> tuple[Figure, Any]:
    """``ax`` with its figure, or a new figure with one."""
    if ax is not None:
        return ax.get_figure(), ax
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def plot_languages(
    before: Mapping[str, float] | None, after: Mapping[str, float], languages: Sequence[str], metric: str
) -> Figure:
    """A pair of bars for each language: ``metric`` (``val/rewards/margins``) before and after.

    The worst language after training has its name in another colour.
    """
    higher_is_better = not metric.endswith("nll")
    shown = [language for language in languages if f"{metric}/{language}" in after]
    figure, axes = figure_and_axes(width=max(6.0, 1.0 + 0.75 * len(shown)), height=3.8)
    series = [("before", before, BEFORE), ("after", after, AFTER)]
    series = [entry for entry in series if entry[1] is not None]
    width = 0.8 / len(series)
    for index, (label, results, colour) in enumerate(series):
        heights = [(results or {}).get(f"{metric}/{language}", math.nan) for language in shown]
        left = [position + (index - (len(series) - 1) / 2) * width for position in range(len(shown))]
        bars = axes.bar(left, heights, width, label=label, color=colour)
        if label == "after":
            axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
    worst = f"{metric}/worst"
    axes.set_xticks(range(len(shown)), shown)
    if worst in after and shown:
        order = sorted(shown, key=lambda language: after[f"{metric}/{language}"], reverse=not higher_is_better)
        axes.get_xticklabels()[shown.index(order[0])].set_color(WORST)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylabel(metric.split("/", 1)[1])
    axes.set_title("Source-language responses after the prompt in each language", fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.15)
    return figure


def plot_cosines(before: Matrix | None, after: Matrix, languages: Sequence[str]) -> Figure:
    """Heatmaps of the mean cosines between languages, before and after, on one colour scale."""
    from matplotlib.figure import Figure

    panels = [("after", after)] if before is None else [("before", before), ("after", after)]
    side = max(3.2, 0.42 * len(languages) + 1.0)
    figure = Figure(figsize=(side * len(panels) + 0.6, side), layout="constrained")
    values = [value for _, matrix in panels for row in matrix for value in row if math.isfinite(value)]
    # The lowest value of both panels: on a scale from -1 all of them would look the same.
    low = min(values, default=0.0)
    image = None
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, matrix) in zip(all_axes, panels, strict=True):
        image = draw_cosines(axes, matrix, languages, low)
        axes.set_title(f"cosine of hidden states, {title}", fontsize=9, loc="left")
    if image is not None:
        figure.colorbar(image, ax=list(all_axes), shrink=0.8)
    return figure


def draw_cosines(axes: Any, matrix: Matrix, languages: Sequence[str], low: float | None = None) -> Any:
    """One heatmap on ``axes``, with the values in its cells; returns the image."""
    finite = [value for row in matrix for value in row if math.isfinite(value)]
    low = min(finite, default=0.0) if low is None else low
    image = axes.imshow([list(row) for row in matrix], vmin=min(low, 0.999), vmax=1.0, cmap="cividis")
    axes.set_xticks(range(len(languages)), languages, fontsize=8)
    axes.set_yticks(range(len(languages)), languages, fontsize=8)
    middle = (low + 1.0) / 2
    size = 7 if len(languages) <= 12 else 5 if len(languages) <= 20 else 0
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            if size and math.isfinite(value):
                colour = "white" if value < middle else "black"
                text = f"{value:.2f}".replace("0.", ".") if value < 0.995 else "1"
                axes.text(j, i, text, ha="center", va="center", fontsize=size, color=colour)
    return image


def save(figure: Figure, path: Path) -> None:
    """Write ``figure`` as PNG, whole or not at all."""
    handle, unfinished = tempfile.mkstemp(dir=path.parent, suffix=".png")
    os.close(handle)
    try:
        figure.savefig(unfinished, dpi=150)
        os.chmod(unfinished, 0o644)
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise
