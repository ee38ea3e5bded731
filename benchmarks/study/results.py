"""From what was measured of every cell and seed to figures with intervals, and differences between cells."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.study.grid import BASE, Grid
from benchmarks.study.uncertainty import Sample, interval, sample
from lightning_mlc.evaluation.bootstrap import Estimate, widen_certainty
from lightning_mlc.metrics.verdicts import MISSING, SAFE, UNSAFE, across_languages, agreement, language_means

Measured = Mapping[str, Any]
"""What :meth:`benchmarks.study.measuring.Measurer.measure` found of one cell and seed."""


@dataclass(frozen=True)
class Measure:
    """What a figure says."""

    name: str
    unit: str
    """``%`` for shares, from 0 to 1."""
    higher_is_better: bool | None
    """None: neither."""
    scopes: tuple[str, ...] = ("mean", "worst")
    """What stands in tables; languages are in ``results.json`` and the pictures."""


def collect(grid: Grid, out: Path) -> dict[str, Any]:
    """All figures of the cells and seeds in ``out`` that are measured, in plain values."""
    cells = read_measured(grid, out)
    base = next(iter(cells.get(BASE, {}).values()), None)
    samples = {cell: _samples(list(seeds.values()), base) for cell, seeds in cells.items()}
    figures = [
        {"cell": cell, "measure": measure, "scope": scope, **_written(own, measure, _interval_of(own, measure))}
        for cell, found in samples.items()
        for (measure, scope), own in found.items()
    ]
    differences = []
    for question in grid.questions:
        for cell, other in question.compare.items():
            if cell not in cells or other not in cells:
                continue
            seeds = [seed for seed in cells[cell] if other == BASE or seed in cells[other]]
            if not seeds:
                continue
            ours = _samples([cells[cell][seed] for seed in seeds], base)
            theirs = _samples([cells[other][s] for s in (cells[BASE] if other == BASE else seeds)], base)
            for key, own in ours.items():
                if key in theirs and own.parts.shape[1:] == theirs[key].parts.shape[1:]:
                    change = own.minus(theirs[key])
                    place = {"cell": cell, "against": other, "measure": key[0], "scope": key[1]}
                    differences.append(place | _written(change, key[0], interval(change)))
    environments = {json.dumps(one["environment"]): None for seeds in cells.values() for one in seeds.values()}
    results = {
        "name": grid.name,
        "environments": [json.loads(text) for text in environments],
        "seeds": {cell: list(seeds) for cell, seeds in cells.items() if cell != BASE},
        "languages": next((one["languages"] for seeds in cells.values() for one in seeds.values()), []),
        "options": {cell: grid.options(cell) for cell in grid.cells},
        "configs": list(grid.configs),
        "measures": {m.name: {"unit": m.unit, "higher_is_better": m.higher_is_better} for m in MEASURES.values()},
        "figures": figures,
        "differences": differences,
    }
    return {key: _finite(value) for key, value in results.items()}


def read_measured(grid: Grid, out: Path) -> dict[str, dict[int | None, Measured]]:
    """By cell and seed; cells without any are not in it. The model before training has the seed None."""
    places: dict[str, dict[int | None, Path]] = {BASE: {None: out / "cells" / BASE / "untrained"}}
    for cell in grid.cells:
        places[cell] = {seed: out / "cells" / cell / f"seed-{seed}" for seed in grid.seeds}
    found = {
        cell: {
            seed: json.loads((folder / "measured.json").read_text(encoding="utf-8"))
            for seed, folder in seeds.items()
            if (folder / "measured.json").is_file()
        }
        for cell, seeds in places.items()
    }
    return {cell: seeds for cell, seeds in found.items() if seeds}


# ---- measures ------------------------------------------------------------------------------------------------------


def _rewards(one: Measured) -> Tensor:
    """(N, L) log-probability of the chosen minus that of the rejected response, NaN where there is none."""
    return _cells(one["chosen"], lambda cell: cell[0]) - _cells(one["rejected"], lambda cell: cell[0])


def _reward_margin(one: Measured, base: Measured) -> Tensor:
    return _rewards(one) - _rewards(base)


def _reward_accuracy(one: Measured, base: Measured) -> Tensor:
    return (torch.sign(_reward_margin(one, base)) + 1) / 2  # a tie is half a win; the sign of NaN is NaN


def _likelier(one: Measured, _: Measured) -> Tensor:
    per_token = [_cells(one[key], lambda cell: cell[0] / cell[1]) for key in ("chosen", "rejected")]
    return (torch.sign(per_token[0] - per_token[1]) + 1) / 2


def _nll(one: Measured, _: Measured) -> Tensor:
    """After the prompt in the first language, which is that of the responses."""
    return -_cells(one["chosen"], lambda cell: cell[0] / cell[1])[:, :1]


Values = Callable[[Measured, Measured], Tensor]
"""From a cell and seed, and the model before training, to (N, L)."""

REWARD_ACCURACY = Measure("reward accuracy", "%", True)
REWARD_MARGIN = Measure("reward margin", "nats", True)
LIKELIER = Measure("chosen likelier", "%", True)
REFUSAL_MARGIN = Measure("refusal margin", "nats per token", True)
ORDINARY_MARGIN = Measure("refusal margin, ordinary prompts", "nats per token", False)
NLL = Measure("NLL of chosen responses", "nats per token", False, ("mean",))
SAFE_RATE = Measure("declined (rules)", "%", True)
OVER_REFUSAL = Measure("declined though ordinary (rules)", "%", False)
PAG = Measure("agreement (PAG) of margins", "%", True, ("all",))
KAPPA = Measure("kappa of margins", "", True, ("all",))
STEP = Measure("seconds per step", "s", False, ("all",))
