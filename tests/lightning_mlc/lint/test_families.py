"""Languages that are not told apart."""

from __future__ import annotations

import pytest

from lightning_mlc.lint.families import are_related


@pytest.mark.parametrize(
    ("one", "other"),
    [("ku", "ckb"), ("kmr", "sdh"), ("nb", "no"), ("zh-Hant", "yue"), ("arz", "ar"), ("cmn", "zh"), ("en-GB", "en")],
)
def test_related(one: str, other: str) -> None:
    assert are_related(one, other)
    assert are_related(other, one)


@pytest.mark.parametrize(("one", "other"), [("ur", "ps"), ("zh", "ja"), ("es", "pt"), ("ku", "fa"), ("sw", "en")])
def test_not_related(one: str, other: str) -> None:
    assert not are_related(one, other)
