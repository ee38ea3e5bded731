"""LanguageMean: directions, ties, missing languages, and input that it refuses."""

from __future__ import annotations

import itertools
import math
import warnings

import pytest
import torch
from torch import Tensor

from lightning_mlc.metrics import LanguageMean, language_differences
from lightning_mlc.metrics.per_language import SUMMARIES
from lightning_mlc.report import table

LANGUAGES = ("en", "sw", "zh")


def seen(metric: LanguageMean) -> dict[str, float]:
    return {name: float(value) for name, value in metric.compute().items()}


def filled(higher_is_better: bool | None) -> LanguageMean:
    metric = LanguageMean(LANGUAGES, higher_is_better)
    # en: 1, 0.5 (a tie), 0 -> 0.5; zh: 1, 1, 0.5 -> 5/6; no Swahili.
    metric.update(
        torch.tensor([0, 1, 2, 0, 1, 2]),
        torch.tensor([0, 0, 0, 2, 2, 2]),
        torch.tensor([1, 0.5, 0, 1, 1, 0.5]),
    )
    return metric


@pytest.mark.parametrize(("higher_is_better", "worst"), [(True, 0.5), (False, 5 / 6), (None, None)])
def test_the_worst_language_is_at_the_bad_end(higher_is_better: bool | None, worst: float | None) -> None:
    expected = {"en": 0.5, "zh": 5 / 6, "mean": 2 / 3, "spread": 1 / 3} | ({} if worst is None else {"worst": worst})
    assert seen(filled(higher_is_better)) == pytest.approx(expected)


def test_every_order_cut_and_repeat_gives_the_same_bits() -> None:
    samples = [(0, 0, 0.1), (1, 0, 0.7), (2, 0, 1e9), (1, 2, 0.3), (2, 2, -0.2)]
    results = set()
    for order in itertools.permutations(samples):
        for cut in (1, 2, 5):
            metric = LanguageMean(LANGUAGES, True)
            for part in batched(order, cut):
                keys, language, values = zip(*part, strict=True)
                metric.update(torch.tensor(keys), torch.tensor(language), torch.tensor(values))
            first = order[0]  # repeated, as by a padding sampler
            metric.update(torch.tensor([first[0]]), torch.tensor([first[1]]), torch.tensor([first[2]]))
            results.add(tuple(sorted(seen(metric).items())))
    assert len(results) == 1


def batched(items: tuple[tuple[int, int, float], ...], size: int) -> list[tuple[tuple[int, int, float], ...]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64])
def test_narrow_values_are_added_up_in_float64(dtype: torch.dtype) -> None:
    metric = LanguageMean(LANGUAGES, True)
    values = torch.tensor([2048, 1, 1], dtype=dtype)  # a half-precision sum would stay at 2048
    metric.update(torch.arange(3), torch.zeros(3, dtype=torch.int64), values)
    assert metric.compute()["en"].dtype == torch.float64
    assert seen(metric)["en"] == pytest.approx(2050 / 3)


def test_empty_is_nan_and_silent() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metric = LanguageMean(LANGUAGES, True)
        assert set(seen(metric)) == set(SUMMARIES)
        assert all(map(math.isnan, seen(metric).values()))
        used = filled(True)
        used.reset()
        assert all(map(math.isnan, seen(used).values()))


def test_a_value_that_is_not_finite_shows_in_its_language_and_in_all_summaries() -> None:
    metric = filled(True)
    metric.update(torch.tensor([9]), torch.tensor([1]), torch.tensor([float("nan")]))
    found = seen(metric)
    assert (found["en"], found["zh"]) == (0.5, pytest.approx(5 / 6))
    assert all(math.isnan(found[name]) for name in ("sw", *SUMMARIES))


@pytest.mark.parametrize("index", [-1, 3])
def test_an_index_of_no_language_is_refused(index: int) -> None:
    with pytest.raises(ValueError, match="language must index 3 languages"):
        LanguageMean(LANGUAGES, True).update(torch.tensor([0]), torch.tensor([index]), torch.tensor([1.0]))


@pytest.mark.parametrize("values", [torch.ones(1), torch.ones(2, 1)])
def test_shapes_that_would_broadcast_are_refused(values: Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be \(N,\)"):
        LanguageMean(LANGUAGES, True).update(torch.tensor([0, 1]), torch.tensor([0, 0]), values)


@pytest.mark.parametrize("languages", [("en", "en"), ("en", "worst")])
def test_languages_that_would_hide_each_other_are_refused(languages: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="languages must be different"):
        LanguageMean(languages, True)


def test_states_stay_out_of_checkpoints_and_survive_forward() -> None:
    metric = filled(True)
    assert metric.state_dict() == {}
    batch_only = metric(torch.tensor([7]), torch.tensor([1]), torch.tensor([0.25]))
    assert float(batch_only["mean"]) == 0.25
    assert seen(metric)["sw"] == 0.25
    assert seen(metric)["en"] == 0.5


def test_plot_marks_the_worst_bar() -> None:
    _, axes = filled(True).plot()
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([0.5, 5 / 6])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["en\nworst", "zh"]


def test_differences_have_summaries_of_their_own() -> None:
    desired = {name: torch.tensor(value) for name, value in {"en": 3.0, "sw": 1.0, "zh": 2.0, "mean": 2.0}.items()}
    undesired = {name: torch.tensor(value) for name, value in {"zh": -1.0, "en": 2.5, "worst": 9.0}.items()}
    found = {name: float(value) for name, value in language_differences(desired, undesired).items()}
    assert found == {"en": 0.5, "zh": 3.0, "mean": 1.75, "worst": 0.5, "spread": 2.5}
    nothing = language_differences(desired, {})
    assert set(nothing) == set(SUMMARIES)
    assert all(math.isnan(float(value)) for value in nothing.values())


def test_the_table_has_a_row_for_every_summary() -> None:
    assert table.SUMMARIES == SUMMARIES
