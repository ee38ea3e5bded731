"""Tables and pictures show the numbers that they get."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from rich.console import Console

from lightning_mlc.report import before_after_tables, plot_cosines, plot_languages, save, write_table_csv

LANGUAGES = ("en", "sw", "zh")
ACCURACY, MARGIN = "val/rewards/accuracies", "val/rewards/margins"


def results(shift: float) -> dict[str, float]:
    accuracies = {"en": 0.5, "sw": 0.25, "zh": 0.75, "mean": 0.5, "worst": 0.25, "spread": 0.5}
    found = {f"{ACCURACY}/{name}": value + shift for name, value in accuracies.items()}
    found |= {f"{MARGIN}/{name}": value - 1 + shift for name, value in accuracies.items()}
    return found | {"val/loss": 0.7 - shift, "val/mlc/raw/min_cosine": 0.8}


def text(before: dict[str, float] | None, after: dict[str, float]) -> str:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in before_after_tables(before, after, LANGUAGES, "en"):
        console.print(table)
    return console.export_text()


def test_table_before_and_after() -> None:
    lines = text(results(0), results(0.125)).splitlines()
    assert any("sw" in line and "25% → 38%" in line and "-0.750 → -0.625" in line for line in lines)
    assert any("en (source)" in line for line in lines)
    assert any("worst" in line and "25% → 38%" in line for line in lines)
    assert any("loss" in line and "0.7000 → 0.5750" in line for line in lines)
    assert max(map(len, lines)) <= 80


def test_table_without_before() -> None:
    shown = text(None, results(0))
    assert "→" not in shown
    assert "25%" in shown


def test_csv(tmp_path: Path) -> None:
    write_table_csv(tmp_path / "a.csv", results(0), results(0.125) | {"val/new": 1.0})
    rows = {row["metric"]: row for row in csv.DictReader((tmp_path / "a.csv").open())}
    assert (float(rows["val/loss"]["before"]), float(rows["val/loss"]["after"])) == (0.7, 0.575)
    assert rows["val/new"]["before"] == ""


def test_bars_per_language() -> None:
    figure = plot_languages(results(0), results(0.125), LANGUAGES, ACCURACY)
    axes = figure.axes[0]
    assert [bar.get_height() for bar in axes.patches] == [0.5, 0.25, 0.75, 0.625, 0.375, 0.875]
    colours = [label.get_color() for label in axes.get_xticklabels()]
    assert colours[1] != colours[0] == colours[2]  # the worst language stands out
    lower_is_better = {
        f"val/nll/{name}": value for name, value in zip((*LANGUAGES, "worst"), (1, 2, 3, 3), strict=True)
    }
    colours = [
        label.get_color()
        for label in plot_languages(None, lower_is_better, LANGUAGES, "val/nll").axes[0].get_xticklabels()
    ]
    assert colours[2] != colours[0] == colours[1]


def test_heatmaps_share_a_scale(tmp_path: Path) -> None:
    before, after = [[1.0, 0.4], [0.4, 1.0]], [[1.0, float("nan")], [float("nan"), 1.0]]
    figure = plot_cosines(before, after, ("en", "sw"))
    images = [axes.images[0] for axes in figure.axes[:2]]
    np.testing.assert_allclose(images[0].get_array(), before)
    assert images[0].get_clim() == images[1].get_clim() == (0.4, 1.0)
    assert [t.get_text() for t in figure.axes[0].texts] == ["1", ".40", ".40", "1"]
    assert [t.get_text() for t in figure.axes[1].texts] == ["1", "1"]  # no text where the value is NaN
    save(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
