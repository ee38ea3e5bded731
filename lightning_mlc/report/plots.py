"""Figures of the results before and after training.

matplotlib is imported only when a figure is drawn, and pyplot never. Every figure is as wide as a column of text, so
that its letters can be read when it is shown 900 pixels wide. With more languages it gets taller instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_mlc.files.atomic import whole_file
from lightning_mlc.report.table import PER_LANGUAGE

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from matplotlib.figure import Figure

    Matrix = Sequence[Sequence[float]] | npt.NDArray[np.floating[Any]]

BEFORE, AFTER, WORST = "#b8c4d0", "#2b6cb0", "#b7410e"
"""They differ in lightness too, for readers who cannot distinguish the hues and for printers."""
UNKNOWN = "#e4e4e4"
"""Cells without a value."""

WIDTH = 7.5
"""Inches. At 900 pixels, a letter of 7 points is 12 pixels high."""
UPRIGHT_BARS = 10
"""With more languages the bars are horizontal, because their labels would overlap."""
SIDE_BY_SIDE = 16
"""With more languages one heatmap is above the other, because cells would be too small for numbers."""

Series = tuple[str, Sequence[float | None], str]
"""Label, a value per language (None if it has none), colour."""


def figure_and_axes(ax: Any = None, width: float = WIDTH, height: float = 3.8) -> tuple[Figure, Any]:
    """The figure of ``ax`` and ``ax``; or a new figure of ``width`` x ``height`` inches and its axes."""
    if ax is not None:
        return ax.get_figure(), ax
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def plot_languages(
    before: Mapping[str, float] | None,
    after: Mapping[str, float],
    languages: Sequence[str],
    metric: str,
    title: str = "Source-language responses after the prompt in each language",
    label: str | None = None,
) -> Figure:
    """Two bars for each language: ``metric`` before and after. The worst language is marked.

    Args:
        before: Results by the names that are logged. None: one bar per language.
        after: The same after training. Languages without a result are left out.
        languages: BCP-47 codes, in the order to draw them.
        metric: The beginning of the names of the results, such as ``val/rewards/margins``.
        title: The title above the bars.
        label: The label of the axis of values. None: the name of the metric in the table.
    """
    name = metric.split("/", 1)[-1]
    shown = [language for language in languages if f"{metric}/{language}" in after]
    series: list[Series] = [
        (when, [results.get(f"{metric}/{language}") for language in shown], colour)
        for when, results, colour in (("before", before, BEFORE), ("after", after, AFTER))
        if results is not None
    ]
    upright = len(shown) <= UPRIGHT_BARS
    figure, axes = figure_and_axes(height=3.8 if upright else 1.2 + 0.29 * len(shown))
    draw_bars(axes, shown, series, worst=after.get(f"{metric}/worst"), percent="accuracies" in name)
    label = PER_LANGUAGE[name][0] if label is None and name in PER_LANGUAGE else label or name
    (axes.set_ylabel if upright else axes.set_xlabel)(label, fontsize=9)
    axes.set_title(title, fontsize=10, loc="left")
    if len(series) > 1:
        figure.legend(loc="outside lower center", ncols=len(series), frameon=False, fontsize=8)
    return figure


def draw_bars(
    axes: Any,
    names: Sequence[str],
    series: Sequence[Series],
    worst: float | None = None,
    percent: bool = False,
) -> None:
    """Draw a bar with its value for each of ``series`` and each of ``names``.

    Args:
        axes: The axes to draw on.
        names: Labels of the bars.
        series: The values. Those of the last series are darker, and ``worst`` is one of them.
        worst: Names with this value are marked, unless all have it.
        percent: Whether the values are shares from 0 to 1.
    """
    upright = len(names) <= UPRIGHT_BARS
    thickness = 0.8 / max(1, len(series))
    for index, (label, values, colour) in enumerate(series):
        places = [position + (index - (len(series) - 1) / 2) * thickness for position in range(len(names))]
        lengths = [value if value is not None and math.isfinite(value) else math.nan for value in values]
        draw = axes.bar if upright else axes.barh
        draw(places, lengths, thickness, label=label or None, color=colour)
        for place, value in zip(places, values, strict=True):
            if value is not None:  # NaN is written at the start of its bar, because it must not look like "no value"
                is_last = index == len(series) - 1
                _write_value(axes, place, value, _number(value, percent), upright, "black" if is_last else "#5a6672")

    marked = _worst_of(series[-1][1], worst) if series else []
    texts = [
        (f"{name}\nworst" if upright else f"worst  {name}") if i in marked else name for i, name in enumerate(names)
    ]
    (axes.set_xticks if upright else axes.set_yticks)(range(len(names)), texts, fontsize=9)
    ticks = axes.get_xticklabels() if upright else axes.get_yticklabels()
    for index in marked:
        ticks[index].set(color=WORST, fontweight="bold")
    (axes.axhline if upright else axes.axvline)(0, color="black", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y" if upright else "x", labelsize=8)
    if percent:
        from matplotlib.ticker import PercentFormatter

        (axes.yaxis if upright else axes.xaxis).set_major_formatter(PercentFormatter(1.0, decimals=0))
    if upright:
        axes.margins(y=0.12)
        slots = max(5, len(names))  # so that the bars of two languages are not too wide
        axes.set_xlim((len(names) - 1 - slots) / 2, (len(names) - 1 + slots) / 2)
    else:
        axes.margins(x=0.1)
        axes.set_ylim(len(names) - 0.4, -0.6)


def _worst_of(values: Sequence[float | None], worst: float | None) -> list[int]:
    """Positions of the value ``worst``. Empty if all values are equally bad."""
    if worst is None:
        return []
    found = [i for i, value in enumerate(values) if value is not None and math.isclose(value, worst, rel_tol=1e-9)]
    return found if len(found) < len(values) else []


def _write_value(axes: Any, place: float, value: float, text: str, upright: bool, colour: str) -> None:
    """Write ``text`` just beyond the end of the bar at ``place``."""
    end = value if math.isfinite(value) else 0.0
    away = -1 if end < 0 else 1
    axes.annotate(
        text,
        (place, end) if upright else (end, place),
        (0, 2 * away) if upright else (3 * away, 0),
        textcoords="offset points",
        ha="center" if upright else "left" if away > 0 else "right",
        va="center_baseline" if not upright else "bottom" if away > 0 else "top",
        fontsize=6.5,
        color=colour,
    )


def _number(value: float, percent: bool) -> str:
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else str(value)
    if percent:
        return f"{value:.0%}"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:.0f}"


def plot_cosines(before: Matrix | None, after: Matrix, languages: Sequence[str]) -> Figure:
    """Heatmaps of the mean cosines between languages, before and after, on one colour scale.

    Args:
        before: (L, L) cosines, NaN if unknown. None: one heatmap.
        after: The same after training.
        languages: BCP-47 codes of the L languages.

    Raises:
        ValueError: A matrix is not (L, L).
    """
    from matplotlib.figure import Figure

    panels = [("after", after)] if before is None else [("before", before), ("after", after)]
    for name, matrix in panels:
        if len(matrix) != len(languages) or any(len(row) != len(languages) for row in matrix):
            raise ValueError(f"{name} must be a matrix of {len(languages)} x {len(languages)}, one row per language")
    columns = len(panels) if len(languages) <= SIDE_BY_SIDE else 1
    rows = len(panels) // columns
    width = WIDTH if columns == 2 or len(languages) > SIDE_BY_SIDE else 5.0
    side = (width - 1.1) / columns
    figure = Figure(figsize=(width, rows * (side + 0.3) + 0.4), layout="constrained")
    # The scale starts at the lowest value of both panels. On a scale from -1 all values would look the same.
    low = _lowest(*(matrix for _, matrix in panels))
    all_axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (name, matrix) in zip(all_axes, panels, strict=True):
        draw_cosines(axes, matrix, languages, low, side)
        axes.set_title(name, fontsize=9, loc="left")
    figure.suptitle("Cosine between the hidden states of a prompt in two languages", fontsize=10, x=0.01, ha="left")
    colourbar = figure.colorbar(
        all_axes[0].images[0], ax=list(all_axes), shrink=0.85 if rows == 1 else 0.5, aspect=30, pad=0.02
    )
    colourbar.ax.tick_params(labelsize=7)
    colourbar.outline.set_visible(False)
    return figure


def draw_cosines(
    axes: Any, matrix: Matrix, languages: Sequence[str], low: float | None = None, side: float = 3.8
) -> Any:
    """Draw one heatmap on ``axes``, with the values in its cells.

    Args:
        axes: The axes to draw on.
        matrix: (L, L) cosines. Cells without a finite value are grey and empty.
        languages: BCP-47 codes of the L languages.
        low: Lower end of the colour scale, which ends at 1. None: the lowest value.
        side: Width of the heatmap in inches, which determines the size of letters.

    Returns:
        The image, for a colour bar.
    """
    from matplotlib import colormaps

    low = _lowest(matrix) if low is None else low
    image = axes.imshow(
        [[float(value) for value in row] for row in matrix],
        vmin=min(low, 0.999),
        vmax=1.0,
        cmap=colormaps["cividis"].with_extremes(bad=UNKNOWN),
    )
    cell = 72 * side / max(1, len(languages))  # points
    # If the vectors are nearly on one line, all cosines are .99. A third digit distinguishes them, if there is room.
    decimals = 3 if low > 0.97 and cell > 20 else 2
    size = max(4.0, min(9.0, cell / (0.68 * (decimals + 1))))
    for i, row in enumerate(matrix):
        for j, value in enumerate(row):
            if math.isfinite(value):
                red, green, blue, _ = image.cmap(image.norm(value))
                colour = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.45 else "white"
                text = _short(value, decimals)
                label = axes.text(j, i, text, ha="center", va="center_baseline", fontsize=size, color=colour)
                label.set_in_layout(False)  # it is inside its cell; to measure hundreds of them takes seconds
    size = max(5.0, min(9.0, 0.7 * cell))
    wide = max(map(len, languages), default=0) * 0.65 * size > cell
    axes.set_xticks(range(len(languages)), languages, fontsize=size, rotation=90 if wide else 0)
    axes.set_yticks(range(len(languages)), languages, fontsize=size)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image


def _lowest(*matrices: Matrix) -> float:
    values = (float(value) for matrix in matrices for row in matrix for value in row)
    return min((value for value in values if math.isfinite(value)), default=0.0)


def _short(value: float, decimals: int) -> str:
    """``value`` from -1 to 1 without its leading zero: .97."""
    text = f"{value:.{decimals}f}"
    if float(text) in (-1.0, 0.0, 1.0):
        return str(int(float(text)))
    return text.replace("0.", ".", 1)


def save(figure: Figure, path: Path | str) -> None:
    """Write ``figure`` to ``path`` as PNG, whole or not at all.

    Raises:
        OSError: The folder does not exist or cannot be written to.
    """
    with whole_file(Path(path)) as file:
        figure.savefig(file, format="png", dpi=150)
