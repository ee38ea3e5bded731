"""The benchmark of the host: each variant launches as its name says, and the report says what is stubbed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import host
from benchmarks.stub_gpu import StubGpu
from mlc_kernels import backends, launch, mlc_loss

LAUNCHES = {"by_triton": [False] * 3, "by_plan": [True] * 3, "no_launch": [], "function": [], "sum": []}


def test_variants_launch_as_their_names_say() -> None:
    """Each one after all others, so that no patch outlives its variant."""
    assert LAUNCHES.keys() == host.VARIANTS.keys()
    with StubGpu(record=[]).installed() as gpu:
        assert gpu.record is not None
        rows = torch.zeros(4, 3, 32, requires_grad=True)
        passes = {name: host._pass(variant, rows) for name, variant in host.VARIANTS.items()}
        passes["by_plan"](host._hot)  # makes the plans
        for name in [*passes, *reversed(passes)]:
            gpu.record.clear()
            passes[name](lambda run: len([run()]))
            assert [launched.by_plan for launched in gpu.record] == LAUNCHES[name]


def test_the_stub_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._reasons, ("cpu", None), "a reason")
    with StubGpu().installed():
        mlc_loss(torch.zeros(1, 3, 32), backend="triton")
        assert launch._plans
    assert launch._plans == {}
    assert backends._reasons["cpu", None] == "a reason"


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert host.main(["--prompts", "1", "3", "--rounds", "2", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "host.json").read_text())
    assert {(row["prompts"], row["variant"]) for row in report["microseconds"]} == {
        (prompts, variant) for prompts in (1, 3) for variant in host.VARIANTS
    }
    for row in report["microseconds"]:
        assert 0 < row["hot"] <= row["hot_median"]
        assert 0 < row["cold"] <= row["cold_median"]
    by_variant = {row["variant"]: row for row in report["microseconds"] if row["prompts"] == 3}
    layers = report["layers"]["3"]
    lower = ("autograd.Function and autograd.grad", "checks, choice, allocations, layouts", "launches, by plan")
    assert sum(layers[name]["hot"] for name in lower) == pytest.approx(by_variant["by_plan"]["hot"])
    assert report["ratios"]["cold, plan / Triton, B = 3"] == pytest.approx(
        by_variant["by_plan"]["cold"] / by_variant["by_triton"]["cold"]
    )
    shown = capsys.readouterr().out
    assert all(line in shown for line in report["stubbed"])
    assert "hot, plan / Triton, B = 1: at most 0.52" in shown
    assert "hot, plan / Triton, B = 3 at these settings" in shown  # no bound
