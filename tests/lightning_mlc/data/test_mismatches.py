"""Which other example's response each example is compared with."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_mlc.data import mismatches as module
from lightning_mlc.data.hashing import digest
from lightning_mlc.data.mismatches import Mismatch
from lightning_mlc.data.records import Example


def mismatches(examples: list[Example], source: str) -> list[Mismatch] | None:
    """Mismatches from the columns that a table of ``examples`` has."""
    columns = [
        (digest(repr(e.prompts[source])), *(0 if text is None else digest(text) for text in (e.chosen, e.rejected)))
        for e in examples
    ]
    found = module.mismatches(*np.array(columns, dtype=np.int64).T)
    return None if found is None else [found.of(row) for row in range(len(examples))]


def pair(prompt: str, chosen: str, rejected: str) -> Example:
    return Example(prompt, prompt, {"en": [{"role": "user", "content": prompt}]}, chosen, rejected)


def labelled(prompt: str, response: str, label: bool) -> Example:
    chosen, rejected = (response, None) if label else (None, response)
    return Example(prompt, prompt, {"en": [{"role": "user", "content": prompt}]}, chosen, rejected, labelled=True)


def test_of_pairs_the_chosen_and_the_rejected_response_in_turn() -> None:
    examples = [pair("p", "a", "b"), pair("q", "c", "d"), pair("r", "e", "f"), pair("s", "g", "h")]
    assert mismatches(examples, "en") == [(1, "chosen"), (2, "rejected"), (3, "chosen"), (0, "rejected")]


def test_where_all_refuse_in_the_same_words() -> None:
    """The next chosen response is the example's own, the rejected one is not."""
    examples = [pair("p", "No.", "a"), pair("q", "No.", "b"), pair("r", "No.", "c")]
    assert mismatches(examples, "en") == [(1, "rejected"), (2, "rejected"), (0, "rejected")]


def test_another_response_to_the_same_prompt_is_no_mismatch() -> None:
    examples = [
        labelled("p", "a", True),
        labelled("p", "b", False),
        labelled("p", "c", False),
        labelled("q", "a", True),
        labelled("q", "d", False),
    ]
    # Row 0 would take row 3, which has the same response; rows 3 and 4 continue from the beginning.
    assert mismatches(examples, "en") == [
        (4, "rejected"),
        (3, "chosen"),
        (3, "chosen"),
        (1, "rejected"),
        (0, "chosen"),
    ]


@pytest.mark.parametrize(
    "examples",
    [
        [labelled("p", "a", True)],
        [labelled("p", "a", True), labelled("p", "b", False)],
        [labelled("p", "a", True), labelled("q", "a", True)],
        [pair("p", "a", "b"), pair("q", "b", "a")],
    ],
)
def test_where_there_is_none(examples: list[Example]) -> None:
    assert mismatches(examples, "en") is None


def test_sorted_data_takes_no_quadratic_time() -> None:
    """Identical refusals, then as many answers: a naive search would compare every pair."""
    count, compared = 1000, 0

    class Counted(int):
        __hash__ = int.__hash__

        def __eq__(self, other: object) -> bool:
            nonlocal compared
            compared += 1
            return int(self) == other

    none, prompts = [0] * count, [*range(1, count + 1), *[-1] * count]
    refusals, answers = [Counted(7) for _ in range(count)], [Counted(100 + row) for row in range(count)]
    columns = (prompts, [*refusals, *none], [*none, *answers])
    mismatched = module.mismatches(*(np.array(column, dtype=object) for column in columns))
    assert mismatched is not None
    found = [mismatched.of(row) for row in range(2 * count)]
    # Each row is compared at least with the next one. Comparing every pair would take about 500 times as many.
    assert 2 * count - 1 <= compared < 20 * count
    assert found[0] == found[count - 1] == Mismatch(count, "rejected")
    assert found[count] == found[-1] == Mismatch(0, "chosen")
