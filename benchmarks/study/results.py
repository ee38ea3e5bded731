"""From what was measured of every cell and seed to figures with intervals, and differences between cells."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.study.grid import BASE, Grid
from benchmarks.study.runs import rounded
from benchmarks.study.uncertainty import Sample, interval, sample
from lightning_mlc.evaluation.reporting.bootstrap import IntervalEstimate as Estimate
from lightning_mlc.evaluation.reporting.bootstrap import widen_certainty
from lightning_mlc.evaluation.reporting.results import finite
from lightning_mlc.metrics.verdicts import INVALID, MISSING, SAFE, UNSAFE, across_languages, agreement, language_means

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
    """Which of its scopes stand in tables; languages are in ``results.json`` and the pictures."""


def collect(grid: Grid, out: Path) -> dict[str, Any]:
    """All figures of the cells and seeds in ``out`` that are measured, in plain values."""
    cells = read_measured(grid, out)
    base = next(iter(cells.get(BASE, {}).values()), None)
    samples = {cell: _samples(list(seeds.values()), base) for cell, seeds in cells.items()}
    measures = dict.fromkeys(measure for found in samples.values() for measure, _ in found)
    figures = [
        {"cell": cell, "measure": measure.name, "scope": scope, **_written(own, _interval_of(own, measure))}
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
            for (measure, scope), own in ours.items():
                if (measure, scope) in theirs:
                    change = own.minus(theirs[measure, scope])
                    place = {"cell": cell, "against": other, "measure": measure.name, "scope": scope}
                    differences.append(place | _written(change, interval(change)))
    environments = {json.dumps(one["environment"]): None for seeds in cells.values() for one in seeds.values()}
    results = {
        "name": grid.name,
        "environments": [json.loads(text) for text in environments],
        "seeds": {cell: list(seeds) for cell, seeds in cells.items() if cell != BASE},
        "languages": next((one["languages"] for seeds in cells.values() for one in seeds.values()), []),
        "options": {cell: grid.options(cell) for cell in grid.cells},
        "configs": list(grid.configs),
        "measures": [dataclasses.asdict(measure) for measure in measures],
        "figures": figures,
        "differences": differences,
    }
    return {key: finite(rounded(value, 6)) for key, value in results.items()}


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
PAG = Measure("agreement (PAG) of margins", "%", True, ("all",))
KAPPA = Measure("kappa of margins", "", True, ("all",))


def _samples(seeds: Sequence[Measured], base: Measured | None) -> dict[tuple[Measure, str], Sample]:
    """By measure and scope, of a cell."""
    found: dict[tuple[Measure, str], Sample] = {}
    languages = seeds[0]["languages"]
    rewards: list[tuple[Measure, Values]] = [(REWARD_ACCURACY, _reward_accuracy), (REWARD_MARGIN, _reward_margin)]
    alone: list[tuple[Measure, Values]] = [
        (LIKELIER, _likelier),
        (REFUSAL_MARGIN, lambda one, _: _cells(one["margin"], float)),
        (ORDINARY_MARGIN, lambda one, _: _cells(one["ordinary_margin"], float)),
        (NLL, _nll),
    ]
    alone += [
        (measure_of_layer(measure, layer), _of_layer(layer, name))
        for layer in seeds[0]["layers"]
        for name, measure in LAYERED.items()
    ]
    for judge in seeds[0]["verdicts"]:
        alone += [(safe_by(judge), _labelled(judge, SAFE)), (invalid_by(judge), _labelled(judge, INVALID))]
    alone += [(refused_by(judge), _refused(judge)) for judge in seeds[0]["ordinary_refused"]]
    for measure, values in [*(rewards if base is not None else ()), *alone]:
        grids = [values(one, base or one) for one in seeds]
        if all(bool((~grid.isnan()).any()) for grid in grids):
            own = languages if grids[0].shape[1] > 1 else []
            statistics_ = [_statistic(grid, own, measure.higher_is_better) for grid in grids]
            found |= {(measure, scope): s for scope, s in sample(statistics_, len(grids[0])).items()}
    labels = [_margin_labels(one) for one in seeds]
    agreements = sample([partial(agreement, own) for own in labels], len(labels[0]))
    found[PAG, "all"], found[KAPPA, "all"] = agreements["pag"], agreements["kappa"]
    return found


def _statistic(grid: Tensor, languages: Sequence[str], higher_is_better: bool | None) -> Callable[[Tensor], Any]:
    """From weights (R, N) to the means (R,) of (N, L) ``grid``: of each language, over them, and of the worst."""
    present = ~grid.isnan()

    def statistic(weights: Tensor) -> dict[str, Tensor]:
        means = language_means(grid, present, weights)
        over = across_languages(means, higher_is_better)
        if not languages:
            return {"mean": over["mean"]}
        return {
            **{language: means[:, i] for i, language in enumerate(languages)},
            **{scope: over[scope] for scope in ("mean", "worst") if scope in over},
        }

    return statistic


def _margin_labels(one: Measured) -> Tensor:
    """(N, L) whether refusals are likelier than compliances, as labels."""
    margins = _cells(one["margin"], float)
    return torch.where(margins.isnan(), MISSING, torch.where(margins > 0, SAFE, UNSAFE))


LAYERED = {
    "explained_variance": Measure("explained variance", "", True, ("mean",)),
    "explained_variance_centred": Measure("explained variance, centred", "", True, ("mean",)),
    "min_cosine": Measure("smallest cosine", "", True, ("mean",)),
}


def measure_of_layer(measure: Measure, layer: str) -> Measure:
    """The same, called after the layer too."""
    name = {"-1": "last layer", "0.5": "middle layer"}.get(layer, f"layer {layer}")
    return Measure(f"{measure.name}, {name}", measure.unit, measure.higher_is_better, measure.scopes)


def safe_by(judge: str) -> Measure:
    """Share of answers to harmful prompts that a judge calls safe."""
    return Measure(f"safe, judged by {judge}", "%", True)


def invalid_by(judge: str) -> Measure:
    """Share of answers to harmful prompts that are empty, loops or no text."""
    return Measure(f"invalid, judged by {judge}", "%", False)


def refused_by(judge: str) -> Measure:
    """Share of ordinary prompts that are declined."""
    return Measure(f"ordinary prompts declined, judged by {judge}", "%", False)


def _of_layer(layer: str, name: str) -> Values:
    return lambda one, _: _cells([[value] for value in one["layers"][layer][name]], float)


def _labelled(judge: str, wanted: int) -> Values:
    return lambda one, _: _cells(
        one["verdicts"][judge], lambda label: math.nan if label == MISSING else float(label == wanted)
    )


def _refused(judge: str) -> Values:
    return lambda one, _: _cells(one["ordinary_refused"][judge], float)


def _cells(rows: Sequence[Sequence[Any]], number: Callable[[Any], float]) -> Tensor:
    """(N, L) float64 of ``rows``, NaN where there is nothing."""
    return torch.tensor([[math.nan if c is None else number(c) for c in row] for row in rows], dtype=torch.float64)


# ---- figures -------------------------------------------------------------------------------------------------------


def _interval_of(found: Sample, measure: Measure) -> Estimate:
    """A share stays between 0 and 1, and is not certain where all prompts agree."""
    own = interval(found)
    if measure.unit != "%":
        return own
    low, high = max(0.0, own.low), min(1.0, own.high)
    return widen_certainty(Estimate(own.value, low, high), found.parts.shape[1])


def _written(found: Sample, own: Estimate) -> dict[str, Any]:
    return {
        "value": own.value,
        "low": own.low,
        "high": own.high,
        "by_seed": found.values.tolist(),
        "prompts": found.parts.shape[1],
    }
