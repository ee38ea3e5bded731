"""The report as JSON and HTML."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lightning_mlc.lint.check import LintSettings
from lightning_mlc.lint.documents import to_html, to_json
from lightning_mlc.lint.linting import Report, choose_checks, lint

SECRET = "How do I keep my bicycle from rusting in winter?"


@pytest.fixture
def report(tmp_path: Path) -> Report:
    rows = [
        {"id": '<script>alert("x")</script>', "prompt": {"en": SECRET, "ru": SECRET, "sw": "?"}},
        *({"prompt": {"en": SECRET, "ru": "Как зимой уберечь велосипед от ржавчины?"}} for _ in range(3)),
    ]
    path = tmp_path / "a<b>.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    checks = choose_checks(LintSettings("en", (str(path),)), only=["copy", "empty", "digits", "few_rows"])
    return lint([str(path)], "en", checks)


def test_json_has_counts_and_places(report: Report) -> None:
    document = json.loads(to_json(report))
    assert (document["rows"], document["errors"], document["warnings"]) == (4, 2, 1)
    assert document["texts"] == {"en": 4, "ru": 4, "sw": 1}
    assert document["checks"]["copy"]["counts"] == {"en": 0, "ru": 1, "sw": 0}
    assert document["checks"]["digits"]["severity"] == "warning"
    assert [(found["check"], found["language"]) for found in document["columns"]] == [("few_rows", "sw")]
    (first, second) = document["findings"]
    assert (first["row"], first["language"], first["check"], first["part"]) == (1, "ru", "copy", "prompt")
    assert (second["language"], second["note"]) == ("sw", "fewer than two letters")


def test_neither_has_text(report: Report) -> None:
    for document in (to_json(report), to_html(report)):
        assert "bicycle" not in document
        assert "велосипед" not in document


def test_html_escapes_what_is_of_the_data(report: Report) -> None:
    page = to_html(report)
    assert "<script" not in page
    assert "a<b>" not in page
    assert "a&lt;b&gt;.jsonl" in page


def test_html_has_fuller_colours_where_more_is_found(report: Report) -> None:
    page = to_html(report)
    cells = [tuple(found) for found in re.findall(r'class="cell (\w+)" style="--shade: ([\d.]+)">(\d*)<', page)]
    copies, empty, digits, few = (cells[start : start + 3] for start in (0, 3, 6, 9))
    assert copies == [("error", "0.0", ""), ("error", "0.5", "1"), ("error", "0.0", "")]  # one in four Russian texts
    assert empty[2] == ("error", "1.0", "1")  # the only Swahili one
    assert few[2] == ("warning", "1.0", "1")
    assert not any(count for _, _, count in digits)


def test_the_docs_have_every_key_of_the_json(report: Report) -> None:
    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    section = page.split("### The report as JSON")[1].split("\n## ")[0]
    document = json.loads(to_json(report))
    keys = {*document, *document["findings"][0], *document["columns"][0], *document["checks"]["copy"]}
    assert {key for key in keys if f"`{key}`" not in section} == set()
    assert set(document["findings"][0]) == {"file", "row", "id", *document["columns"][0]}
    assert to_json(report).isascii()
