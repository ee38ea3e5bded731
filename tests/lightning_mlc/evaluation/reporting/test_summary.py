"""The summary that ``evaluate`` prints."""

from __future__ import annotations

import io

from rich.console import Console

from lightning_mlc.evaluation.reporting.summary import print_summary


def test_without_ordinary_prompts_one_line_says_what_was_not_measured() -> None:
    told = {}
    for kind in ("harmful", "ordinary"):
        console = Console(file=io.StringIO(), width=80)
        print_summary({"models": [], "figures": [], "sets": [{"name": "asked", "kind": kind}]}, console)
        assert isinstance(console.file, io.StringIO)
        told[kind] = console.file.getvalue()
    assert told["harmful"].startswith("not measured: refusals of ordinary prompts. A model that refuses everything")
    assert told["ordinary"] == ""
