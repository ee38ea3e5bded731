"""Means per language, and how far apart the languages are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mlc.metrics.keyed import KeyedMetric

SUMMARIES = ("mean", "worst", "spread")
"""Results over all languages, in addition to one for each."""


class LanguageMean(KeyedMetric):
    """Mean of a value over the examples of each language.

    ``compute`` returns a dict with the mean of each language that has samples, and three results over these languages:
    their ``mean``, their ``worst`` and their ``spread`` (largest minus smallest). Without samples these are NaN.

    Args:
        languages: BCP-47 codes. A language index is a position in this sequence.
        higher_is_better: Whether the worst language is the one with the lowest mean. None: neither is worse, and
            ``worst`` is left out.
        **options: Options of ``torchmetrics.Metric``.

    Raises:
        ValueError: A language occurs twice, or has the name of a result over languages.
    """

    def __init__(self, languages: Sequence[str], higher_is_better: bool | None, **options: Any) -> None:
        super().__init__(**options)
        self.languages = tuple(languages)
        if len(set(self.languages)) != len(self.languages) or set(self.languages) & set(SUMMARIES):
            raise ValueError(f"languages must be different, and none of {SUMMARIES}, got {self.languages}")
        # torchmetrics keeps the name `higher_is_better` for itself, as a constant of the class.
        self._worst_is_lowest = higher_is_better
        self.reset()

    def _add_none(self) -> None:
        none = torch.zeros(0, device=self.device)
        self.update(none.long(), none.long(), none)

    def update(self, keys: Tensor, language: Tensor, values: Tensor) -> None:
        """Add N samples.

        Args:
            keys: (N,) int64 keys of the examples.
            language: (N,) int64 indices of the languages.
            values: (N,) values.

        Raises:
            ValueError: The shapes differ, or no language has such an index.
        """
        if not keys.shape == language.shape == values.shape or keys.dim() != 1:
            shapes = [tuple(tensor.shape) for tensor in (keys, language, values)]
            raise ValueError(f"keys, language and values must be (N,), got {shapes[0]}, {shapes[1]} and {shapes[2]}")
        # An index that is too large would count as another language of the next example.
        if bool(((language < 0) | (language >= len(self.languages))).any()):
            raise ValueError(f"language must index {len(self.languages)} languages, got {language.unique().tolist()}")  # type: ignore[no-untyped-call]
        self._add(keys * len(self.languages) + language, values)

    def compute(self) -> dict[str, Tensor]:
        """Return the mean of each language with samples and the results over languages, () each."""
        keys, values = self._unique()
        language = keys % len(self.languages)
        results = {
            name: values[language == index].mean()
            for index, name in enumerate(self.languages)
            if bool((language == index).any())
        }
        return _with_summaries(results, self._worst_is_lowest)

    def plot(self, val: dict[str, Tensor] | None = None, ax: Any = None) -> Any:
        """Draw one bar for each language that has samples.

        Args:
            val: A result of ``compute``. None: the current one.
            ax: Axes of matplotlib. None: those of a new figure.

        Returns:
            The figure and the axes.
        """
        from lightning_mlc.report.plots import AFTER, draw_bars, figure_and_axes

        results = self.compute() if val is None else val
        names = [name for name in self.languages if name in results]
        figure, axes = figure_and_axes(ax)
        worst = float(results["worst"]) if "worst" in results else None
        draw_bars(axes, names, [("", [float(results[name]) for name in names], AFTER)], worst=worst)
        return figure, axes


def language_differences(desired: Mapping[str, Tensor], undesired: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Subtract two results of :class:`LanguageMean`, language by language.

    Args:
        desired: Result for desired responses.
        undesired: Result for undesired responses, which is subtracted.

    Returns:
        The difference of each language that both have, and ``mean``, ``worst`` (the lowest) and ``spread`` of these
        differences.
    """
    languages = [name for name in desired if name in undesired and name not in SUMMARIES]
    return _with_summaries({name: desired[name] - undesired[name] for name in languages}, worst_is_lowest=True)


def _with_summaries(results: dict[str, Tensor], worst_is_lowest: bool | None) -> dict[str, Tensor]:
    means = torch.stack(list(results.values())) if results else torch.full((1,), float("nan"), dtype=torch.float64)
    lowest, highest = means.min(), means.max()
    summaries = {"mean": means.mean(), "worst": lowest if worst_is_lowest else highest}
    if worst_is_lowest is None:
        del summaries["worst"]
    return results | summaries | {"spread": highest - lowest}
