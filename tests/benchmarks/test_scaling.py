"""The benchmark of scaling: the command runs and measures a case, and tables show the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import save_model

from benchmarks.scaling import measure_run, plot, size_of, tables


@pytest.mark.slow
def test_a_case_is_measured(tmp_path: Path) -> None:
    found = measure_run(save_model(tmp_path / "model"), 1, (), 2, tmp_path / "run")
    assert len(found["steps"]) == 2
    # No figure is known in advance, but each must exist.
    assert found.keys() >= {"tokens_per_second", "save_seconds", "load_seconds", "export_seconds", "peak_bytes"}
    assert found["checkpoint_bytes"] == size_of(tmp_path / "run" / "timed.ckpt") > 100_000
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def row(strategy: str, processes: int, tokens: float) -> dict[str, Any]:
    return {
        "model": "m",
        "strategy": strategy,
        "processes": processes,
        "tokens_per_second": tokens,
        "peak_bytes": [3e9] * processes,
        "checkpoint_bytes": 5_000_000,
        "save_seconds": 0.1,
        "load_seconds": 0.2,
        "export_seconds": 0.3,
    }


def test_what_is_shown(tmp_path: Path) -> None:
    rows = [row("one process", 1, 200.0), row("DDP", 2, 300.0), row("FSDP2", 2, 100.0)]
    text = tables(rows)
    assert "| m | DDP | 2 | 300 | 1.50 | 3.00, 3.00 GB |" in text
    assert "| m | FSDP2 | 5 MB | 0.10 s | 0.20 s | 0.30 s |" in text
    assert "| m | DDP | 5 MB" not in text
    plot(rows, tmp_path / "a.png", "title")
    assert (tmp_path / "a.png").stat().st_size > 1000
