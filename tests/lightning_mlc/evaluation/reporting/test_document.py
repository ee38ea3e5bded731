"""The two forms of a report: text can never become markup, and both have the same content."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lightning_mlc.evaluation.reporting.document import (
    Block,
    Heading,
    Paragraph,
    Picture,
    Table,
    Verbatim,
    to_html,
    to_markdown,
)
from lightning_mlc.evaluation.reporting.plots import plot_heatmaps, plot_intervals, plot_layers, plot_spectra
from lightning_mlc.report import save

EVIL = "</title><script>alert(1)</script>&"


def test_html_escapes_whatever_it_is_given() -> None:
    blocks: list[Block] = [Heading(EVIL, 1), Paragraph(EVIL), Table([EVIL, "b"], [[EVIL, EVIL]], EVIL), Verbatim(EVIL)]
    written = to_html(blocks)
    assert "<script" not in written
    assert written.count("&lt;script&gt;alert(1)&lt;/script&gt;&amp;") == 8  # the title twice, two in the table's row


def test_markdown_cells_stay_cells() -> None:
    table = Table(["a", "b"], [["x|y", "two\nlines"], ["z", ""]], "Caption", strong=[0])
    assert to_markdown([table], Path()) == (
        "Caption\n\n| a | b |\n| :-- | --: |\n| **x\\|y** | **two lines** |\n| z |  |\n"
    )


@pytest.mark.parametrize("text", ["a", "```", "`````", "a ```` b"])
def test_a_fence_is_longer_than_any_in_its_text(text: str) -> None:
    fence, *inside, end = to_markdown([Verbatim(text)], Path()).rstrip("\n").split("\n")
    assert inside == [text]
    assert fence == f"{end}text"
    assert set(end) == {"`"}
    assert end not in text


def test_tables_side_by_side_and_intervals_behind_their_figures() -> None:
    table = Table(["", "m"], [["en", "50% [10, 90]"]], rule_before=[0], strong=[0])
    written = to_html([table, table, Paragraph("`code` then text")])
    assert written.count('<div class="tables">') == 1
    assert '<tr class="strong rule">\n<th scope="row" class="words">en</th>' in written
    assert "<td>50% <small>[10, 90]</small></td>" in written
    assert "<p><code>code</code> then text</p>" in written


def test_text_as_it_is_keeps_its_lines_and_spaces() -> None:
    assert '<pre lang="ar" dir="auto">a\n\n  `b` [c]\n</pre>' in to_html([Verbatim("a\n\n  `b` [c]\n", "ar")])


def test_pictures_are_inside_html_and_beside_markdown(tmp_path: Path) -> None:
    (tmp_path / "plots").mkdir()
    path = tmp_path / "plots" / "one.png"
    series = {"a": {"en": (0.5, 0.2, 0.7), "mean": (0.4, 0.3, 0.5)}, "b": {"en": (0.9, 0.9, 0.9)}}
    save(plot_intervals(series, ["en", "sw", "mean"], "safe", "title", percent=True, separate=1), path)
    picture = Picture(path, 'Safe "responses"')
    assert to_markdown([picture], tmp_path) == '![Safe "responses"](plots/one.png)\n'
    written = to_html([picture])
    assert re.findall(r"""(?:src|href|url)\b\W+(.{15})""", written) == ["data:image/png;"]
    assert ".tables { display: flex;" in written  # the style is included too
    assert 'width="750" alt="Safe &#34;responses&#34;"' in written  # 7.5 inches at 100 pixels per inch


def test_models_differ_in_marker_and_not_in_colour_alone() -> None:
    series = {name: {"en": (0.5, 0.4, 0.6)} for name in "abcdefg"}
    axes = plot_intervals(series, ["en"], "safe", "title", percent=True).axes[0]
    points = [container[0] for container in axes.containers]
    looks = {(point.get_marker(), str(point.get_markerfacecolor()) == "white") for point in points}
    assert len(looks) == 7
    assert [float(point.get_xdata()[0]) for point in points] == [0.5] * 7
    assert len({float(point.get_ydata()[0]) for point in points}) == 7


def test_what_is_unknown_leaves_a_gap() -> None:
    axes = plot_layers({"m": {"raw": [1.0, None, 0.5], "centred": [None, 0.2, 0.1]}}, "y", "title").axes[0]
    assert [line.get_linestyle() for line in axes.get_lines()] == ["-", "--"]
    assert [str(value) for value in axes.get_lines()[1].get_ydata()] == ["nan", "0.2", "0.1"]
    spectrum = plot_spectra({"m": [0.9, 0.1, 0.0, None]}, "title").axes[0].get_lines()[0]
    assert [str(value) for value in spectrum.get_ydata()] == ["0.9", "0.1", "nan", "nan"]
    figure = plot_heatmaps(
        {"a": [[1, None], [None, 1]], "b": [[1, 0.2], [0.2, 1]], "c": [[1, 1], [1, 1]]}, ["x", "y"], "t"
    )
    assert [axes.get_visible() for axes in figure.axes[:4]] == [True, True, True, False]
    assert [text.get_text() for text in figure.axes[0].texts] == ["1", "1"]


def test_markdown_passes_no_html_on(tmp_path: Path) -> None:
    blocks = [Heading("<img src=x>"), Paragraph("a `<b>` & <c>"), Table(["d"], [["<e>|f"]], "<g>")]
    text = to_markdown(blocks, tmp_path)
    assert "`<b>`" in text
    for tricky in ("``<b>`", "\\`<b>`"):  # Markdown must not take it for code
        assert "<b>" not in to_markdown([Paragraph(tricky)], tmp_path)
    assert not re.search("<(?!b>)", text)
    assert "&lt;e&gt;\\|f" in text
