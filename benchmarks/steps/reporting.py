"""Write results as a table, JSON, CSV and a picture."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import environment
from benchmarks.steps.measuring import VariantMeasurements
from benchmarks.steps.parity import Parity
from benchmarks.steps.results import Result, Target

OURS, OTHERS, HATCH = "#2b6cb0", "#b8c4d0", "#111820"
"""They differ in lightness too, for colour-blind readers and for print."""


def results_table(results: Iterable[Result]) -> str:
    """Return the results as a table for a terminal."""
    lines = [
        f"{'':<10} {'s / step':>9} {'(20-80 %)':>15} {'peak GB':>8} {'(before)':>9} {'real tokens':>12} "
        f"{'computed':>9} {'reference':>10} {'TFLOP':>7} {'GFLOP/s':>8}"
    ]
    for r in results:
        line = f"{r.variant:<10} {r.seconds:>9.3f} {f'({r.seconds_p20:.3f}-{r.seconds_p80:.3f})':>15} "
        line += f"{r.peak_bytes / 1e9:>8.2f} {f'({r.bytes_before / 1e9:.2f})':>9}"
        if r.flops is not None:
            assert r.flops_per_second is not None
            line += f" {r.real_tokens:>12.0f} {r.trained_positions:>9.0f} {r.frozen_positions:>10.0f}"
            line += f" {r.flops / 1e12:>7.2f} {r.flops_per_second / 1e9:>8.0f}"
        lines.append(line)
    return "\n".join(lines)


def target_lines(found: Iterable[Target]) -> str:
    """Return one line for each target."""
    lines = []
    for target in found:
        if target.value is None:
            lines.append(f"not measured  {target.name}: at most {target.bound:.2f}")
        elif target.met is None:
            lines.append(f"no target     {target.name} at these settings: is {target.value:.3f}")
        else:
            word = "met" if target.met else "NOT MET"
            lines.append(f"{word:<13} {target.name}: at most {target.bound:.2f}, is {target.value:.3f}")
    return "\n".join(lines)


def write(
    folder: Path,
    device: torch.device,
    settings: Mapping[str, Any],
    measured: Mapping[str, VariantMeasurements],
    results: Sequence[Result],
    parity: Parity | None,
    found: Sequence[Target] | None,
) -> list[Path]:
    """Write JSON with everything, CSV with a row for each variant, and a picture. Returns the paths."""
    everything: dict[str, Any] = {
        "environment": environment(device),
        "settings": dict(settings),
        "parity": None
        if parity is None
        else {**dataclasses.asdict(parity), "largest_difference": parity.largest_difference, "holds": parity.holds},
        "targets": None if found is None else [{**dataclasses.asdict(t), "met": t.met} for t in found],
        "results": [dataclasses.asdict(row) for row in results],
        "failures": {name: m.failure for name, m in measured.items() if m.failure},
        "steps": {
            name: {"seconds": [s.seconds for s in m.steps], "loss": [s.loss for s in m.steps]}
            for name, m in measured.items()
        },
        "counts": {name: [count._asdict() for count in m.counts] for name, m in measured.items()},
    }
    (folder / "train_step.json").write_text(json.dumps(everything, indent=1) + "\n")
    with (folder / "train_step.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in dataclasses.fields(Result)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(everything["results"])
    paths = [folder / "train_step.json", folder / "train_step.csv"]
    if results and found is not None:
        title = (
            f"One step of {settings['name']}, {settings['batch_size']} pairs in {len(settings['languages'])} languages"
        )
        plot(
            results,
            folder / "train_step.png",
            f"{title}\n{everything['environment']['device']}, {settings['precision']}",
        )
        paths.append(folder / "train_step.png")
    return paths


def plot(results: Sequence[Result], path: Path, title: str) -> None:
    """Plot time and peak memory of a step as bars."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 1.5 + 0.42 * len(results)), layout="constrained")
    time, memory = figure.subplots(1, 2, sharey=True)
    names = [r.variant for r in results]
    colours = [OURS if r.variant.startswith("dpo") else OTHERS for r in results]
    medians = [r.seconds for r in results]
    spread = [[r.seconds - r.seconds_p20 for r in results], [r.seconds_p80 - r.seconds for r in results]]
    bars = time.barh(names, medians, color=colours, xerr=spread, error_kw={"lw": 1, "capsize": 3})
    time.bar_label(bars, [f"{value:.3g}" for value in medians], padding=5)
    time.set(xlabel="seconds (median, 20 to 80 %)")
    peaks = [r.peak_bytes / 1e9 for r in results]
    bars = memory.barh(names, peaks, color=colours)
    memory.bar_label(bars, [f"{value:.3g}" for value in peaks], padding=5)
    before = [r.bytes_before / 1e9 for r in results]
    memory.barh(names, before, color="none", edgecolor=HATCH, hatch="////", lw=0)
    memory.set(xlabel="peak, GB (hatched: before a step)")
    for axes in (time, memory):
        axes.margins(x=0.18)
        axes.spines[["top", "right"]].set_visible(False)
    time.invert_yaxis()
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)
