"""Writes figures, which are plain values of ``results.json``, as cells of a table."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lightning_mlc.evaluation.reporting.measures import is_share

PlainFigure = Mapping[str, Any]
"""A figure of ``results.json``."""


def interval(found: PlainFigure) -> tuple[float, float, float]:
    """The value and the two ends of its interval. An unknown end is replaced by the value."""
    value, low, high = found["value"], found["low"], found["high"]
    return value, value if low is None else low, value if high is None else high


def figure_cell(found: PlainFigure | None) -> str:
    """``96% [90, 99]`` for a share, ``1.25 [1.10, 1.40]`` for other figures, ``-`` for none."""
    if found is None:
        return "-"
    value, low, high = (found[key] for key in ("value", "low", "high"))
    if value is None:
        return undefined_cell(found)
    if is_share(found["measure"]) and found["scope"] != "variance":
        return f"{100 * value:.0f}%" + ("" if low is None else f" [{100 * low:.0f}, {100 * high:.0f}]")
    return f"{value:.2f}" + ("" if low is None else f" [{low:.2f}, {high:.2f}]")


def undefined_cell(found: PlainFigure) -> str:
    """The reason why a figure has no value, as far as it is known."""
    if "kinds" not in found:
        return "undefined"
    harmful, ordinary = found["kinds"]
    return f"too few ({harmful} harmful, {ordinary} ordinary)"


def difference_cell(found: PlainFigure) -> str:
    """``+4 pp [-1, +9]`` for a share, ``+0.25 [+0.10, +0.40]`` for other figures."""
    value, low, high = (found[key] for key in ("value", "low", "high"))
    if value is None:
        return "undefined"
    if is_share(found["measure"]):
        value, low, high = (f"{100 * number:+.0f}" for number in (value, low, high))
        return f"{_unsigned_zero(value)} pp [{_unsigned_zero(low)}, {_unsigned_zero(high)}]"
    value, low, high = (f"{number:+.2f}" for number in (value, low, high))
    return f"{_unsigned_zero(value)} [{_unsigned_zero(low)}, {_unsigned_zero(high)}]"


def _unsigned_zero(number: str) -> str:
    return number.lstrip("+-") if float(number) == 0 else number


def variance_cell(found: PlainFigure) -> str:
    """``12.3 [8.1, 20.4] (0.12)``: a variance of shares in squared percentage points, and as in arXiv 2602.16660.

    The latter is the variance of fractions, times 100.
    """
    value, low, high = (found[key] for key in ("value", "low", "high"))
    if value is None:
        return undefined_cell(found)
    return f"{1e4 * value:.1f} [{1e4 * low:.1f}, {1e4 * high:.1f}] ({100 * value:.2f})"


def scope_cell(scope: str, measure: str) -> str:
    """The heading of a row, which is a language or a summary."""
    if scope == "variance":
        return "variance, pp²" if is_share(measure) else "variance"
    return {"seen": "mean, seen in training", "unseen": "mean, unseen"}.get(scope, scope)


def number_cell(value: float | None) -> str:
    """Three decimals. A value is undefined if hidden states are not finite, or are all the same."""
    return "undefined" if value is None else f"{value:.3f}"


def file_name(text: str) -> str:
    """``text`` as a part of a file name."""
    return re.sub(r"[^\w.-]+", "_", text)
