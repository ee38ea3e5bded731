"""The benchmark of data preparation: its rows, the memory of a tree of processes, and the summary."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import save_model

from benchmarks.data import anonymous_bytes, measure_preparation, scaling_by_processes, write_rows


def test_rows_are_those_of_the_sample_and_no_text_comes_twice(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", 150)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len({row["id"] for row in rows}) == 150
    assert rows[0]["prompt"]["en"].removesuffix("(0)") == rows[108]["prompt"]["en"].removesuffix("(108)")
    texts = [text for row in rows for text in (*row["prompt"].values(), row["chosen"], row["rejected"])]
    assert len(set(texts)) == len(texts) == 150 * 12


def test_memory_of_a_child_counts() -> None:
    child = "import sys; held = bytearray(b'x') * 30_000_000; print(flush=True); sys.stdin.read()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert 30e6 < anonymous_bytes(process.pid) < 80e6  # plus two interpreters
        process.communicate()
    assert anonymous_bytes(process.pid) == 0


@pytest.mark.slow
def test_a_case_is_measured(tmp_path: Path) -> None:
    found = measure_preparation(300, 2, str(save_model(tmp_path / "model")), None)
    assert (found["rows"], found["processes"]) == (300, 2)
    assert found["rows_per_second"] == 300 / found["seconds"]
    assert found["peak_bytes"] >= found["bytes_before"] > 50e6  # torch and transformers are loaded


def test_what_is_concluded() -> None:
    cases = [
        {
            "rows": rows,
            "processes": processes,
            "seconds": rows * each / processes**0.5,
            "seconds_apart": rows * each / processes**0.75,
            "peak_bytes": 10**9 + 500 * rows,
        }
        for rows, each in ((1000, 0.005), (10_000, 0.004), (100_000, 0.006))
        for processes in (1, 4)
    ]
    found = scaling_by_processes(cases)
    assert found["1"] == {"bytes_per_row": 500, "linearity": 1.5, "speedup": 1.0}
    assert found["4"]["speedup"] == 2
    assert found["4"]["ceiling"] == pytest.approx(4**0.75)
