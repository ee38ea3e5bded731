"""The page of models agrees with the tests."""

from __future__ import annotations

from families.architectures import FAMILIES
from families.table import PAGE


def test_the_page_names_every_family() -> None:
    text = PAGE.read_text(encoding="utf-8")
    missing = [
        family.name
        for family in FAMILIES
        if f"| {family.name} | `{family.model_type}` |" not in text and f"- **{family.name}**" not in text
    ]
    assert missing == [], "run the matrix and `python -m families.table` again"


def test_the_page_names_no_other() -> None:
    rows = [
        line.split(" | ")[0].removeprefix("| ")
        for line in PAGE.read_text(encoding="utf-8").splitlines()
        if line.startswith("| ")
    ]
    assert set(rows[1:]) <= {family.name for family in FAMILIES}
