"""Two processes with overlapping and uneven shares agree with one process that has all examples."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from processes import run_in_forks
from torch import distributed

from lightning_mlc.metrics import Collinearity, ExampleMean, LanguageCosines, LanguageMean

LANGUAGES = ("en", "sw", "zh")


def measure(keys: list[int]) -> dict[str, object]:
    """The values of the metrics after the examples ``keys``, in batches of one. Only even keys have Swahili."""
    mean, line, cosines = LanguageMean(LANGUAGES, False), Collinearity(), LanguageCosines(LANGUAGES)
    example = ExampleMean()
    states = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(7))
    for key in keys:
        present = torch.tensor([[True, key % 2 == 0, True]])
        language = present[0].nonzero()[:, 0]
        mean.update(torch.full_like(language, key), language, 10.0 * key + language)
        line.update(torch.tensor([key]), states[key : key + 1], present)
        example.update(torch.tensor([key]), torch.tensor([10.0 * key]))
        cosines.update(torch.tensor([key]), states[key : key + 1], present)
    return {
        "mean": {name: float(value) for name, value in mean.compute().items()},
        "line": {name: float(value) for name, value in line.compute().items()},
        "cosines": cosines.compute().tolist(),
        "example": {"mean": float(example.compute())},
    }


def test_uneven_idle_and_overlapping_processes_agree_with_one(tmp_path: Path) -> None:
    # Uneven and overlapping (key 2 on both), then one process without examples, then both without.
    shares = ([[0, 1, 2, 3], [2, 5]], [[0, 1, 2], []], [[], []])
    ranks = run_in_forks(lambda: [measure(share[distributed.get_rank()]) for share in shares], tmp_path)
    assert json.dumps(ranks[0]) == json.dumps(ranks[1])
    alone = [measure(keys) for keys in ([0, 1, 2, 3, 5], [0, 1, 2], [])]
    assert json.dumps(ranks[0]) == json.dumps(alone)  # to the last bit, NaN included

    uneven, idle, nothing = ranks[0]
    en, sw, zh = (0 + 10 + 20 + 30 + 50) / 5, (1 + 21) / 2, 24.0
    assert uneven["mean"] == {"en": en, "sw": sw, "zh": zh, "mean": (en + sw + zh) / 3, "worst": 24, "spread": 13}
    assert idle["mean"]["en"] == 10
    assert all(map(math.isnan, nothing["mean"].values()))
