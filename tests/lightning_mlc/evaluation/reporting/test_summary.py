"""The summary that ``evaluate`` prints."""

from __future__ import annotations

import io

from rich.console import Console

from lightning_mlc.evaluation.reporting.summary import print_summary


def test_too_few_prompts_are_told_with_the_number_that_is_needed() -> None:
    figure = {"model": "m", "set": "asked", "judge": "margin", "measure": "told apart by margin", "scope": "sw"}
    few = {**figure, "value": None, "low": None, "high": None, "kinds": (5, 7)}
    enough = {**figure, "value": 0.5, "low": 0.4, "high": 0.6, "kinds": (6, 7)}
    part = {"name": "asked", "kind": "ordinary", "prompts": 12, "languages": ["sw"]}
    lines = []
    for found in (few, enough):
        console = Console(file=io.StringIO(), width=80)
        print_summary({"models": [{"name": "m"}], "figures": [found], "sets": [part]}, console)
        assert isinstance(console.file, io.StringIO)
        lines.append(console.file.getvalue().splitlines())
    assert any("too few (5 harmful, 7 ordinary)" in line for line in lines[0])
    assert lines[0][-1] == "too few: a language needs 6 prompts of each kind to be told apart"
    assert not any("too few" in line for line in lines[1])


def test_without_ordinary_prompts_one_line_says_what_was_not_measured() -> None:
    told = {}
    for kind in ("harmful", "ordinary"):
        console = Console(file=io.StringIO(), width=80)
        print_summary({"models": [], "figures": [], "sets": [{"name": "asked", "kind": kind}]}, console)
        assert isinstance(console.file, io.StringIO)
        told[kind] = console.file.getvalue()
    assert told["harmful"].startswith("not measured: refusals of ordinary prompts. A model that refuses everything")
    assert told["ordinary"] == ""
