"""A mean per language, and how far apart the languages are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mlc.metrics.keyed import KeyedMetric

SUMMARIES = ("mean", "worst", "spread")
"""What :class:`LanguageMean` reports beside each language."""


class LanguageMean(KeyedMetric):
    """Mean of a value over the examples of each language.

    ``compute`` gives a dict: each language that has samples, then ``mean`` over those languages, the
    ``worst`` of them, and their ``spread`` (largest minus smallest). NaN without samples.

    Args:
        languages: BCP-47 codes that language indices refer to.
        higher_is_better: Whether the worst language is the one with the lowest mean.
    """

    def __init__(self, languages: Sequence[str], higher_is_better: bool, **options: Any) -> None:
        super().__init__(**options)
        self.languages = tuple(languages)
        self._worst_is_lowest = higher_is_better

    def update(self, keys: Tensor, language: Tensor, values: Tensor) -> None:
        """Add N samples: example ``keys`` (N,), indices of their ``language`` (N,) and ``values`` (N,)."""
        self._add(keys * len(self.languages) + language, values)

    def compute(self) -> dict[str, Tensor]:
        keys, values = self._unique()
        language = keys % len(self.languages)
        results = {
            name: values[language == index].mean()
            for index, name in enumerate(self.languages)
            if bool((language == index).any())
        }
        if not results:
            return {name: torch.tensor(float("nan"), dtype=torch.float64) for name in SUMMARIES}
        means = torch.stack(list(results.values()))
        summary = means.mean(), means.min() if self._worst_is_lowest else means.max(), means.max() - means.min()
        return results | dict(zip(SUMMARIES, summary, strict=True))

    def plot(self, val: dict[str, Tensor] | None = None, ax: Any = None) -> Any:
        """Bars per language on ``ax`` (a new figure without one); returns figure and axes."""
        from lightning_mlc.report.plots import figure_and_axes

        results = self.compute() if val is None else val
        figure, axes = figure_and_axes(ax)
        names = [name for name in self.languages if name in results]
        axes.bar(names, [float(results[name]) for name in names])
        return figure, axes
