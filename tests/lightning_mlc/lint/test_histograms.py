"""Medians and shares from counts."""

from __future__ import annotations

import pytest

from lightning_mlc.lint.histograms import RatioHistogram, Share


def test_a_median_is_exact_within_a_bin() -> None:
    ratios = RatioHistogram()
    for ratio in (0.1, 0.29, 0.3, 0.31, 7.0):
        ratios.add(ratio)
    assert ratios.total == 5
    assert ratios.median() == pytest.approx(0.3, rel=0.025)


def test_a_share() -> None:
    share = Share()
    assert share.value == 0
    for has in (True, True, False, True):
        share.add(has)
    assert (share.value, share.total) == (0.75, 4)
