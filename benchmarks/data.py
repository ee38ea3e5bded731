"""``python -m benchmarks.data``: time and memory of data preparation, from a file to tokenised tables.

The cases differ in the number of rows and of processes. The rows repeat those of the sample (ten languages, two
responses) with new ids, and with the row's number in each text, so that no two texts are the same. Each case runs in
its own process, which loads the tokenizer before the time starts. Memory is that of the process and all below it:
anonymous pages, and a page that several processes share counts once. Pages of the files that tables are mapped from do
not count, because the system takes them back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.architectures import SMOLLM2
from benchmarks.environment import environment
from lightning_mlc.data.datamodule import MultilingualData
from lightning_mlc.data.reading import locate
from lightning_mlc.data.records import PAIR

SECONDS_BETWEEN_SAMPLES = 0.25


def write_rows(path: Path, count: int) -> None:
    """Write ``count`` rows of the sample to ``path``, each with its own id and with texts that no other row has."""
    sample = locate("sample", "--data")
    assert sample is not None
    rows = [json.loads(line) for line in sample.read_text(encoding="utf-8").splitlines()]
    with path.open("w", encoding="utf-8") as file:
        for number, row in enumerate(islice(cycle(rows), count)):
            prompt = {language: f"{text} ({number})" for language, text in row["prompt"].items()}
            responses = {key: f"{row[key]} ({number})" for key in PAIR}
            written = {**row, "id": f"row {number}", "prompt": prompt, **responses}
            file.write(json.dumps(written, ensure_ascii=False) + "\n")


def prepare(path: str, processes: int, model: str, gguf: str | None, cache: str) -> dict[str, float]:
    """Prepare the rows of ``path`` from this process, then once more from the cache.

    Returns:
        The times, and the bytes that the process held before the first preparation.
    """
    clocks, held = [], []
    for _ in range(2):
        data = MultilingualData(path, num_proc=processes, cache_dir=cache, name_or_path=model, gguf_file=gguf)
        data._chat_tokenizer()  # not timed: loading it takes the same time for any data
        held.append(anonymous_bytes(os.getpid()))
        clocks.append((time.monotonic(), _cpu_seconds()))
        data.prepare_data()
        data.setup("fit")
        clocks.append((time.monotonic(), _cpu_seconds()))
    (start, cpu_start), (end, cpu_end), (start_cached, _), (end_cached, _) = clocks
    return {
        "start": start,
        "end": end,
        "seconds": end - start,
        "cpu_seconds": cpu_end - cpu_start,
        "seconds_cached": end_cached - start_cached,
        "bytes_before": held[0],
    }


def seconds_apart(
    rows: int, processes: int, model: str = SMOLLM2.name_or_path, gguf: str | None = SMOLLM2.gguf_file
) -> float:
    """Return the seconds that ``processes`` independent programs need for ``rows`` rows, each for its part of them.

    The programs share no work and no lock, so no division of the work could be faster. Two cores of a virtual machine
    are often less than twice as fast as one.
    """
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for number in range(processes):
            path = Path(folder) / f"rows-{number}.jsonl"
            write_rows(path, rows // processes)
            case = json.dumps([str(path), 1, model, gguf, f"{folder}/cache-{number}"])
            command = [sys.executable, "-m", "benchmarks.data", "--case", case]
            children.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        outputs = [child.communicate()[0] for child in children]
    if any(child.returncode != 0 for child in children):
        raise SystemExit(f"preparing {rows} rows in {processes} programs failed")
    return max(float(json.loads(output.splitlines()[-1])["seconds"]) for output in outputs)


def measure_preparation(
    rows: int, processes: int, model: str = SMOLLM2.name_or_path, gguf: str | None = SMOLLM2.gguf_file
) -> dict[str, Any]:
    """Measure time and memory of preparing ``rows`` rows; for several processes, also :func:`seconds_apart`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        write_rows(path, rows)
        case = json.dumps([str(path), processes, model, gguf, f"{folder}/cache"])
        command = [sys.executable, "-m", "benchmarks.data", "--case", case]
        what = f"preparing {rows} rows in {processes} processes"
        found, samples = run_watched(command, what, SECONDS_BETWEEN_SAMPLES)
    start, end = found.pop("start"), found.pop("end")
    during = [held for at, held in samples if start <= at <= end]
    if processes > 1:
        found["seconds_apart"] = seconds_apart(rows, processes, model, gguf)
    return {
        "rows": rows,
        "processes": processes,
        **found,
        "rows_per_second": rows / found["seconds"],
        "peak_bytes": max([found["bytes_before"], *during]),
    }


def run_watched(
    command: list[str], what: str, seconds: float, stderr: int | None = None
) -> tuple[dict[str, Any], list[tuple[float, int]]]:
    """Run a program and look at its memory.

    Args:
        command: The program, which prints a JSON object as its last line.
        what: What it does, for the message if it fails.
        seconds: Seconds between two looks.
        stderr: Where its errors go, as of ``subprocess.Popen``.

    Returns:
        The object; and times of ``time.monotonic`` with :func:`anonymous_bytes`.
    """
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True) as child:
        samples = []
        while child.poll() is None:
            samples.append((time.monotonic(), anonymous_bytes(child.pid)))
            time.sleep(seconds)
        assert child.stdout is not None
        said = child.stdout.read()
    if child.returncode != 0:
        raise SystemExit(f"{what} failed")
    return json.loads(said.splitlines()[-1]), samples


def anonymous_bytes(pid: int) -> int:
    """Return the bytes of anonymous memory of a process and all below it; a shared page is divided among its users."""
    try:
        held = re.search(r"^Pss_Anon:\s+(\d+) kB$", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
        below = [
            int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in path.read_text().split()
        ]
    except (FileNotFoundError, ProcessLookupError):
        return 0  # the process has just ended
    return (int(held[1]) * 1024 if held else 0) + sum(anonymous_bytes(child) for child in below)


def scaling_by_processes(cases: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Summarise the cases by number of processes.

    ``bytes_per_row`` is the memory that a further row needs, between the smallest and the largest case. ``linearity``
    is the time per row of the largest case over that of the second largest (1: linear). ``speedup`` is the time of one
    process over that of several, in the largest case. ``ceiling`` is the speed-up of that many separate programs, which
    is the most that the machine allows.
    """
    found = {}
    alone = [case for case in cases if case["processes"] == 1]
    for processes in sorted({case["processes"] for case in cases}):
        mine = sorted((case for case in cases if case["processes"] == processes), key=lambda case: int(case["rows"]))
        first, before, last = mine[0], mine[max(len(mine) - 2, 0)], mine[-1]
        more = max(last["rows"] - first["rows"], 1)
        found[str(processes)] = {
            "bytes_per_row": (last["peak_bytes"] - first["peak_bytes"]) / more,
            "linearity": last["seconds"] / last["rows"] / (before["seconds"] / before["rows"]),
        }
        same = [case for case in alone if case["rows"] == last["rows"]]
        if same:
            found[str(processes)]["speedup"] = same[0]["seconds"] / last["seconds"]
        if same and processes > 1:
            found[str(processes)]["ceiling"] = same[0]["seconds"] / last["seconds_apart"]
    return found


def _cpu_seconds() -> float:
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu"), help="folder for data.json")
    parser.add_argument("--rows", type=int, nargs="+", default=[1000, 10_000, 100_000], help="numbers of rows")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes")
    parser.add_argument("--model", default=SMOLLM2.name_or_path, help="model whose tokenizer is used")
    parser.add_argument("--gguf-file", default=SMOLLM2.gguf_file, help="GGUF file of the model; empty for none")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        print(json.dumps(prepare(*json.loads(options.case))))
        return
    cases = []
    print("| rows | processes | seconds | CPU seconds | rows per second | from the cache | peak memory |")
    print("|---|---|---|---|---|---|---|")
    for rows in options.rows:
        for processes in options.processes:
            case = measure_preparation(rows, processes, options.model, options.gguf_file or None)
            cases.append(case)
            print(
                f"| {rows} | {processes} | {case['seconds']:.1f} | {case['cpu_seconds']:.1f} "
                f"| {case['rows_per_second']:.0f} | {case['seconds_cached']:.1f} s "
                f"| {(case['peak_bytes'] - case['bytes_before']) / 1e6:.0f} MB |",
                flush=True,
            )
    found = scaling_by_processes(cases)
    for processes, values in found.items():
        print(f"{processes} processes: {', '.join(f'{name} {value:.2f}' for name, value in values.items())}")
    options.out.mkdir(parents=True, exist_ok=True)
    written = {"environment": environment(torch.device("cpu")), "cases": cases, "summary": found}
    (options.out / "data.json").write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
