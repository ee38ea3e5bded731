"""A report as JSON and as HTML. No text of the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lightning_mlc import __version__
from lightning_mlc.lint.linting import Report

MOST_ROWS = 1000
"""Findings in rows that the HTML page lists."""


def to_json(report: Report) -> str:
    """All counts and all findings."""
    counts = report.counts()
    document: dict[str, Any] = {
        "version": __version__,
        "files": report.files,
        "source_language": report.source_language,
        "rows": report.rows,
        "texts": report.texts,
        "errors": report.total("error"),
        "warnings": report.total("warning"),
        "checks": {
            check.name: {
                "severity": check.severity,
                "title": check.title,
                "counts": {language: counts[check.name, language] for language in report.texts},
            }
            for check in report.checks
        },
        "columns": [finding._asdict() for finding in report.of_columns],
        "findings": [
            {"file": found.file, "row": found.row, "id": found.id, **found.finding._asdict()}
            for found in report.of_rows
        ],
    }
    return json.dumps(document, indent=1) + "\n"  # in ASCII, because an id may have an unpaired surrogate


def to_html(report: Report) -> str:
    """One page that needs no other file and runs no script."""
    counts = report.counts()
    cells = []
    for check in report.checks:
        row = [counts[check.name, language] for language in report.texts]
        shares = [count / max(1, texts) for count, texts in zip(row, report.texts.values(), strict=True)]
        # The square root, because a share of 1 % should be seen, too.
        shades = [round(min(1.0, share) ** 0.5, 2) for share in shares]
        cells.append(
            {
                "name": check.name,
                "title": check.title,
                "severity": check.severity,
                "cells": [{"count": count, "shade": shade} for count, shade in zip(row, shades, strict=True)],
                "total": sum(row),
            }
        )
    ordered = sorted(report.of_rows, key=lambda found: found.finding.severity)
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    return templates.get_template("report.html.jinja").render(
        report=report,
        texts=sum(report.texts.values()),
        errors=report.total("error"),
        warnings=report.total("warning"),
        cells=cells,
        rows=ordered[:MOST_ROWS],
        left=max(0, len(ordered) - MOST_ROWS),
    )
