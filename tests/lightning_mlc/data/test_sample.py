"""The sample that ships: what it has, what its data card says of it, and how the quickstart divides it."""

from __future__ import annotations

import re
from importlib.resources import files
from typing import Any

import pytest
import yaml
from datasets import Dataset

from lightning_mlc.commands.training import shipped_configs
from lightning_mlc.data.reading import read_rows
from lightning_mlc.data.splits import hold_out

FOLDER = files("lightning_mlc.data") / "sample"
CARD = (FOLDER / "README.md").read_text(encoding="utf-8")
LANGUAGES = ["en", "zh", "ru", "ja", "ar", "bn", "sw", "ur", "ps", "ku"]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [dict(row) for _, row in read_rows("sample", "file")]


def test_rows_are_whole_and_no_text_comes_twice(rows: list[dict[str, Any]]) -> None:
    assert [row["id"] for row in rows] == [f"s{number:02}" for number in range(1, len(rows) + 1)]
    for row in rows:
        assert list(row) == ["id", "kind", "prompt", "chosen", "rejected"], row["id"]
        assert list(row["prompt"]) == LANGUAGES, row["id"]
    texts = [text for row in rows for text in (*row["prompt"].values(), row["chosen"], row["rejected"])]
    assert len(set(texts)) == len(texts) == 12 * len(rows)


def test_the_data_card_counts_what_is_there(rows: list[dict[str, Any]]) -> None:
    ordinary = [row["id"] for row in rows if row["kind"] == "ordinary"]
    alarming = [id_ for ids in _alarming().values() for id_ in ids]
    counts = (len(rows), len(rows) - len(ordinary), len(ordinary), len(alarming))
    found = re.search(r"\| Rows \| (\d+): (\d+) with a harmful intent, (\d+) ordinary \((\d+) of them only", CARD)
    assert found is not None
    assert tuple(map(int, found.groups())) == counts
    assert CARD.splitlines()[2].startswith(f"{len(rows)} preference examples")
    assert f"The other {len(ordinary) - len(alarming)} ordinary prompts" in CARD
    size = len((FOLDER / "sample.jsonl").read_bytes())
    assert f"| Size | {size / 1000:.0f} KB" in CARD


def test_at_least_half_of_the_ordinary_prompts_sound_dangerous(rows: list[dict[str, Any]]) -> None:
    """They show needless refusals. Everyday questions hardly do."""
    ordinary = {row["id"] for row in rows if row["kind"] == "ordinary"}
    alarming = [id_ for ids in _alarming().values() for id_ in ids]
    assert len(ordinary) >= 62
    assert len(alarming) == len(set(alarming)) >= len(ordinary) / 2
    assert set(alarming) <= ordinary


def _alarming() -> dict[str, list[str]]:
    """The rows of each line of the card's table of alarms, which also says their number."""
    lines = re.findall(r"^\| (.+) \| (\d+) \| (s\d+(?:, s\d+)*) \|$", CARD, re.MULTILINE)
    assert len(lines) >= 10
    for alarm, count, ids in lines:
        assert int(count) == len(ids.split(", ")), alarm
    return {alarm: ids.split(", ") for alarm, _, ids in lines}


def test_the_quickstart_validates_on_six_rows_and_trains_on_none_twice(rows: list[dict[str, Any]]) -> None:
    """Its validation takes a large part of its time, and the README says its size. Both kinds are validated."""
    config = yaml.safe_load(shipped_configs()["quickstart"].read_text(encoding="utf-8"))
    table = Dataset.from_dict({"same_prompt": list(range(len(rows)))})
    train, val = hold_out(table, config["data"]["val_share"], config["seed_everything"], "sample")
    assert len(val) == 6
    assert {rows[index]["kind"] for index in val} == {"harmful", "ordinary"}
    assert config["trainer"]["max_steps"] * config["data"]["batch_size"] <= len(train)
