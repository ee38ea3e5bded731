"""Validation: metrics per language and between languages."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torchmetrics
from torch import Tensor, nn

from lightning_mlc.consistency import Observed
from lightning_mlc.data.batches import Batch
from lightning_mlc.data.datamodule import MultilingualData
from lightning_mlc.data.rows import CHOSEN, REJECTED
from lightning_mlc.metrics import Collinearity, ExampleMean, LanguageCosines, LanguageMean, language_differences
from lightning_mlc.metrics.preference import wins
from lightning_mlc.models.forward import Grid
from lightning_mlc.training.declined import Declined, DeclinedShares
from lightning_mlc.training.losses import Losses
from lightning_mlc.training.prediction import Response


class Results(NamedTuple):
    """What a validation measured."""

    metrics: dict[str, float]
    """Values by name, without ``val/`` or ``test/``."""
    cosines: list[list[float]]
    """Mean cosine of the hidden states for each pair of languages."""


class Validation(nn.Module):
    """Metrics of a validation over the whole data, exact on any number of processes.

    Responses are scored after the prompt in each language; where a language has no response of its own, that of the
    source language is scored.

    Args:
        losses: The objective and the consistency terms.
        data: The data, set up.
        declined: Which prompts are answered; None: none.
    """

    def __init__(self, losses: Losses, data: MultilingualData, declined: Declined | None) -> None:
        super().__init__()
        languages = data.languages
        self._losses = losses
        self._source = languages[0]
        self._languages = languages
        metrics: dict[str, torchmetrics.Metric] = {}
        if losses.objective is not None:
            metrics["loss"] = LanguageMean(languages, higher_is_better=False)
        if losses.needs_rejected and data.kind == "pairs":
            metrics["rewards/accuracies"] = LanguageMean(languages, higher_is_better=True)
            metrics["rewards/margins"] = LanguageMean(languages, higher_is_better=True)
        elif losses.needs_rejected:
            metrics["rewards/chosen"] = LanguageMean(languages, higher_is_better=True)
            metrics["rewards/rejected"] = LanguageMean(languages, higher_is_better=False)
        metrics["nll"] = LanguageMean(languages, higher_is_better=False)
        mlc = losses.consistency.mlc
        metrics["mlc/raw"] = Collinearity(mlc.temperature, mlc.scale)
        if losses.consistency.needs.representations:
            metrics["mlc/extracted"] = Collinearity(mlc.temperature, mlc.scale)
        for term in losses.consistency.terms:
            metrics[f"{term.name}/loss"] = ExampleMean()
        metrics["cosines"] = LanguageCosines(languages)
        self._metrics: Any = nn.ModuleDict(metrics)
        self._declined = None if declined is None else DeclinedShares(languages)

    def reset(self) -> None:
        """Forget everything that was measured."""
        for metric in self._metrics.values():
            metric.reset()
        if self._declined is not None:
            self._declined.reset()

    def update(self, batch: Batch, reference: Grid | None, observed: Observed) -> None:
        """Measure a batch.

        Args:
            batch: B examples with responses in all languages.
            reference: Results of the reference model; None if none is needed.
            observed: Results of the policy, and its representations.
        """
        grid, metrics, losses = observed.policy, self._metrics, self._losses
        assert grid.states is not None
        if losses.objective is not None:
            values = losses.objective.each_alone(losses.responses(grid, reference, batch.source))
            language = torch.full_like(batch.keys, batch.source)
            metrics["loss"].update(keys=batch.keys, language=language, values=values)
        self._update_responses(batch, grid, reference)
        for term in losses.consistency.terms:
            own = observed.only(term.rows)
            groups = own.is_group
            metrics[f"{term.name}/loss"].update(batch.keys[groups], term.losses(own)[groups])
        metrics["mlc/raw"].update(batch.keys, grid.states, grid.present)
        metrics["cosines"].update(batch.keys, grid.states, grid.present)
        if observed.representations is not None:
            metrics["mlc/extracted"].update(batch.keys, observed.representations, grid.present)

    def _update_responses(self, batch: Batch, grid: Grid, reference: Grid | None) -> None:
        """Negative log-likelihoods and rewards of the responses in each language."""
        metrics = self._metrics

        def samples(values: Tensor, present: Tensor) -> dict[str, Tensor]:
            examples, language = present.nonzero(as_tuple=True)
            return {"keys": batch.keys[examples], "language": language, "values": values[present]}

        chosen, rejected = grid.scores(CHOSEN, reference), grid.scores(REJECTED, reference)
        metrics["nll"].update(**samples(-chosen.mean_logps, chosen.present))
        if not self._losses.needs_rejected:
            return
        rewards = self._losses.rewards(chosen), self._losses.rewards(rejected)
        if "rewards/accuracies" in metrics:
            margins = samples(rewards[0] - rewards[1], chosen.present & rejected.present)
            metrics["rewards/margins"].update(**margins)
            metrics["rewards/accuracies"].update(**margins | {"values": wins(margins["values"])})
        else:
            metrics["rewards/chosen"].update(**samples(rewards[0], chosen.present))
            metrics["rewards/rejected"].update(**samples(rewards[1], rejected.present))

    def update_declined(self, batch: Batch, responses: list[Response]) -> None:
        """Measure the ``responses`` to prompts of ``batch``."""
        assert self._declined is not None
        self._declined.update(batch, responses)

    def results(self) -> Results:
        """The means over all batches and processes. All processes call it together."""
        values: dict[str, Any] = {name: metric.compute() for name, metric in self._metrics.items()}
        cosines = values.pop("cosines").tolist()
        if "rewards/rejected" in values:
            values["rewards/margins"] = language_differences(values["rewards/chosen"], values["rewards/rejected"])
        found: dict[str, Tensor] = {}
        for name, value in values.items():
            if name == "loss":
                # The loss that training lowers: that of the source language. `nll` and `rewards` have the others.
                found[name] = value[self._source]
            elif isinstance(value, Tensor):
                found[name] = value
            elif not name.startswith("rewards/") or value.keys() & set(self._languages):
                # Rewards of a kind that has no responses are left out.
                found |= {f"{name}/{key}": part for key, part in value.items()}
        if self._declined is not None:
            found |= self._declined.results()
        return Results({name: float(value) for name, value in found.items()}, cosines)
