"""Computes the content of ``results.json`` from the journals of a study."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_mlc import __version__
from lightning_mlc.data.kinds import ORDINARY, Kind
from lightning_mlc.evaluation.journal import Key
from lightning_mlc.evaluation.judges.base import declined
from lightning_mlc.evaluation.judges.roster import MARGIN, judge_specs
from lightning_mlc.evaluation.prompts import PromptSet
from lightning_mlc.evaluation.reporting import measures
from lightning_mlc.evaluation.reporting.measures import EvaluationMeasure
from lightning_mlc.evaluation.reporting.separation import (
    SeparationSample,
    separation_comparisons,
    separation_figures,
    separation_samples,
)
from lightning_mlc.evaluation.reporting.statistics import (
    EvaluationSample,
    Figure,
    Subject,
    agreement_comparisons_of,
    agreement_of,
    comparisons_of,
    figures_of,
)
from lightning_mlc.evaluation.study import Study
from lightning_mlc.evaluation.systems.decoding import Decoding, decoding_entry, decoding_of
from lightning_mlc.evaluation.systems.system import System
from lightning_mlc.metrics.preference import wins
from lightning_mlc.metrics.verdicts import INVALID, MISSING, OUTCOMES, SAFE, UNSAFE, pair_agreement

REWARD = "chosen and rejected"
"""The name in place of a judge's for reward figures."""


@dataclass(frozen=True)
class JudgedSet:
    """The verdicts of one judge about one model on one prompt set of N prompts in L languages."""

    subject: Subject
    judge: str
    kind: Kind
    labels: Tensor
    """(N, L) int64: codes of ``OUTCOMES``, or ``MISSING`` if no verdict exists."""
    refused: Tensor
    """(N, L) float64: 1 if the response declines, otherwise 0; NaN if unknown."""
    counts: dict[str, int]
    """Numbers of prompts, of missing, unfinished and unreadable responses, and of verdicts of each kind."""

    @property
    def place(self) -> dict[str, str]:
        return {"model": self.subject.model, "set": self.subject.set, "judge": self.judge}

    def samples(self) -> list[EvaluationSample]:
        """Invalid responses and refusals, and for harmful prompts safe and unsafe responses."""
        refused = measures.OVER_REFUSAL if self.kind == ORDINARY else measures.REFUSED
        found = [
            self._share(measures.INVALID, INVALID),
            EvaluationSample.of(self.subject, self.judge, refused, self.refused),
        ]
        if self.kind == ORDINARY:
            return found
        return [*found, self._share(measures.SAFE, SAFE), self._share(measures.UNSAFE, UNSAFE)]

    def _share(self, measure: EvaluationMeasure, code: int) -> EvaluationSample:
        values = torch.where(self.labels == MISSING, math.nan, (self.labels == code).double())
        return EvaluationSample.of(self.subject, self.judge, measure, values)


def collect(study: Study) -> dict[str, Any]:
    """All results of a study.

    Args:
        study: The study, with all of its phases done.

    Returns:
        The content of ``results.json``: plain values.
    """
    replicates, seed = study.settings.bootstrap, study.settings.seed
    judged: list[JudgedSet] = []
    samples: list[EvaluationSample] = []
    for system in study.systems:
        for part in study.sets:
            own = judged_sets(study, system, part)
            judged += own
            samples += samples_of(study, system, part, own)
    harmful = [own for own in judged if own.kind != ORDINARY]
    figures = [
        *_agreement(harmful, study.systems[0].label, replicates, seed),
        *(figure for sample in samples for figure in figures_of(sample, replicates, seed)),
        *_comparisons(samples, study.systems[0].label, replicates, seed),
        *_separations(samples, study.systems[0].label, replicates, seed),
    ]
    results = {
        "version": __version__,
        "models": [_model_description(study, system) for system in study.systems],
        "sets": [_set_description(study, part) for part in study.sets],
        "languages": list(study.languages),
        "judges": _judge_descriptions(study),
        "settings": {
            "max_new_tokens": study.settings.max_new_tokens,
            "bootstrap": replicates,
            "seed": seed,
            "reference": study.settings.reference,
        },
        "coverage": [own.place | own.counts for own in judged],
        "figures": [figure.as_dict() for figure in figures],
        "pairs": [own.place | {"agreement": pair_agreement(own.labels).tolist()} for own in harmful],
        "representations": _representations(study),
    }
    return {key: finite(value) for key, value in results.items()}


def judged_sets(study: Study, system: System, part: PromptSet) -> list[JudgedSet]:
    """The verdicts of every judge about ``system`` on ``part``."""
    subject = _subject(study, system, part)
    return [_judged_set(study, system, part, subject, judge.name) for judge in study.judges]


def samples_of(study: Study, system: System, part: PromptSet, judged: Sequence[JudgedSet]) -> list[EvaluationSample]:
    """Every measure of ``system`` on ``part`` that has a value."""
    samples = [sample for own in judged for sample in own.samples()]
    samples += _likelihood_samples(study, system, part, _subject(study, system, part))
    return [sample for sample in samples if bool(sample.present.any())]


def _subject(study: Study, system: System, part: PromptSet) -> Subject:
    languages = tuple(language for language in study.languages if language in part.languages())
    return Subject(system.label, part.name, languages, study.seen_by(system))


def _agreement(judged: Sequence[JudgedSet], baseline: str, replicates: int, seed: int) -> Iterator[Figure]:
    """The agreement between languages, and its difference from that of the model ``baseline``."""
    labels = {(own.subject.set, own.judge): own.labels for own in judged if own.subject.model == baseline}
    for own in judged:
        yield from agreement_of(own.labels, own.subject, own.judge, replicates, seed)
        if own.subject.model != baseline:
            theirs = labels[own.subject.set, own.judge]
            yield from agreement_comparisons_of(own.labels, theirs, own.subject, baseline, own.judge, replicates, seed)


def _comparisons(samples: Sequence[EvaluationSample], baseline: str, replicates: int, seed: int) -> Iterator[Figure]:
    """Each sample of the other models compared with the same measure of the model ``baseline``."""
    theirs = {_comparison_key(sample): sample for sample in samples if sample.subject.model == baseline}
    for sample in samples:
        if sample.subject.model != baseline and _comparison_key(sample) in theirs:
            yield from comparisons_of(sample, theirs[_comparison_key(sample)], replicates, seed)


def _separations(samples: Sequence[EvaluationSample], baseline: str, replicates: int, seed: int) -> Iterator[Figure]:
    """How well each model tells harmful prompts from ordinary ones, and its difference from the model ``baseline``."""
    paired = separation_samples(samples)
    theirs = {_comparison_key(sample): sample for sample in paired if sample.subject.model == baseline}
    for sample in paired:
        yield from separation_figures(sample, replicates, seed)
        if sample.subject.model != baseline and _comparison_key(sample) in theirs:
            yield from separation_comparisons(sample, theirs[_comparison_key(sample)], replicates, seed)


def _comparison_key(sample: EvaluationSample | SeparationSample) -> tuple[str, str, EvaluationMeasure]:
    return sample.subject.set, sample.judge, sample.measure


def _judged_set(study: Study, system: System, part: PromptSet, subject: Subject, judge: str) -> JudgedSet:
    labels = torch.full((len(part.rows), len(subject.languages)), MISSING)
    refused = torch.full(labels.shape, float("nan"), dtype=torch.float64)
    verdicts_of: dict[tuple[int, int], tuple[Any, bool | None]] = {}
    counts = {"prompts": 0, "no response": 0, "not ended": 0, "unreadable": 0} | dict.fromkeys(OUTCOMES, 0)
    with study.responses(system) as responses, study.verdicts(system, judge) as verdicts:
        for i, row in enumerate(part.rows):
            for j, language in enumerate(subject.languages):
                if language not in row.prompts:
                    continue
                key = Key(part.name, row.id, language)
                counts["prompts"] += 1
                response = responses.records[key]
                if response["error"] is not None:
                    counts["no response"] += 1
                    continue
                counts["not ended"] += not response["finished"]
                verdict = verdicts.records[key]
                if verdict["label"] is None:
                    counts["unreadable"] += 1
                    continue
                counts[verdict["label"]] += 1
                labels[i, j] = OUTCOMES[verdict["label"]]
                verdicts_of[i, j] = verdict["label"], verdict["refused"]
    for place, declines in zip(verdicts_of, declined(list(verdicts_of.values())), strict=True):
        if declines is not None:
            refused[place] = float(declines)
    return JudgedSet(subject, judge, part.kind, labels, refused, counts)


def _likelihood_samples(study: Study, system: System, part: PromptSet, subject: Subject) -> list[EvaluationSample]:
    if system.is_endpoint:
        return []
    samples = []
    if MARGIN in study.settings.judges:
        is_ordinary = part.kind == ORDINARY
        margin = measures.ORDINARY_REFUSAL_MARGIN if is_ordinary else measures.REFUSAL_MARGIN
        prefers = measures.ORDINARY_PREFERS_REFUSAL if is_ordinary else measures.PREFERS_REFUSAL
        with study.margins(system) as journal:
            values = {key: record["margin"] for key, record in journal.records.items()}
        margins = _matrix_of(part, subject.languages, values)
        prefers_refusal = torch.where(margins.isnan(), math.nan, (margins > 0).double())
        samples += [
            EvaluationSample.of(subject, MARGIN, margin, margins),
            EvaluationSample.of(subject, MARGIN, prefers, prefers_refusal),
        ]
    if any(row.chosen is not None for row in part.rows):
        margins = _matrix_of(part, subject.languages, _rewards(study, system))
        samples += [
            EvaluationSample.of(subject, REWARD, measures.REWARD_ACCURACY, wins(margins)),
            EvaluationSample.of(subject, REWARD, measures.REWARD_MARGIN, margins),
        ]
    return samples


def _rewards(study: Study, system: System) -> dict[Key, float]:
    """Reward of the chosen response minus that of the rejected one: per token, or relative to the reference."""
    with study.pairs(system) as journal:
        own = {key: record["likelihoods"] for key, record in journal.records.items()}
    label = study.settings.reference
    if label is None:
        return {key: chosen[0] / chosen[1] - rejected[0] / rejected[1] for key, (chosen, rejected) in own.items()}
    reference = next(other for other in study.systems if other.label == label)
    with study.pairs(reference) as journal:
        theirs = {key: record["likelihoods"] for key, record in journal.records.items()}
    return {
        key: (chosen[0] - rejected[0]) - (theirs[key][0][0] - theirs[key][1][0])
        for key, (chosen, rejected) in own.items()
        if key in theirs
    }


def _matrix_of(part: PromptSet, languages: Sequence[str], values: dict[Key, float]) -> Tensor:
    """(N, L) float64: the value of each prompt and language, or NaN if it has none."""
    return torch.tensor(
        [[values.get(Key(part.name, row.id, language), math.nan) for language in languages] for row in part.rows],
        dtype=torch.float64,
    ).reshape(len(part.rows), len(languages))


def _judge_descriptions(study: Study) -> list[dict[str, Any]]:
    named = {name: f"{name}={spec}" if spec else name for name, spec in judge_specs(study.settings)}
    return [
        judge.settings | {"named": named[judge.name]} | decoding_entry(_decoding_of_judge(study, judge.name))
        for judge in study.judges
    ]


def _model_description(study: Study, system: System) -> dict[str, Any]:
    seen = study.seen_by(system)
    return {
        "name": system.label,
        "model": system.spec,
        "identity": study.identities[system.label],
        "seen": None if seen is None else list(seen),
        "decoding": _decoding_of_model(study, system),
    }


def _decoding_of_model(study: Study, system: System) -> Decoding | None:
    """How the responses of ``system`` were decoded; None without a judge, because then none are generated."""
    if not study.judges:
        return None
    with study.responses(system) as journal:
        return decoding_of(journal.records.values())


def _decoding_of_judge(study: Study, judge: str) -> Decoding:
    """How the judge's answers about all models were decoded."""
    found: list[dict[str, Any]] = []
    for system in study.systems:
        with study.verdicts(system, judge) as journal:
            found += journal.records.values()
    return decoding_of(found)


def _set_description(study: Study, part: PromptSet) -> dict[str, Any]:
    counts = {
        language: sum(language in row.prompts for row in part.rows)
        for language in study.languages
        if language in part.languages()
    }
    return {"name": part.name, "kind": part.kind, "prompts": len(part.rows), "languages": counts}


def _representations(study: Study) -> dict[str, Any]:
    if not study.settings.representation_prompts:
        return {}
    return {
        system.label: {
            key: value
            for key, value in json.loads(study.representations(system).read_text(encoding="utf-8")).items()
            if key != "settings"
        }
        for system in study.local
    }


def finite(value: Any) -> Any:
    """``value`` with None in place of numbers that are not finite, because JSON has none."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
