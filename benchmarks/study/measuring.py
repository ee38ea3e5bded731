"""Measure one model for a study: numbers for each prompt and language, and no text.

This uses the functions of ``lightning-mlc evaluate``, and loads the model once.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.study.grid import StudyEvaluation
from lightning_mlc.consistency.measures import collinearity
from lightning_mlc.data.file_layouts import parse_rows
from lightning_mlc.data.kinds import ORDINARY
from lightning_mlc.data.languages import canonical_languages
from lightning_mlc.data.reading import read_rows
from lightning_mlc.data.records import Message
from lightning_mlc.evaluation.judges.base import Exchange, Verdict, declined
from lightning_mlc.evaluation.judges.roster import make_judges
from lightning_mlc.evaluation.likelihood import Likelihood, Openings, Scorer
from lightning_mlc.evaluation.prompts import read_prompt_sets
from lightning_mlc.evaluation.representations import prompt_states
from lightning_mlc.evaluation.settings import EvaluationSettings
from lightning_mlc.evaluation.systems.generation import LocalModel, TransformersGenerator
from lightning_mlc.evaluation.systems.local import chat_of, choose_device, choose_dtype, load
from lightning_mlc.evaluation.systems.system import System
from lightning_mlc.metrics.verdicts import MISSING, OUTCOMES
from lightning_mlc.models.layers import resolve_layer
from lightning_mlc.progress.bars import track

Prompts = Sequence[Mapping[str, list[Message]]]
"""N prompts by language."""


def ordinary_prompts(settings: StudyEvaluation, source_language: str) -> Prompts:
    """Read the prompts that a model should answer.

    Raises:
        UserError: A row cannot be used.
    """
    sets = read_prompt_sets([], [settings.ordinary], source_language)
    rows = [row for part in sets if part.kind == ORDINARY for row in part.rows]
    return [row.prompts for row in rows[: settings.ordinary_limit]]


class Measurer:
    """Measures models on the same prompts.

    Args:
        heldout: File of the held-out preference rows.
        settings: What to measure.
        source_language: Language of the responses.
        languages: Languages of training; None for all that the held-out rows have. ``settings.languages`` comes first.
        ordinary: Prompts that a model should answer.

    Raises:
        UserError: A file or a judge cannot be used.
    """

    def __init__(
        self,
        heldout: Path,
        settings: StudyEvaluation,
        source_language: str,
        languages: Sequence[str] | None,
        ordinary: Prompts,
    ) -> None:
        self.settings = settings
        self.source_language = source_language
        self.examples = list(parse_rows(read_rows(str(heldout), "--data"), source_language))
        self.prompts: Prompts = [example.prompts for example in self.examples]
        found = tuple(dict.fromkeys(language for prompt in self.prompts for language in prompt))
        asked = settings.languages or languages
        self.languages = found if asked is None else canonical_languages(asked, "evaluation.languages")
        self.ordinary = ordinary
        # Judges read the settings of `evaluate`. These are the ones that a study can choose.
        self.judges = make_judges(
            EvaluationSettings(models=["-"], prompts=["-"], judges=list(settings.judges), device=settings.device)
        )
        self.device = choose_device(settings.device)
        self.dtype = choose_dtype(settings.dtype, self.device)  # type: ignore[arg-type]

    def measure_model(self, system: System) -> dict[str, Any]:
        """Measure a model. Returns values for JSON: (N, L) lists, null where a prompt lacks a language, by these keys.

        ``is_ordinary`` has, of each held-out row, whether its prompt is an ordinary one.
        ``chosen`` and ``rejected`` hold ``[log-probability, tokens]``. ``margin`` and ``ordinary_margin`` are
        refusal margins. ``verdicts``, ``refused`` and ``ordinary_refused`` hold such a list for each judge, of the
        first ``generate`` prompts. ``layers`` holds for each layer (N,) measures of the hidden states at the end of a
        prompt.
        """
        started = time.perf_counter()
        found = self._measure(system)
        if self.device.type == "cuda":  # otherwise the next training would lack this memory
            gc.collect()
            torch.cuda.empty_cache()
        return found | {"seconds": time.perf_counter() - started}

    def _measure(self, system: System) -> dict[str, Any]:
        local = load(
            system, chat_of(system, self.settings.max_new_tokens, on_long_prompt="cut"), self.device, self.dtype
        )
        scorer = Scorer(local, self.settings.batch_tokens)
        openings = Openings()
        beginnings = [False] * len(openings.texts)
        # With the openings in one pass, because most of the work is the prompt.
        with_pair = self.languages if self.settings.responses == "all" else (self.source_language,)
        responses = [(example.chosen or "", example.rejected or "", *openings.texts) for example in self.examples]
        likelihoods = self._score(scorer, self.prompts, responses, [True, True, *beginnings], with_pair)
        alone = [language for language in self.languages if language not in with_pair]
        rest = self._score(scorer, self.prompts, [openings.texts] * len(self.prompts), beginnings, alone)
        ordinary = self._score(scorer, self.ordinary, [openings.texts] * len(self.ordinary), beginnings, self.languages)
        margins = [
            [ours or other for ours, other in zip(*rows, strict=True)] for rows in zip(likelihoods, rest, strict=True)
        ]
        found: dict[str, Any] = {
            "languages": list(self.languages),
            "is_ordinary": [example.ordinary for example in self.examples],
            "chosen": [[None if cell is None else _logp_and_tokens(cell[0]) for cell in row] for row in likelihoods],
            "rejected": [[None if cell is None else _logp_and_tokens(cell[1]) for cell in row] for row in likelihoods],
        }
        opened = len(openings.texts)
        found["margin"] = [
            [None if cell is None else openings.margin(cell[-opened:]) for cell in row] for row in margins
        ]
        found["ordinary_margin"] = [
            [None if cell is None else openings.margin(cell) for cell in row] for row in ordinary
        ]
        found["layers"] = self._layers(local)
        return found | self._judge(local)

    # ---- by prompt and language ---------------------------------------------------------------------

    def _places(self, prompts: Prompts) -> list[tuple[int, int]]:
        return [
            (i, j)
            for i, prompt in enumerate(prompts)
            for j, language in enumerate(self.languages)
            if language in prompt
        ]

    def _grid(self, prompts: Prompts, values: Mapping[tuple[int, int], Any]) -> list[list[Any]]:
        return [[values.get((i, j)) for j in range(len(self.languages))] for i in range(len(prompts))]

    def _score(
        self,
        scorer: Scorer,
        prompts: Prompts,
        responses: Sequence[Sequence[str]],
        ended: Sequence[bool],
        languages: Sequence[str],
    ) -> list[list[list[Likelihood] | None]]:
        places = [(i, j) for i, j in self._places(prompts) if self.languages[j] in languages]
        texts = [prompts[i][self.languages[j]] for i, j in places]
        with track("  likelihoods", len(places), "prompts") as work:
            scored = work.each(scorer.score(texts, [responses[i] for i, _ in places], (), ended))
            return self._grid(prompts, {places[index]: found for index, found in scored})

    @torch.inference_mode()
    def _layers(self, local: LocalModel) -> dict[str, dict[str, list[float | None]]]:
        """By layer, the collinearity of each prompt's hidden states, as they are and minus the mean of all."""
        places = self._places(self.prompts)
        texts = [self.prompts[i][self.languages[j]] for i, j in places]
        with track("  hidden states", len(places), "prompts") as work:
            flat = prompt_states(local, texts, self.settings.batch_tokens, work.advance)
        depth = flat.shape[1] - 1
        states = flat.new_zeros(len(self.prompts), len(self.languages), *flat.shape[1:])
        mask = torch.zeros(states.shape[:2], dtype=torch.bool)
        for place, state in zip(places, flat, strict=True):
            states[place], mask[place] = state, True
        found = {}
        for layer in self.settings.layers:
            rows = states[:, :, resolve_layer(layer, depth)].double()
            raw, centred = collinearity(rows, mask), collinearity(rows - rows[mask].mean(0), mask)
            found[str(layer)] = {
                "explained_variance": _finite_or_null(raw["explained_variance"]),
                "min_cosine": _finite_or_null(raw["min_cosine"]),
                "explained_variance_centred": _finite_or_null(centred["explained_variance"]),
            }
        return found

    def _judge(self, local: LocalModel) -> dict[str, Any]:
        found: dict[str, Any] = {"verdicts": {}, "refused": {}, "ordinary_refused": {}}
        count = self.settings.generate
        if not count or not self.judges:
            return found
        generator = TransformersGenerator(local, self.settings.max_new_tokens, self.settings.batch_tokens)
        kept: list[tuple[Prompts, dict[str, Callable[[Sequence[Verdict]], Sequence[float | None]]]]] = [
            (self.prompts[:count], {"verdicts": _labels, "refused": _declines}),
            (self.ordinary[:count], {"ordinary_refused": _declines}),
        ]
        for prompts, columns in kept:
            places = self._places(prompts)
            texts = [prompts[i][self.languages[j]] for i, j in places]
            exchanges: list[Exchange | None] = [None] * len(places)
            with track("  responses", len(places), "prompts") as work:
                for index, response in work.each(generator.generate(texts, ())):
                    exchanges[index] = Exchange(texts[index], response.text, self.languages[places[index][1]])
            for judge in self.judges:
                verdicts = dict(judge.judge([exchange for exchange in exchanges if exchange is not None], ()))
                for name, values_of in columns.items():
                    values = zip(verdicts, values_of(list(verdicts.values())), strict=True)
                    found[name][judge.name] = self._grid(prompts, {places[i]: value for i, value in values})
                judge.close()
        return found


def _labels(verdicts: Sequence[Verdict]) -> list[int]:
    return [MISSING if verdict.label is None else OUTCOMES[verdict.label] for verdict in verdicts]


def _declines(verdicts: Sequence[Verdict]) -> list[float | None]:
    found = declined([(verdict.label, verdict.refused) for verdict in verdicts])
    return [None if declines is None else float(declines) for declines in found]


def _logp_and_tokens(likelihood: Likelihood) -> list[float]:
    return [likelihood.logp, likelihood.tokens]


def _finite_or_null(values: torch.Tensor) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values.tolist()]
