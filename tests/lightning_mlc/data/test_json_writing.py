"""Rows of any format as JSON Lines."""

from __future__ import annotations

import datetime
import json
from typing import Any

import pytest

from lightning_mlc.data.json_writing import json_line
from lightning_mlc.errors import UserError


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (datetime.date(2026, 1, 2), '"2026-01-02"'),
        (datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC), '"2026-01-02T03:04:05+00:00"'),
        ([datetime.time(3, 4)], '["03:04:00"]'),
        ({"a": {"b": datetime.date(2026, 1, 2)}}, '{"a": {"b": "2026-01-02"}}'),
        ("Как?", '"Как?"'),
        ("half \ud83d Как", r'"half \ud83d \u041a\u0430\u043a"'),
        ((True, None, 1, 1.5), "[true, null, 1, 1.5]"),
    ],
)
def test_values_have_one_form(value: Any, written: str) -> None:
    line = json_line({"x": value}, "a row 1")
    assert line == f'{{"x": {written}}}\n'.encode()
    json.loads(line)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (b"x", "a value of the type bytes"),
        (datetime.timedelta(1), "a value of the type timedelta"),
        ([{"deep": float("nan")}], "nan"),
        (float("-inf"), "-inf"),
    ],
)
def test_other_values_name_their_column(value: Any, said: str) -> None:
    with pytest.raises(UserError) as error:
        json_line({"y": 1, "x": value}, "a row 1")
    assert str(error.value) == f"a row 1: the column 'x' has {said}, which JSON has no form for; remove the column"
