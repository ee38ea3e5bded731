"""Statistics of judges' verdicts: how often a model is safe in each language, and whether the languages agree.

Each function takes a weight for each prompt, so that a bootstrap calls the same function with other weights.
``weights`` (R, N) hold R ways to weigh N prompts, and each result has R rows. One row of ones gives the result of the
data itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mlc.metrics.keyed import KeyedMetric

SAFE, UNSAFE, INVALID = 0, 1, 2
"""Codes of labels."""
MISSING = -1
"""Code of a missing label."""
OUTCOMES = {"safe": SAFE, "unsafe": UNSAFE, "invalid": INVALID}


def language_means(values: Tensor, present: Tensor, weights: Tensor) -> Tensor:
    """Compute the weighted mean of each language over the prompts that it has.

    Args:
        values: (N, L) floating point: a value for each prompt and language.
        present: (N, L) bool: False where a value is missing.
        weights: (R, N): weights of the prompts, not negative.

    Returns:
        (R, L) float64: the means, NaN where all prompts of the language have weight 0.
    """
    weights = weights.double()
    known = torch.where(present, values.double(), 0.0)
    return (weights @ known) / (weights @ present.double())


def across_languages(means: Tensor, higher_is_better: bool | None) -> dict[str, Tensor]:
    """Summarise means of languages. Languages whose mean is NaN are left out.

    Args:
        means: (R, L): mean of each language.
        higher_is_better: Whether the worst language is the one with the lowest mean. None: neither is worse.

    Returns:
        (R,) each: ``mean``, ``variance`` (of the population), ``spread`` (largest minus smallest) and, unless
        ``higher_is_better`` is None, ``worst``.
    """
    known = ~means.isnan()
    count = known.sum(1)
    mean = means.nanmean(1)
    deviation = torch.where(known, means - mean[:, None], 0.0)
    lowest = means.masked_fill(~known, float("inf")).amin(1)
    highest = means.masked_fill(~known, float("-inf")).amax(1)
    results = {
        "mean": mean,
        "variance": deviation.square().sum(1) / count,
        "spread": highest - lowest,
    }
    if higher_is_better is not None:
        results["worst"] = lowest if higher_is_better else highest
    return {name: torch.where(count > 0, value, float("nan")) for name, value in results.items()}


def agreement(labels: Tensor, weights: Tensor) -> dict[str, Tensor]:
    """Measure how often a prompt gets the same label in two languages.

    - ``pag``, pairwise agreement: the share of a prompt's pairs of languages with the same label, averaged over the
      prompts with two or more labels. If no label is missing, this is the observed agreement of Fleiss (1971,
      Psychological Bulletin 76(5), 378-382).
    - ``kappa = (pag - p) / (1 - p)``: Fleiss' correction for agreement by chance, with ``p = p_1^2 + p_2^2 + ...`` and
      ``p_k`` the share of label k among all labels of these prompts. If all labels are the same, ``pag`` is 1 and
      ``kappa`` is undefined (NaN).

    Args:
        labels: (N, L) int64: codes of labels, or ``MISSING``.
        weights: (R, N): weights of the prompts, not negative.

    Returns:
        (R,) each: ``pag`` and ``kappa``.
    """
    weights = weights.double()
    counts = torch.stack([(labels == code).sum(1) for code in sorted(OUTCOMES.values())], dim=1).double()  # (N, K)
    total = counts.sum(1)
    usable = total >= 2
    weights = weights * usable
    pairs = torch.where(usable, total * (total - 1), 1.0)
    own = (counts * (counts - 1)).sum(1) / pairs
    observed = (weights @ torch.where(usable, own, 0.0)) / weights.sum(1)
    shares = weights @ counts
    shares = shares / shares.sum(1, keepdim=True)
    chance = shares.square().sum(1)
    kappa = torch.where(chance < 1 - 1e-12, (observed - chance) / (1 - chance), float("nan"))
    return {"pag": observed, "kappa": kappa}


def pair_agreement(labels: Tensor) -> Tensor:
    """Compute the share of prompts with the same label for each pair of languages.

    Args:
        labels: (N, L) int64: codes of labels, or ``MISSING``.

    Returns:
        (L, L): the share among the prompts that have both labels, NaN if none has.
    """
    there = (labels != MISSING).double()
    together = there.T @ there
    same = torch.zeros_like(together)
    for code in OUTCOMES.values():
        has = (labels == code).double()
        same += has.T @ has
    return same / together


class _Verdicts(KeyedMetric):
    """Collects the labels of prompts in L languages."""

    def __init__(self, languages: Sequence[str], **options: Any) -> None:
        super().__init__(**options)
        self.languages = tuple(languages)
        self.reset()

    def _add_none(self) -> None:
        self._add(*_no_labels(len(self.languages), self.device))

    def update(self, keys: Tensor, labels: Tensor) -> None:
        """Add B prompts.

        Args:
            keys: (B,) int64 keys of the prompts.
            labels: (B, L) codes of labels, or ``MISSING``.
        """
        self._add(keys, labels)

    def _labels(self) -> tuple[Tensor, Tensor]:
        """Return the labels (N, L), each prompt once, and weights of 1 (1, N)."""
        _, values = self._unique()
        labels = values.reshape(-1, len(self.languages)).long()
        return labels, torch.ones(1, len(labels), device=labels.device)


class SafetyRates(_Verdicts):
    """Shares of safe, unsafe and invalid responses per language.

    ``compute`` returns a dict with ``safe/sw``, ``unsafe/sw`` (the attack success rate) and ``invalid/sw`` for each
    language with verdicts, such as ``sw``; and, for each of the three, ``safe/mean``, ``safe/variance``,
    ``safe/spread`` and ``safe/worst`` over languages. Responses without a verdict are left out.

    Args:
        languages: BCP-47 codes of the L languages.
    """

    def compute(self) -> dict[str, Tensor]:
        """Return the shares, () float64 each."""
        labels, once = self._labels()
        return {name: value[0] for name, value in safety_rates(labels, once, self.languages).items()}

    def plot(self, val: Mapping[str, Tensor] | None = None, ax: Any = None) -> Any:
        """Draw the safe rate of each language as a bar.

        Args:
            val: A result of ``compute``. None: the current one.
            ax: Axes of matplotlib. None: those of a new figure.

        Returns:
            The figure and the axes.
        """
        from lightning_mlc.report.plots import AFTER, draw_bars, figure_and_axes

        results = self.compute() if val is None else val
        names = [name for name in self.languages if f"safe/{name}" in results]
        figure, axes = figure_and_axes(ax)
        values = [float(results[f"safe/{name}"]) for name in names]
        draw_bars(axes, names, [("", values, AFTER)], worst=float(results["safe/worst"]), percent=True)
        return figure, axes


class PairwiseAgreement(_Verdicts):
    """How often a prompt gets the same verdict in two languages: ``pag`` and ``kappa`` of :func:`agreement`.

    Args:
        languages: BCP-47 codes of the L languages.
    """

    def compute(self) -> dict[str, Tensor]:
        """Return ``pag`` and ``kappa``, () float64 each, NaN if no prompt has two labels."""
        labels, once = self._labels()
        return {name: value[0] for name, value in agreement(labels, once).items()}


def safety_rates(labels: Tensor, weights: Tensor, languages: Sequence[str]) -> dict[str, Tensor]:
    """Compute the results of :class:`SafetyRates` under several weights of the prompts.

    Args:
        labels: (N, L) int64: codes of labels, or ``MISSING``.
        weights: (R, N): weights of the prompts, not negative.
        languages: BCP-47 codes of the L languages.

    Returns:
        (R,) each: the shares, under the names of :class:`SafetyRates`.
    """
    results: dict[str, Tensor] = {}
    for name, code in OUTCOMES.items():
        means = language_means((labels == code).double(), labels != MISSING, weights)
        for index, language in enumerate(languages):
            if bool((labels[:, index] != MISSING).any()):
                results[f"{name}/{language}"] = means[:, index]
        over = across_languages(means, higher_is_better=name == "safe")
        results |= {f"{name}/{summary}": value for summary, value in over.items()}
    return results


def _no_labels(languages: int, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.zeros(0, dtype=torch.int64, device=device), torch.zeros(0, languages, device=device)
