"""The benchmark of the kernel reports its measurements, and no speed-up if results are wrong."""

from __future__ import annotations

import csv
import json
from functools import partial
from itertools import groupby
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import alternatives, gpu, kernel, kernel_report, timing
from benchmarks.environment import ROOT
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
        assert list(row["paces"]) == list(kernel_report.PACES)
        assert row["paces"]["cold"]["median"] == row["both"]
        assert all(0 < found["p20"] <= found["median"] <= found["p80"] for found in row["paces"].values())
    assert [floor["tokens"] for floor in report["floors"]] == [0, 4]
    assert all(found["median"] > 0 for floor in report["floors"] for found in floor["paces"].values())
    assert report["settings"]["protocol"] == kernel_report.PROTOCOL
    assert torch.__version__.startswith(report["environment"]["torch"])  # without the suffix of the build
    assert len(report["speed_ups"]) == 2
    lines = list(csv.DictReader((tmp_path / "kernel.csv").open()))
    assert len(lines) == len(rows)
    assert float(lines[0]["hot_inline_p80"]) == rows[0]["paces"]["hot_inline"]["p80"]
    assert (tmp_path / "kernel.png").stat().st_size > 10_000
    assert "x best eager" in capsys.readouterr().out
    measured, floors = kernel_report.read(tmp_path / "kernel.json")
    assert kernel_report.speed_ups(measured, floors) == report["speed_ups"]


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


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls of ``a`` and ``b``, and the waits for the device, in their order."""
    found: list[str] = []
    monkeypatch.setattr(timing, "synchronize", lambda device: found.append("wait"))
    return found


def rows_of(calls: list[str]) -> list[tuple[str, int]]:
    """Name and number of the calls between two waits. Rows that are alike and follow each other are one."""
    rows = [row.split() for row in " ".join(calls).split("wait")]
    return [(name, size) for (name, size), _ in groupby((row[0], len(row)) for row in rows if row)]


SHARED = {"device": torch.device("cpu"), "seconds": 10.0, "most_rounds": 4}


def test_hot_calls_are_of_one_variant_in_a_row(calls: list[str]) -> None:
    variants = {name: partial(calls.append, name) for name in "ab"}
    times = timing.hot_times(variants, **SHARED)  # type: ignore[arg-type]
    assert rows_of(calls) == [("a", 1), ("b", 1), ("a", 1), ("b", 1), ("a", 1)]  # first all once, then in turns
    assert times["a"].rounds == times["b"].rounds == 4


def test_queued_calls_wait_once(calls: list[str]) -> None:
    variants = {name: partial(calls.append, name) for name in "ab"}
    times = timing.queued_times(variants, **SHARED)  # type: ignore[arg-type]
    many = timing.QUEUE
    turns = [[(name, 1), (name, many)] for name in "abba"]
    assert [row for row in rows_of(calls) if row[1] == many] == [("a", many), ("b", many), ("b", many), ("a", many)]
    assert rows_of(calls)[-4:] == [*turns[2], *turns[3]]
    assert times["a"].rounds == 4


def test_slow_variants_are_called_a_few_times(calls: list[str]) -> None:
    def slow() -> None:
        calls.append("a")

    shared = SHARED | {"seconds": 0.0}
    assert timing.hot_times({"a": slow}, **shared)["a"].rounds == 2  # type: ignore[arg-type]
    assert calls.count("a") == 1 + 2
    calls.clear()
    assert timing.queued_times({"a": slow}, **shared)["a"].rounds == 2  # type: ignore[arg-type]
    assert calls.count("a") == 1 + 2 * 2


def test_autograd_runs_without_its_thread_where_the_name_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def mode(*_: object) -> str:
        return "thread" if torch.autograd.is_multithreading_enabled() else "inline"  # type: ignore[attr-defined]

    for pace in ("wall", "hot", "queued"):
        monkeypatch.setattr(kernel, f"{pace}_times", mode)
    found = kernel.paces_of({}, torch.device("cpu"), 0.0)
    assert found == {pace: "inline" if pace.endswith("_inline") else "thread" for pace in kernel_report.PACES}
    assert mode() == "thread"


def row_of(provider: str, ours: bool, milliseconds: dict[str, float]) -> kernel_report.ProviderResult:
    paces = {pace: timing.Quantiles(time / 1e3, time / 1e3, time / 1e3, 2) for pace, time in milliseconds.items()}
    times = [paces["cold"].median] * 9
    return kernel_report.ProviderResult(
        8, 10, 4096, 0, "float32", provider, ours, 0.0, 0.0, *times, 2, None, None, None, paces
    )


def test_the_goal_is_judged_hot() -> None:
    """Six times as fast as the best eager form at the same pace, and not as the one that is best when cold."""
    cold = dict.fromkeys(kernel_report.PACES, 1.0)
    rows = [
        row_of("triton", True, cold | {"hot": 0.12}),
        row_of("svd", False, cold | {"hot": 0.60}),
        row_of("gram_eigh", False, cold | {"cold": 0.9, "hot": 0.84}),
    ]
    floors = [kernel_report.Floor(rows[0].shape, row_of("", False, cold | {"cold": 0.3}).paces)]
    assert kernel_report.goals(rows, floors) == [
        "goal, hot at B=8 L=10 D=4096: 0.120 ms, at most 0.15: met",
        "goal, hot at B=8 L=10 D=4096: 5.0 times as fast as svd, at least 6: missed",
        "cold there: 1.000 ms, floor 0.300 ms",
    ]
    assert kernel_report.speed_ups(rows, floors)[0]["best_eager"] == "gram_eigh"


@pytest.mark.parametrize("folder", ["cpu", "h200/kernel", "h200/kernel_bfloat16"])
def test_committed_results_can_be_read(folder: str) -> None:
    path = ROOT / "benchmarks" / "results" / folder / "kernel.json"
    rows, floors = kernel_report.read(path)
    stored = json.loads(path.read_text())["speed_ups"]
    for found, before in zip(kernel_report.speed_ups(rows, floors), stored, strict=True):
        assert {name: found[name] for name in before if name != "paces"} == {
            name: value for name, value in before.items() if name != "paces"
        }


def test_quantiles() -> None:
    assert timing.quantiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == (3.5, 2.0, 5.0, 6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_gpu_benchmarks_say_that_there_is_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "there is no GPU here" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
