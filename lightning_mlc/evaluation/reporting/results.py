"""From the journals of a study to everything its report says, as plain values."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_mlc import __version__
from lightning_mlc.evaluation.journal import Key
from lightning_mlc.evaluation.judges.base import declined
from lightning_mlc.evaluation.judges.roster import MARGIN, judge_specs
from lightning_mlc.evaluation.prompts import ORDINARY, PromptSet
from lightning_mlc.evaluation.reporting import statistics as figures
from lightning_mlc.evaluation.reporting.statistics import Figure, Measure, Sample, Subject
from lightning_mlc.evaluation.study import Study
from lightning_mlc.evaluation.systems.decoding import Decoding, decoding_of, noted
from lightning_mlc.evaluation.systems.system import System
from lightning_mlc.metrics.verdicts import INVALID, MISSING, OUTCOMES, SAFE, UNSAFE, pair_agreement

REWARD = "chosen and rejected"
"""Where reward figures come from."""


def collect(study: Study) -> dict[str, Any]:
    """All figures of ``study``, whose phases are done, in plain values."""
    replicates, seed = study.settings.bootstrap, study.settings.seed
    samples: list[Sample] = []
    found: list[Figure] = []
    coverage: list[dict[str, Any]] = []
    pairs: list[dict[str, Any]] = []
    verdicts: dict[tuple[str, str, str], Tensor] = {}
    for system in study.systems:
        for part in study.sets:
            languages = tuple(language for language in study.languages if language in part.languages())
            subject = Subject(system.label, part.name, languages, study.seen_by(system))
            for judge in study.judges:
                labels, refused, counts = _verdicts(study, system, part, languages, judge.name)
                place = {"model": system.label, "set": part.name, "judge": judge.name}
                coverage.append(place | counts)
                shares = {
                    code: torch.where(labels == MISSING, math.nan, (labels == code).double())
                    for code in (SAFE, UNSAFE, INVALID)
                }
                samples.append(Sample.of(subject, judge.name, figures.INVALID, shares[INVALID]))
                if part.kind == ORDINARY:
                    samples.append(Sample.of(subject, judge.name, figures.OVER_REFUSAL, refused))
                    continue
                samples.append(Sample.of(subject, judge.name, figures.SAFE, shares[SAFE]))
                samples.append(Sample.of(subject, judge.name, figures.UNSAFE, shares[UNSAFE]))
                verdicts[system.label, part.name, judge.name] = labels
                found += figures.agreement_of(labels, subject, judge.name, replicates, seed)
                baseline = verdicts[study.systems[0].label, part.name, judge.name]
                if system is not study.systems[0]:
                    found += figures.agreement_comparisons_of(
                        labels, baseline, subject, study.systems[0].label, judge.name, replicates, seed
                    )
                pairs.append(place | {"agreement": pair_agreement(labels).tolist()})
            samples += _likelihood_samples(study, system, part, subject)
    samples = [sample for sample in samples if bool(sample.present.any())]
    for sample in samples:
        found += figures.figures_of(sample, replicates, seed)
    first = study.systems[0].label
    for sample in samples:
        for other in samples:
            if sample.subject.model != first and other.subject.model == first and _alike(sample, other):
                found += figures.comparisons_of(sample, other, replicates, seed)
    named = {name: f"{name}={spec}" if spec else name for name, spec in judge_specs(study.settings)}
    results = {
        "version": __version__,
        "models": [_description(study, system) for system in study.systems],
        "sets": [_set(study, part) for part in study.sets],
        "languages": list(study.languages),
        "judges": [
            judge.settings | {"named": named[judge.name]} | noted(_decoding_of_judge(study, judge.name))
            for judge in study.judges
        ],
        "settings": {
            "max_new_tokens": study.settings.max_new_tokens,
            "bootstrap": replicates,
            "seed": seed,
            "reference": study.settings.reference,
        },
        "coverage": coverage,
        "figures": [figure.as_dict() for figure in found],
        "pairs": pairs,
        "representations": _representations(study),
    }
    return {key: finite(value) for key, value in results.items()}


def _verdicts(
    study: Study, system: System, part: PromptSet, languages: Sequence[str], judge: str
) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Labels (N, L) and refusals (N, L; NaN where unknown) of a set, and how many of each kind there are."""
    labels = torch.full((len(part.rows), len(languages)), MISSING)
    refused = torch.full(labels.shape, float("nan"), dtype=torch.float64)
    said: dict[tuple[int, int], tuple[Any, bool | None]] = {}
    counts = {"prompts": 0, "no response": 0, "not ended": 0, "unreadable": 0} | dict.fromkeys(OUTCOMES, 0)
    with study.responses(system) as responses, study.verdicts(system, judge) as verdicts:
        for i, row in enumerate(part.rows):
            for j, language in enumerate(languages):
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
                said[i, j] = verdict["label"], verdict["refused"]
    for place, declines in zip(said, declined(list(said.values())), strict=True):
        if declines is not None:
            refused[place] = float(declines)
    return labels, refused, counts


def _likelihood_samples(study: Study, system: System, part: PromptSet, subject: Subject) -> list[Sample]:
    if system.is_endpoint:
        return []
    samples = []
    if MARGIN in study.settings.judges:
        measure = figures.ORDINARY_MARGIN if part.kind == ORDINARY else figures.MARGIN
        with study.margins(system) as journal:
            values = {key: record["margin"] for key, record in journal.records.items()}
        margins = _grid(part, subject.languages, values)
        positive = Measure("prefers to refuse", measure.higher_is_better, True)
        wins = torch.where(margins.isnan(), math.nan, (margins > 0).double())
        samples += [Sample.of(subject, MARGIN, measure, margins), Sample.of(subject, MARGIN, positive, wins)]
    if any(row.chosen is not None for row in part.rows):
        margins = _grid(part, subject.languages, _rewards(study, system))
        ties = (torch.sign(margins) + 1) / 2  # a tie is half a win; the sign of NaN is NaN
        samples += [
            Sample.of(subject, REWARD, figures.REWARD_ACCURACY, ties),
            Sample.of(subject, REWARD, figures.REWARD_MARGIN, margins),
        ]
    return samples


def _rewards(study: Study, system: System) -> dict[Key, float]:
    """Reward of the chosen response minus that of the rejected one: per token, or against the reference."""
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


def _grid(part: PromptSet, languages: Sequence[str], values: dict[Key, float]) -> Tensor:
    """(N, L) float64 of ``values``, NaN where there is none."""
    return torch.tensor(
        [[values.get(Key(part.name, row.id, language), math.nan) for language in languages] for row in part.rows],
        dtype=torch.float64,
    ).reshape(len(part.rows), len(languages))


def _alike(sample: Sample, other: Sample) -> bool:
    return (sample.subject.set, sample.judge, sample.measure) == (other.subject.set, other.judge, other.measure)


def _description(study: Study, system: System) -> dict[str, Any]:
    seen = study.seen_by(system)
    return {
        "name": system.label,
        "model": system.spec,
        "identity": study.identities[system.label],
        "seen": None if seen is None else list(seen),
        "decoding": _decoding_of_model(study, system),
    }


def _decoding_of_model(study: Study, system: System) -> Decoding | None:
    """How the responses of ``system`` were chosen; None where nobody judges, and so none are asked for."""
    if not study.judges:
        return None
    with study.responses(system) as journal:
        return decoding_of(journal.records.values())


def _decoding_of_judge(study: Study, judge: str) -> Decoding:
    """How that judge's answers were chosen, about any model."""
    found: list[dict[str, Any]] = []
    for system in study.systems:
        with study.verdicts(system, judge) as journal:
            found += journal.records.values()
    return decoding_of(found)


def _set(study: Study, part: PromptSet) -> dict[str, Any]:
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
    """``value`` with null in the place of NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
