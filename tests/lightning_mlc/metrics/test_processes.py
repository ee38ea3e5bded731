"""Two processes that see overlapping and uneven shares agree with one that sees all."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_mlc.metrics import Collinearity, ExampleMean, LanguageCosines, LanguageMean

ROOT = Path(__file__).parents[3]
LANGUAGES = ("en", "sw", "zh")

PROCESS = """
import datetime, json, sys
import torch, torch.distributed as dist
sys.path[:0] = [sys.argv[3]]
from test_processes import measure
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group(
    "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
)
# Uneven and overlapping (key 2 on both); then one process without anything; then both without.
results = [measure(share[rank]) for share in ([[0, 1, 2, 3], [2, 5]], [[0, 1, 2], []], [[], []])]
json.dump(results, open(f"{folder}/{rank}.json", "w"))
dist.destroy_process_group()
"""


def measure(keys: list[int]) -> dict[str, object]:
    """What the metrics say after the examples ``keys``, one batch each; Swahili is in the even ones alone."""
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


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_uneven_idle_and_overlapping_processes_agree_with_one(tmp_path: Path) -> None:
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), str(tmp_path), str(Path(__file__).parent)],
            env={"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=120) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    ranks = [(tmp_path / f"{rank}.json").read_text() for rank in range(2)]
    assert ranks[0] == ranks[1]
    alone = [measure(keys) for keys in ([0, 1, 2, 3, 5], [0, 1, 2], [])]
    assert ranks[0] == json.dumps(alone)  # to the last bit, NaN included

    uneven, idle, nothing = json.loads(ranks[0])
    en, sw, zh = (0 + 10 + 20 + 30 + 50) / 5, (1 + 21) / 2, 24.0
    assert uneven["mean"] == {"en": en, "sw": sw, "zh": zh, "mean": (en + sw + zh) / 3, "worst": 24, "spread": 13}
    assert idle["mean"]["en"] == 10
    assert all(map(math.isnan, nothing["mean"].values()))
