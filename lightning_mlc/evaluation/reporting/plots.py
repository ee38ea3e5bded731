"""Plots of an evaluation. Models differ in marker as well as in colour, so that grey print also shows them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lightning_mlc.report.plots import WIDTH, draw_cosines, figure_and_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""The palette of Okabe and Ito for colour-blind readers, without its yellow, which is hard to see on white paper."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", ":", "-.")

Interval = tuple[float, float, float]
"""Value, low end, high end."""


def plot_intervals(
    series: Mapping[str, Mapping[str, Interval]],
    scopes: Sequence[str],
    label: str,
    title: str,
    percent: bool,
    separate: int = 0,
) -> Figure:
    """A line per scope with a point and its interval for each model.

    Args:
        series: Intervals by model and scope. A scope that a model does not have is left out.
        scopes: Languages, then summaries, from top to bottom.
        label: Label of the axis of values.
        title: Title above the plot.
        percent: Whether the values are shares from 0 to 1.
        separate: Number of summaries at the end of ``scopes``. A rule separates them from the languages.
    """
    step = 0.3 + 0.13 * max(0, len(series) - 1)
    figure, axes = figure_and_axes(height=1.3 + step * len(scopes))
    spread = min(0.62, 0.32 * (len(series) - 1))
    for index, (name, values) in enumerate(series.items()):
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        offset = 0.0 if len(series) == 1 else spread * (index / (len(series) - 1) - 0.5)
        places = [row + offset for row, scope in enumerate(scopes) if scope in values]
        found = [values[scope] for scope in scopes if scope in values]
        points = [value for value, _, _ in found]
        left = [max(0.0, value - low) if math.isfinite(low) else 0.0 for value, low, _ in found]
        right = [max(0.0, high - value) if math.isfinite(high) else 0.0 for value, _, high in found]
        axes.errorbar(
            points,
            places,
            xerr=[left, right],
            fmt=marker,
            color=colour,
            markersize=5,
            markerfacecolor=colour if index % 2 == 0 else "white",
            elinewidth=1.1,
            capsize=2.2,
            label=name,
        )
    axes.set_yticks(range(len(scopes)), scopes, fontsize=9)
    axes.set_ylim(len(scopes) - 0.45, -0.55)
    for row in range(len(scopes) - 1):
        is_rule = separate and row == len(scopes) - separate - 1
        axes.axhline(row + 0.5, color="#777777" if is_rule else "#e6e6e6", linewidth=0.9 if is_rule else 0.6, zorder=0)
    if percent:
        from matplotlib.ticker import PercentFormatter

        lowest = min((low for values in series.values() for _, low, _ in values.values()), default=0.0)
        axes.set_xlim(min(0.0, lowest) - 0.02, 1.02)  # a difference of shares may be below 0
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    else:
        axes.axvline(0, color="#777777", linewidth=0.9, zorder=0)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_xlabel(label, fontsize=9)
    axes.set_title(title, fontsize=10, loc="left")
    if len(series) > 1:
        figure.legend(loc="outside lower center", ncols=min(4, len(series)), frameon=False, fontsize=8)
    return figure


def plot_layers(curves: Mapping[str, Mapping[str, Sequence[float | None]]], label: str, title: str) -> Figure:
    """A value at every layer, with a line for each model and kind of hidden states.

    Args:
        curves: Values of all layers from 0 (embeddings) on, by model and then by ``raw`` or ``centred``.
        label: Label of the axis of values.
        title: Title above the plot.
    """
    figure, axes = figure_and_axes(height=3.6)
    for index, (name, ways) in enumerate(curves.items()):
        for number, (way, values) in enumerate(ways.items()):
            axes.plot(
                range(len(values)),
                [math.nan if value is None else value for value in values],
                LINES[number % len(LINES)],
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                markevery=max(1, len(values) // 8),
                markersize=4,
                markerfacecolor=COLOURS[index % len(COLOURS)] if index % 2 == 0 else "white",
                linewidth=1.4,
                label=f"{name}, {way}",
            )
    axes.set_xlabel("layer (0: embeddings)", fontsize=9)
    axes.set_ylabel(label, fontsize=9)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=10, loc="left")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def plot_spectra(spectra: Mapping[str, Sequence[float | None]], title: str) -> Figure:
    """Shares of the squared singular values, largest first, on a logarithmic axis; a line for each name."""
    figure, axes = figure_and_axes(height=3.4)
    for index, (name, shares) in enumerate(spectra.items()):
        values = [math.nan if share is None or share <= 0 else share for share in shares]
        axes.semilogy(
            range(1, len(values) + 1),
            values,
            LINES[index % len(LINES)],
            color=COLOURS[index % len(COLOURS)],
            marker=MARKERS[index % len(MARKERS)],
            markersize=4.5,
            markerfacecolor=COLOURS[index % len(COLOURS)] if index % 2 == 0 else "white",
            linewidth=1.2,
            label=name,
        )
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xticks(range(1, 1 + max((len(shares) for shares in spectra.values()), default=1)))
    axes.set_xlabel("singular value", fontsize=9)
    axes.set_ylabel("share of the sum of squares", fontsize=9)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=10, loc="left")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    return figure


def plot_heatmaps(
    panels: Mapping[str, Sequence[Sequence[float | None]]], languages: Sequence[str], title: str
) -> Figure:
    """(L, L) matrices of values up to 1, at most two in a row, on one colour scale."""
    from matplotlib.figure import Figure

    matrices = {
        name: [[math.nan if value is None else value for value in row] for row in matrix]
        for name, matrix in panels.items()
    }
    columns = 1 if len(matrices) == 1 or len(languages) > 14 else 2
    rows = -(-len(matrices) // columns)
    width = WIDTH if columns == 2 or len(languages) > 10 else 5.0
    side = (width - 1.1) / columns
    figure = Figure(figsize=(width, rows * (side + 0.35) + 0.4), layout="constrained")
    known = [value for matrix in matrices.values() for row in matrix for value in row if math.isfinite(value)]
    low = min([*known, 0.95])  # because on a narrower scale rounding looks like a pattern
    all_axes = figure.subplots(rows, columns, squeeze=False).ravel()
    image: Any = None
    for axes, (name, matrix) in zip(all_axes, matrices.items(), strict=False):
        image = draw_cosines(axes, matrix, languages, low, side)
        axes.set_title(name, fontsize=9, loc="left")
    for axes in all_axes[len(matrices) :]:
        axes.set_visible(False)
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    bar = figure.colorbar(image, ax=list(all_axes), shrink=0.85 if rows == 1 else 0.5, aspect=30, pad=0.02)
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    return figure
