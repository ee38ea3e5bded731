"""``python -m benchmarks.lint``: planted faults that ``lightning-mlc lint`` finds, false alarms, time and memory.

Each kind of fault is planted into one translation of every second row, of the sample and of the files that are given.
Results are counts and never text.
"""

from __future__ import annotations

import argparse
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.lint.planting import measure
from benchmarks.lint.speed import measure_lint, measure_remark, summary
from lightning_mlc.lint.checks import all_checks


def show(name: str, found: dict[str, Any]) -> None:
    """Print the figures of one file."""
    print(
        f"\n{name}: {found['rows']} rows, {found['texts']} texts; found as it is: {found['found_as_it_is'] or 'none'}"
    )
    print("| check | planted | recall | precision | found elsewhere |")
    print("|---|---|---|---|---|")
    for check, score in found["planted"].items():
        print(f"| {check} | {score['planted']} | {score['recall']} | {score['precision']} | {score['elsewhere']} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu/lint"), help="folder for lint.json")
    parser.add_argument("--files", nargs="*", default=[], help="more data to plant faults into; no text is kept")
    parser.add_argument("--source_language", default="en", help="source language of the files")
    parser.add_argument("--rows", type=int, nargs="*", default=[1000, 5000, 10_000], help="rows of the timed cases")
    options = parser.parse_args()
    planted = {Path(path).name: measure(path, options.source_language) for path in ("sample", *options.files)}
    for name, found in planted.items():
        show(name, found)
    cases = [measure_lint(rows) for rows in options.rows]
    remarks = [measure_remark(rows) for rows in options.rows]
    for case, line in zip(cases, remarks, strict=True):
        print(
            f"{case['texts']} texts: {case['texts_per_second']:.0f} a second of a core, "
            f"{case['peak_bytes'] / 1e6:.0f} MB; the line of training adds {line['share']:.1%} to preparing them"
        )
    of_models = [name for name, kind in all_checks().items() if kind.option is not None]
    print(f"not measured, because they need a model: {', '.join(of_models)}")
    versions = {package: version(package) for package in ("py3langid", "ftfy", "regex", "langcodes", "fonttools")}
    written = {
        "environment": {
            **environment(torch.device("cpu")),
            **versions,
            "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        },
        "planted": planted,
        "not_measured": of_models,
        "speed": cases,
        "line_of_training": remarks,
        "summary": summary(cases) if cases else {},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "lint.json").write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
