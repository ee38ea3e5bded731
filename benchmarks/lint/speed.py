"""Time and memory of checking, by number of rows, and what training's one line costs. Times are of a core."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.architectures import SMOLLM2
from benchmarks.data import run_watched, write_rows

SECONDS_BETWEEN_SAMPLES = 0.1
_LINT = """
import json, sys, time
from lightning_mlc.lint.check import LintSettings
from lightning_mlc.lint.linting import choose_checks, lint
path = sys.argv[1]
checks = choose_checks(LintSettings("en", (path,)))
lint(["sample"], "en", choose_checks(LintSettings("en", ("sample",))))  # loads what is loaded once
start, cpu = time.monotonic(), time.process_time()
report = lint([path], "en", checks)
end, cpu = time.monotonic(), time.process_time() - cpu
print(json.dumps({"start": start, "end": end, "cpu_seconds": cpu, "texts": sum(report.texts.values())}))
"""
_PREPARE = """
import json, sys, time
from lightning_mlc.data.datamodule import MultilingualData
from lightning_mlc.lint.remark import remark
path, cache, model, gguf = sys.argv[1:]
data = MultilingualData(path, num_proc=1, cache_dir=cache, name_or_path=model, gguf_file=gguf or None)
data._chat_tokenizer()
seconds = []
def timed(*arguments):
    start = time.process_time()
    remark("en", *arguments)
    seconds.append(time.process_time() - start)
data.inspect = timed
start = time.process_time()
data.prepare_data()
print(json.dumps({"all": time.process_time() - start, "remark": sum(seconds)}))
"""


def measure_lint(rows: int) -> dict[str, Any]:
    """Check ``rows`` rows of ten texts in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, rows)
        command = [sys.executable, "-c", _LINT, str(path)]
        found, samples = run_watched(
            command, f"checking {rows} rows", SECONDS_BETWEEN_SAMPLES, stderr=subprocess.DEVNULL
        )
    before = [held for at, held in samples if at <= found["start"]]
    return {
        "rows": rows,
        "texts": found["texts"],
        "seconds": found["end"] - found["start"],
        "cpu_seconds": found["cpu_seconds"],
        # Of a core, because other programs may share the machine.
        "texts_per_second": found["texts"] / found["cpu_seconds"],
        "bytes_before": before[-1] if before else None,
        "peak_bytes": max(held for _, held in samples),
    }


def measure_remark(rows: int) -> dict[str, Any]:
    """CPU seconds of preparing ``rows`` rows for training, and of the line about their translations therein."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, rows)
        command = [
            sys.executable,
            "-c",
            _PREPARE,
            str(path),
            f"{folder}/cache",
            SMOLLM2.name_or_path,
            SMOLLM2.gguf_file or "",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    share = found["remark"] / (found["all"] - found["remark"])
    return {"rows": rows, "cpu_seconds": found["all"], "cpu_seconds_of_line": found["remark"], "share": share}


def summary(cases: list[dict[str, Any]]) -> dict[str, float]:
    """Texts a minute and growth from the smallest to the largest case.

    ``linearity`` is the time per text of the largest case over that of the one before it (1: linear).
    """
    first, before, last = cases[0], cases[max(len(cases) - 2, 0)], cases[-1]
    return {
        "texts_per_minute": 60 * last["texts_per_second"],
        "linearity": before["texts_per_second"] / last["texts_per_second"],
        "bytes_per_text": (last["peak_bytes"] - first["peak_bytes"]) / max(last["texts"] - first["texts"], 1),
    }
