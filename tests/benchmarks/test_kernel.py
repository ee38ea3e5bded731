"""The benchmark of the kernel reports its measurements, and no speed-up if results are wrong."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import alternatives, gpu, kernel, timing
from mlc_kernels import mlc_loss

SMALL = ["--prompts", "2", "--languages", "3", "--features", "8", "--pool-tokens", "4", "--pool-features", "32"]


@pytest.fixture
def _without_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tuple(p for p in kernel.PROVIDERS if p.name != "gram_eigh_compiled")
    monkeypatch.setattr(kernel, "PROVIDERS", kept)


@pytest.mark.usefixtures("_without_compilation")
def test_writes_times_beside_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert kernel.main([*SMALL, "--device", "cpu", "--seconds", "0.01", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "kernel.json").read_text())
    rows = report["rows"]
    assert {(row["provider"], row["tokens"]) for row in rows} == {
        (name, tokens) for name in ("closed_form", "svd", "gram_eigh") for tokens in (0, 4)
    }
    for row in rows:
        assert 0 < row["forward_p20"] <= row["forward"] <= row["forward_p80"]
        assert row["both_in_graph"] is row["peak_bytes"] is None  # a CPU does not report it
        assert row["gradient_error"] < 1e-4
    assert torch.__version__.startswith(report["environment"]["torch"])  # without the suffix of the build
    assert len(report["speed_ups"]) == 2
    assert len(list(csv.DictReader((tmp_path / "kernel.csv").open()))) == len(rows)
    assert (tmp_path / "kernel.png").stat().st_size > 10_000
    assert "x best eager" in capsys.readouterr().out


@pytest.mark.usefixtures("_without_compilation")
def test_no_speed_up_of_wrong_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(rows: Tensor) -> Tensor:
        return alternatives.svd(rows) * 1.001

    published = next(p for p in kernel.PROVIDERS if p.name == "svd")
    monkeypatch.setattr(kernel, "PROVIDERS", (kernel.Provider("closed_form", wrong, ours=True), published))
    assert kernel.main([*SMALL, "--device", "cpu", "--seconds", "0.01", "--out", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "closed_form at B=2 L=3 D=8: error of the loss is 1.0e-03, allowed" in shown
    assert "best eager" not in shown
    assert json.loads((tmp_path / "kernel.json").read_text())["speed_ups"] is None
    assert not (tmp_path / "kernel.png").exists()


@pytest.mark.parametrize("alternative", [alternatives.svd, alternatives.gram_eigh])
def test_alternatives_compute_the_loss(alternative: kernel.Loss) -> None:
    rows = torch.randn(3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = mlc_loss(rows, backend="reference").item()
    assert alternative(rows).item() == pytest.approx(expected, rel=1e-5)  # a float32 SVD


def test_variants_are_timed_alike() -> None:
    calls = dict.fromkeys(("a", "b"), 0)

    def call(name: str) -> None:
        calls[name] += 1

    times = timing.wall_times({"a": lambda: call("a"), "b": lambda: call("b")}, torch.device("cpu"), most_rounds=7)
    assert times["a"].rounds == times["b"].rounds == 7
    assert calls["a"] == calls["b"] == 7 + 2


def test_quantiles() -> None:
    assert timing.quantiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == (3.5, 2.0, 5.0, 6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_gpu_benchmarks_say_that_there_is_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "there is no GPU here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
