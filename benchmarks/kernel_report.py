"""The results of ``python -m benchmarks.kernel``: what they contain, the comparison, files and picture."""

from __future__ import annotations

import csv
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Quantiles

PROTOCOL = 2
"""Version of the measurements. Results without a version have the first one: cold calls with autograd's thread, no
``paces`` and no floor."""
PACES = ("cold", "hot", "queued", "cold_inline", "hot_inline", "queued_inline")
"""The paces; ``inline`` is without autograd's thread for the device."""
GOAL_SHAPE = {"prompts": 8, "languages": 10, "features": 4096, "tokens": 0}
GOAL_MILLISECONDS = 0.15
GOAL_RATIO = 6.0


@dataclass(frozen=True)
class Shape:
    """B prompts in L languages: rows (B, L, D), or, with T ``tokens``, states (B * L, T, D) that are averaged first."""

    prompts: int
    languages: int
    features: int
    tokens: int = 0

    def __str__(self) -> str:
        text = f"B={self.prompts} L={self.languages} D={self.features}"
        return text + (f" T={self.tokens}" if self.tokens else "")


@dataclass
class ProviderResult:
    """Errors, times and memory of one provider on one shape. Times are seconds per call, and medians.

    ``forward``, ``backward`` and ``both`` are cold, with autograd's thread. The first two do not add up to the third.
    """

    prompts: int
    languages: int
    features: int
    tokens: int
    dtype: str
    provider: str
    ours: bool
    loss_error: float
    """Relative error of the loss against float64."""
    gradient_error: float
    """Norm of the gradient's error over the gradient's, against float64."""
    forward: float
    forward_p20: float
    forward_p80: float
    backward: float
    backward_p20: float
    backward_p80: float
    both: float
    both_p20: float
    both_p80: float
    rounds: int
    both_in_graph: float | None
    """Time of the GPU alone, from CUDA-graph replay."""
    peak_bytes: int | None
    share_of_copy: float | None
    """Achieved bandwidth over that of a device copy. The bytes that must move: the input is read once (rows twice,
    because the gradient needs them again; padding never), and its gradient is written once."""

    paces: dict[str, Quantiles] = field(default_factory=dict)
    """Times of both passes, by pace. Empty in results of the first protocol."""

    @property
    def shape(self) -> Shape:
        return Shape(self.prompts, self.languages, self.features, self.tokens)


@dataclass(frozen=True)
class Floor:
    """What any loss of this shape costs: the sum of the rows and its gradient, by pace."""

    shape: Shape
    paces: dict[str, Quantiles]


def inexact(rows: list[ProviderResult]) -> list[str]:
    """Describe every result of ours that is less exact than the published form on the same shape."""
    complaints = []
    published = {row.shape: row for row in rows if row.provider == "svd"}
    for row in rows:
        bar = published[row.shape]
        # A result cannot be more exact than its own dtype.
        unit = torch.finfo(getattr(torch, row.dtype)).eps
        for what, error, allowed in (
            ("loss", row.loss_error, max(bar.loss_error, torch.finfo(torch.float32).eps)),
            ("gradient", row.gradient_error, max(bar.gradient_error, unit)),
        ):
            if row.ours and not error <= allowed:
                complaints.append(
                    f"{row.provider} at {row.shape}: error of the {what} is {error:.1e}, allowed {allowed:.1e}"
                )
    return complaints


def seconds(row: ProviderResult, pace: str) -> float:
    """Median time of both passes at ``pace``. Results of the first protocol have ``cold`` alone."""
    return row.paces[pace].median if row.paces else row.both


def speed_ups(rows: list[ProviderResult], floors: list[Floor]) -> list[dict[str, Any]]:
    """Compare our fastest provider with the published form and with the fastest eager one, for each shape and pace.

    ``paces`` has all paces. What stands beside it is ``cold``.
    """
    floor_of = {floor.shape: floor for floor in floors}
    found = []
    for shape in dict.fromkeys(row.shape for row in rows):
        here = [row for row in rows if row.shape == shape]
        measured = PACES if here[0].paces else PACES[:1]
        paces = {pace: _compared(here, pace) for pace in measured}
        if shape in floor_of:
            for pace, compared in paces.items():
                compared["floor_milliseconds"] = floor_of[shape].paces[pace].median * 1e3
        found.append({**dataclasses.asdict(shape), **paces["cold"], "paces": paces})
    return found


def _compared(rows: list[ProviderResult], pace: str) -> dict[str, Any]:
    """Compare the providers of one shape at one pace."""
    times = {row.provider: seconds(row, pace) for row in rows}
    fastest = min((row.provider for row in rows if row.ours), key=times.__getitem__)
    best = min((row.provider for row in rows if not row.ours), key=times.__getitem__)
    return {
        "ours": fastest,
        "milliseconds": times[fastest] * 1e3,
        "times_faster_than_svd": times["svd"] / times[fastest],
        "best_eager": best,
        "times_faster_than_best_eager": times[best] / times[fastest],
    }


def table(rows: list[ProviderResult], floors: list[Floor]) -> list[str]:
    """The comparison as lines of text. A cell has milliseconds, and how many times faster than the best eager form."""
    heads = [f"{'B':>4} {'L':>3} {'D':>5} {'T':>4}", f"{'ours':<11}", f"{'x svd':>6}", f"{'floor':>6}"]
    lines = ["milliseconds of both passes (x best eager), and of the floor, cold"]
    lines += ["  ".join([*heads, *(f"{pace:>15}" for pace in PACES)])]
    for s in speed_ups(rows, floors):
        sizes = f"{s['prompts']:>4} {s['languages']:>3} {s['features']:>5} {s['tokens']:>4}"
        cold = [f"{s['ours']:<11}", f"{s['times_faster_than_svd']:>6.1f}", f"{s['floor_milliseconds']:>6.3f}"]
        parts = [s["paces"][pace] for pace in PACES]
        cells = [f"{p['milliseconds']:.3f} ({p['times_faster_than_best_eager']:.1f})" for p in parts]
        lines.append("  ".join([sizes, *cold, *(f"{cell:>15}" for cell in cells)]))
    return lines


def goals(rows: list[ProviderResult], floors: list[Floor]) -> list[str]:
    """Whether the goal for a GPU is met, as lines of text. None if its shape was not measured."""
    compared = [s for s in speed_ups(rows, floors) if all(s[name] == size for name, size in GOAL_SHAPE.items())]
    lines = []
    for s in compared:
        hot, cold = s["paces"]["hot"], s["paces"]["cold"]
        found, ratio = hot["milliseconds"], hot["times_faster_than_best_eager"]
        for text, met in (
            (f"{found:.3f} ms, at most {GOAL_MILLISECONDS}", found <= GOAL_MILLISECONDS),
            (f"{ratio:.1f} times as fast as {hot['best_eager']}, at least {GOAL_RATIO:g}", ratio >= GOAL_RATIO),
        ):
            lines.append(f"goal, hot at {Shape(**GOAL_SHAPE)}: {text}: {'met' if met else 'missed'}")
        lines.append(f"cold there: {cold['milliseconds']:.3f} ms, floor {cold['floor_milliseconds']:.3f} ms")
    return lines


def write(
    folder: Path, about: dict[str, Any], rows: list[ProviderResult], floors: list[Floor], trusted: bool
) -> list[Path]:
    """Write JSON with everything, including ``about``, and CSV with the rows. Returns the paths."""
    everything = {
        **about,
        "speed_ups": speed_ups(rows, floors) if trusted else None,
        "rows": [dataclasses.asdict(row) | {"paces": _named(row.paces)} for row in rows],
        "floors": [dataclasses.asdict(floor.shape) | {"paces": _named(floor.paces)} for floor in floors],
    }
    (folder / "kernel.json").write_text(json.dumps(everything, indent=1) + "\n")
    flat = [_flat(row) for row in everything["rows"]]
    with (folder / "kernel.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(flat[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
    return [folder / "kernel.json", folder / "kernel.csv"]


def read(path: Path) -> tuple[list[ProviderResult], list[Floor]]:
    """What :func:`write` wrote to ``kernel.json``, of either protocol."""
    stored = json.loads(path.read_text())
    names = [part.name for part in dataclasses.fields(Shape)]
    rows = [ProviderResult(**row | {"paces": _quantiles(row.get("paces", {}))}) for row in stored["rows"]]
    floors = [
        Floor(Shape(**{name: floor[name] for name in names}), _quantiles(floor["paces"]))
        for floor in stored.get("floors", [])
    ]
    return rows, floors


def _named(paces: dict[str, Quantiles]) -> dict[str, dict[str, float]]:
    return {pace: found._asdict() for pace, found in paces.items()}


def _quantiles(paces: dict[str, dict[str, Any]]) -> dict[str, Quantiles]:
    return {pace: Quantiles(**found) for pace, found in paces.items()}


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """``row`` with a column for each number of each pace. ``cold`` is ``both``."""
    paces = {
        pace if name == "median" else f"{pace}_{name}": value
        for pace, found in row["paces"].items()
        if pace != "cold"
        for name, value in found.items()
    }
    return {name: value for name, value in row.items() if name != "paces"} | paces


def plot(rows: list[ProviderResult], path: Path, device: str) -> None:
    """Plot the cold time of both passes over the number of prompts, with a panel for each number of features."""
    from matplotlib.figure import Figure

    rows = [r for r in rows if r.tokens == 0]
    languages = 10 if any(r.languages == 10 for r in rows) else rows[0].languages
    rows = [r for r in rows if r.languages == languages]
    widths = sorted({r.features for r in rows})
    figure = Figure(figsize=(2.6 * len(widths) + 1.2, 3.2), layout="constrained")
    panels = figure.subplots(1, len(widths), sharey=True, squeeze=False)[0]
    markers = dict(zip(dict.fromkeys(r.provider for r in rows), "os^vDx", strict=False))
    for axes, width in zip(panels, widths, strict=True):
        for name in dict.fromkeys(r.provider for r in rows):
            points = sorted((r.prompts, r.both * 1e3) for r in rows if r.provider == name and r.features == width)
            ours = any(r.ours for r in rows if r.provider == name)
            axes.plot(*zip(*points, strict=True), marker=markers[name], ms=4, lw=2 if ours else 1, label=name)
        axes.set(xscale="log", yscale="log", title=f"D = {width}", xlabel="prompts (B)")
        axes.set_xticks(sorted({r.prompts for r in rows}), sorted({r.prompts for r in rows}))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("ms, cold, forward and backward")
    panels[0].legend(fontsize=7)
    figure.suptitle(f"MLC loss of {languages} languages on {device}", fontsize=10)
    figure.savefig(path, dpi=150)
