"""Metrics against arithmetic by hand. They do not depend on batches, order or processes."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import run_in_forks
from torch import Tensor, distributed

from lightning_mlc.consistency.measures import collinearity
from lightning_mlc.metrics import Collinearity, ExampleMean, LanguageCosines, LanguageMean

LANGUAGES = ("en", "sw", "zh")


def test_means_per_language() -> None:
    metric = LanguageMean(LANGUAGES, higher_is_better=True)
    metric.update(torch.tensor([0, 1, 0]), torch.tensor([0, 0, 2]), torch.tensor([1.0, 0.5, 0.25]))
    assert {k: float(v) for k, v in metric.compute().items()} == {
        "en": 0.75,
        "zh": 0.25,
        "mean": 0.5,
        "worst": 0.25,
        "spread": 0.5,
    }
    lower = LanguageMean(LANGUAGES, higher_is_better=False)
    lower.update(torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([1.0, 3.0]))
    assert float(lower.compute()["worst"]) == 3.0


def test_order_cuts_and_repeats_change_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, language = torch.arange(30) // 3, torch.arange(30) % 3
    values = torch.rand(30, generator=generator)
    whole = LanguageMean(LANGUAGES, True)
    whole.update(keys, language, values)
    pieces = LanguageMean(LANGUAGES, True)
    order = torch.randperm(30, generator=generator)
    for part in (*order.split(7), order[:5]):  # the last ones occur twice, as with a padding sampler
        pieces.update(keys[part], language[part], values[part])
    assert {k: float(v) for k, v in whole.compute().items()} == {k: float(v) for k, v in pieces.compute().items()}


def test_mean_over_examples() -> None:
    metric = ExampleMean()
    metric.update(torch.tensor([4, 2]), torch.tensor([1.0, 2.0]))
    metric.update(torch.tensor([3, 4]), torch.tensor([6.0, 1.0]))  # the last one occurs twice
    assert float(metric.compute()) == 3.0


def test_nothing_seen_is_nan() -> None:
    assert all(math.isnan(v) for v in LanguageMean(LANGUAGES, True).compute().values())
    assert all(math.isnan(v) for v in Collinearity().compute().values())
    assert ExampleMean().compute().isnan()
    assert LanguageCosines(LANGUAGES).compute().isnan().all()


def test_nan_does_not_vanish() -> None:
    metric = LanguageMean(LANGUAGES, True)
    metric.update(torch.tensor([0, 1]), torch.tensor([0, 0]), torch.tensor([float("nan"), 1.0]))
    assert metric.compute()["en"].isnan()


STATES = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[True, True, True], [True, False, True], [True, False, False], [True, True, True]])


def numpy_measures(states: Tensor, mask: Tensor) -> list[float]:
    rows = states[mask].double().numpy()
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    s = np.linalg.svd(unit, compute_uv=False)
    logits = s / s[0] / 0.2
    loss = float(np.log(np.exp(logits - logits[0]).sum()))
    floor = math.log(1 + (len(rows) - 1) * math.exp(-5))
    return [loss, loss - floor, float(s[0] ** 2 / (s**2).sum()), float((unit @ unit.T).min())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_collinearity(dtype: torch.dtype) -> None:
    found = collinearity(STATES.to(dtype), MASK)
    assert found["valid"].tolist() == [True, True, False, True]
    expected = np.array([numpy_measures(s, m) for s, m in zip(STATES.to(dtype), MASK, strict=True)])
    for column, name in enumerate(("loss", "excess", "explained_variance", "min_cosine")):
        for row in (0, 1, 3):
            assert float(found[name][row]) == pytest.approx(expected[row, column], abs=1e-9)
    metric = Collinearity()
    metric.update(torch.tensor([5, 6]), STATES[:2].to(dtype), MASK[:2])
    metric.update(torch.tensor([8, 7, 5]), STATES[[3, 2, 0]].to(dtype), MASK[[3, 2, 0]])
    means = expected[[0, 1, 3]].mean(0)
    assert [float(v) for v in metric.compute().values()] == pytest.approx(means.tolist(), abs=1e-9)


def test_opposite_rows_are_on_one_line_but_not_alike() -> None:
    row = torch.randn(1, 1, 6)
    found = collinearity(torch.cat([row, -row, row], dim=1), torch.ones(1, 3, dtype=torch.bool))
    assert float(found["explained_variance"]) == pytest.approx(1, abs=1e-6)
    assert float(found["excess"]) == pytest.approx(0, abs=1e-6)
    assert float(found["min_cosine"]) == pytest.approx(-1)


def test_cosines() -> None:
    metric = LanguageCosines(LANGUAGES)
    metric.update(torch.tensor([0, 1]), STATES[:2], MASK[:2])
    metric.update(torch.tensor([1]), STATES[1:2], MASK[1:2])
    unit = torch.nn.functional.normalize(STATES.double(), dim=2)
    found = metric.compute()
    torch.testing.assert_close(found.diagonal(), torch.ones(3, dtype=torch.float64))
    assert float(found[0, 1]) == pytest.approx(float(unit[0, 0] @ unit[0, 1]))
    assert float(found[0, 2]) == pytest.approx(float(unit[0, 0] @ unit[0, 2] + unit[1, 0] @ unit[1, 2]) / 2)
    alone = LanguageCosines(LANGUAGES)
    alone.update(torch.tensor([1]), STATES[1:2], MASK[1:2])
    assert alone.compute()[0, 1].isnan()  # no example has both


def test_plots_draw_what_was_computed() -> None:
    mean = LanguageMean(LANGUAGES, True)
    mean.update(torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([0.25, 0.75]))
    _, axes = mean.plot()
    assert [bar.get_height() for bar in axes.patches] == [0.25, 0.75]
    cosines = LanguageCosines(LANGUAGES)
    cosines.update(torch.tensor([0]), STATES[:1], MASK[:1])
    _, axes = cosines.plot()
    np.testing.assert_allclose(axes.images[0].get_array(), cosines.compute().numpy())
    line = Collinearity()
    line.update(torch.tensor([0]), STATES[:1], MASK[:1])
    _, axes = line.plot()
    assert next(bar.get_height() for bar in axes.patches) == pytest.approx(float(line.compute()["explained_variance"]))


def overlapping() -> dict[str, float]:
    """Key 2 is on both ranks, as with a padding sampler; rank 1 has no Swahili."""
    rank = distributed.get_rank()
    mean, cosines = LanguageMean(("en", "sw"), True), LanguageCosines(("en", "sw"))
    keys = torch.tensor([[0, 1, 2], [2, 3, 4]][rank])
    values = torch.tensor([[1.0, 2.0, 3.0], [3.0, 5.0, 9.0]][rank])
    mean.update(keys, torch.zeros(3, dtype=torch.int64), values)
    if rank == 0:
        mean.update(keys, torch.ones(3, dtype=torch.int64), 10 * values)
    states = torch.eye(2).expand(3, 2, 2) + keys[:, None, None] * 0.1
    cosines.update(keys, states, torch.ones(3, 2, dtype=torch.bool))
    return {name: float(value) for name, value in mean.compute().items()} | {"cosine": float(cosines.compute()[0, 1])}


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    first, second = run_in_forks(overlapping, tmp_path)
    assert first == second
    assert first["en"] == pytest.approx((1 + 2 + 3 + 5 + 9) / 5)
    assert first["sw"] == pytest.approx(20)
    keys = torch.arange(5)
    rows = torch.nn.functional.normalize(torch.eye(2).expand(5, 2, 2) + keys[:, None, None] * 0.1, dim=2)
    assert first["cosine"] == pytest.approx(float((rows[:, 0] * rows[:, 1]).sum(1).mean()), rel=1e-6)
