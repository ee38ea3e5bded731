"""The report as JSON and HTML."""

from __future__ import annotations

import json
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


def test_html_is_darker_where_more_is_found(report: Report) -> None:
    page = to_html(report)
    assert "rgba(200, 40, 40, 0.5)" in page  # one in four Russian texts
    assert "rgba(200, 40, 40, 1.0)" in page  # the only Swahili one
    assert "rgba(200, 40, 40, 0.0)" in page
