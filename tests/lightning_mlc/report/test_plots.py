"""The contents of figures, read back from their artists."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from lightning_mlc.report import plot_cosines, plot_languages, save

ROOT = Path(__file__).parents[3]
MARGIN = "val/rewards/margins"
MANY = tuple(f"l{i}" for i in range(30))


def margins(values: dict[str, float]) -> dict[str, float]:
    return {f"{MARGIN}/{name}": value for name, value in values.items()}


def labels(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def symmetric(size: int, low: float, high: float) -> np.ndarray:
    values = np.random.default_rng(0).uniform(low, high, (size, size))
    values = (values + values.T) / 2
    np.fill_diagonal(values, 1)
    return values


def draw(figure: Figure) -> None:
    """Lay ``figure`` out as if shown 900 pixels wide. Without an Agg canvas there would be no layout."""
    figure.set_dpi(900 / figure.get_figwidth())
    FigureCanvasAgg(figure).draw()


def nothing_hangs_out(figure: Figure) -> bool:
    """Whether all that was drawn lies inside the figure."""
    box = figure.get_tightbbox()  # inches
    width, height = figure.get_size_inches()
    return bool(box.x0 >= -0.01 and box.y0 >= -0.01 and box.x1 <= width + 0.01 and box.y1 <= height + 0.01)


def overlap(texts: Sequence[Text]) -> bool:
    boxes = [text.get_window_extent() for text in texts]
    return any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_values_stand_at_their_bars_and_nan_is_not_missing() -> None:
    before = margins({"en": -0.25, "zh": 12.34})
    after = margins({"en": 0.5, "sw": math.nan, "zh": 123.4, "worst": math.nan})
    figure = plot_languages(before, after, ("en", "sw", "zh", "xx"), MARGIN)
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    np.testing.assert_allclose(heights, [-0.25, math.nan, 12.34, 0.5, math.nan, 123.4])
    # No earlier value in Swahili: no text. NaN later: the text says so. xx is in neither.
    assert labels(figure) == ["-0.25", "12.3", "0.50", "NaN", "123"]
    assert [text.get_text() for text in figure.axes[0].get_xticklabels()] == ["en", "sw", "zh"]


def test_the_worst_is_marked_in_words_and_ties_with_it() -> None:
    after = margins({"en": 0.5, "sw": 0.25, "zh": 0.25, "worst": 0.25})
    ticks = plot_languages(None, after, ("en", "sw", "zh"), MARGIN).axes[0].get_xticklabels()
    assert [tick.get_text() for tick in ticks] == ["en", "sw\nworst", "zh\nworst"]
    level = margins({"en": 0.5, "sw": 0.5, "worst": 0.5})
    ticks = plot_languages(None, level, ("en", "sw"), MARGIN).axes[0].get_xticklabels()
    assert [tick.get_text() for tick in ticks] == ["en", "sw"]  # all equal, so none is the worst


def test_accuracies_are_percentages_and_titles_can_be_chosen() -> None:
    after = {"val/rewards/accuracies/en": 0.5, "val/rewards/accuracies/sw": 1.0}
    figure = plot_languages(None, after, ("en", "sw"), "val/rewards/accuracies")
    assert labels(figure) == ["50%", "100%"]
    assert figure.axes[0].get_ylabel() == "reward accuracy"
    figure = plot_languages(None, after, ("en", "sw"), "val/rewards/accuracies", title="T", label="L")
    assert (figure.axes[0].get_title(loc="left"), figure.axes[0].get_ylabel()) == ("T", "L")


def test_a_legend_only_where_there_are_two_series() -> None:
    values = margins({"en": 0.5, "sw": 0.25})
    both = plot_languages(values, values, ("en", "sw"), MARGIN)
    assert [text.get_text() for text in both.legends[0].get_texts()] == ["before", "after"]
    assert not plot_languages(None, values, ("en", "sw"), MARGIN).legends


def test_many_languages_lie_down_in_reading_order() -> None:
    after = margins({name: 0.01 * (i + 1) for i, name in enumerate(MANY)} | {"worst": 0.01})
    axes = plot_languages(after, after, MANY, MARGIN).axes[0]
    assert [bar.get_width() for bar in axes.patches][30:] == pytest.approx([0.01 * (i + 1) for i in range(30)])
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["worst  l0", *MANY[1:]]
    bottom, top = axes.get_ylim()
    assert top < bottom  # the first language is at the top


@pytest.mark.parametrize("count", [2, 10, 11, 30])
def test_bars_have_the_width_of_a_page_and_nothing_hangs_out(count: int) -> None:
    after = margins({name: 0.1 * (i % 7) - 0.2 for i, name in enumerate(MANY[:count])} | {"worst": -0.2})
    figure = plot_languages(after, after, MANY[:count], MARGIN)
    draw(figure)
    values = figure.axes[0].texts
    assert nothing_hangs_out(figure)
    assert not overlap(values)
    assert min(text.get_window_extent().height for text in values) >= 8  # pixels


@pytest.mark.parametrize("count", [2, 16, 17])
def test_heatmaps_say_their_values_within_their_cells(count: int) -> None:
    before, after = symmetric(count, 0.82, 0.96), symmetric(count, 0.95, 0.99)
    figure = plot_cosines(before, after, MANY[:count])
    draw(figure)
    assert nothing_hangs_out(figure)
    for axes, matrix in zip(figure.axes[:2], (before, after), strict=True):
        np.testing.assert_allclose(axes.images[0].get_array(), matrix)
        assert axes.images[0].get_clim() == (before.min(), 1.0)
        shown = [1.0 if text.get_text() == "1" else float(text.get_text()) for text in axes.texts]
        np.testing.assert_allclose(shown, matrix.ravel(), atol=0.0051)
        cell = axes.get_window_extent().width / count
        row = [text.get_window_extent() for text in axes.texts[:count]]
        assert max(extent.width for extent in row) < cell
        assert min(extent.height for extent in row) >= 7  # pixels
        ticks = axes.get_xticklabels()
        assert not overlap(ticks)


def test_text_is_dark_on_light_and_light_on_dark() -> None:
    axes = plot_cosines(None, [[1.0, 0.5], [0.5, 1.0]], ("en", "sw")).axes[0]
    assert [text.get_color() for text in axes.texts] == ["black", "white", "white", "black"]


def test_a_third_digit_near_one_line_and_negative_values_keep_their_sign() -> None:
    close = plot_cosines(None, [[1.0, 0.9912], [0.9912, 0.9999]], ("en", "sw"))
    assert labels(close) == ["1", ".991", ".991", "1"]
    apart = plot_cosines(None, [[1.0, -0.4], [-0.001, -1.0]], ("en", "sw"))
    assert labels(apart) == ["1", "-.40", "0", "-1"]


def test_nothing_known_still_draws() -> None:
    figure = plot_cosines(None, np.full((2, 2), np.nan), ("en", "sw"))
    assert labels(figure) == []
    assert plot_languages(None, {}, ("en",), MARGIN).axes


@pytest.mark.parametrize("wrong", [[[1.0]], [[1.0, 0.5], [0.5]]])
def test_a_matrix_of_another_size_is_refused(wrong: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="after must be a matrix of 2 x 2"):
        plot_cosines(None, wrong, ("en", "sw"))


def test_saving_fails_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    figure = plot_languages(None, margins({"en": 0.5}), ("en",), MARGIN)
    save(figure, path)
    first = path.read_bytes()
    assert first.startswith(b"\x89PNG")
    assert first.endswith(b"IEND\xaeB`\x82")

    def half(self: Figure, file: BinaryIO, **options: object) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(OSError, match="disk full"):
        save(figure, str(path))
    assert path.read_bytes() == first
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_importing_is_cheap_and_drawing_leaves_pyplot_alone() -> None:
    code = (
        "import sys, lightning_mlc.report as r\n"
        "heavy = {'matplotlib', 'torch', 'torchmetrics', 'lightning'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "r.plot_cosines(None, [[1.0]], ['en'])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=600)
