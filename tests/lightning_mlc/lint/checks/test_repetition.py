"""Texts that repeat themselves."""

from __future__ import annotations

import pytest
from translations import fault, fault_of_source

SOURCE = "How do I keep my bicycle from rusting in winter?"


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("sw", "Ninawezaje " + "kuzuia baiskeli yangu isipate " * 8),
        ("ru", "Как " + "очень " * 30),
        ("zh", "冬天" + "怎样防止" * 9),
    ],
)
def test_loops_are_found(language: str, text: str) -> None:
    assert (fault("repetition", SOURCE, text, language) or "").startswith("four words in a row occur ")
    assert fault_of_source("repetition", text, language) is not None


@pytest.mark.parametrize(
    ("source", "language", "text"),
    [
        (SOURCE, "sw", "kuzuia baiskeli yangu isipate " * 5),
        (
            SOURCE,
            "ru",
            "Как зимой уберечь велосипед от ржавчины? " + " ".join(f"а{n} б{n} в{n} г{n}" for n in range(60)),
        ),
        ("no " * 40, "de", "nein " * 40),
        (SOURCE, "zh", "冬天怎样防止自行车生锈？"),
    ],
)
def test_near_misses(source: str, language: str, text: str) -> None:
    assert fault("repetition", source, text, language) is None
