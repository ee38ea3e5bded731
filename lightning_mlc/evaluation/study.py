"""An evaluation from start to end: generate, judge, measure. Each phase writes files that the next one reads.

::

    OUT/MODEL/responses.jsonl            responses of the model
    OUT/MODEL/verdicts-JUDGE.jsonl       verdicts of one judge on these responses
    OUT/MODEL/margins.jsonl              refusal margins
    OUT/MODEL/pairs.jsonl                log-likelihoods of the chosen and the rejected responses
    OUT/MODEL/representations.json       hidden states of all languages at every layer
    OUT/results.json, report.html, report.md, plots/

Errors in the user's input are reported before a model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.console import Console

from lightning_mlc.data.languages import canonical_languages
from lightning_mlc.data.records import Message
from lightning_mlc.errors import UserError
from lightning_mlc.evaluation.journal import Job, Journal, Key, digest
from lightning_mlc.evaluation.judges.base import Exchange, Judge
from lightning_mlc.evaluation.judges.roster import MARGIN, endpoint_of, make_judges
from lightning_mlc.evaluation.likelihood import Likelihood, Openings, Scorer
from lightning_mlc.evaluation.phases import answered, fill
from lightning_mlc.evaluation.prompts import EvaluationRow, choose_languages, conversations, read_prompt_sets
from lightning_mlc.evaluation.representations import compare_languages
from lightning_mlc.evaluation.settings import EvaluationSettings
from lightning_mlc.evaluation.systems.decoding import decoding_entry
from lightning_mlc.evaluation.systems.endpoint import EndpointGenerator, Unanswered
from lightning_mlc.evaluation.systems.generation import Generator, LocalModel
from lightning_mlc.evaluation.systems.local import check_lengths, explain_dtype, warn_of_slow_dtype
from lightning_mlc.evaluation.systems.resolved import Placement, ResolvedSystem
from lightning_mlc.evaluation.systems.system import System, parse_systems
from lightning_mlc.files.atomic import write_whole
from lightning_mlc.progress.bars import say


class Study:
    """The work of an evaluation, and the files that hold its results.

    Args:
        settings: The settings of the evaluation.
        console: Where progress is shown.

    Raises:
        UserError: A setting, a prompt set, a model or a judge cannot be used.
    """

    def __init__(self, settings: EvaluationSettings, console: Console) -> None:
        self.settings = settings
        self.console = console
        self.out = Path(settings.out)
        if self.out.exists() and not self.out.is_dir():
            raise UserError("out", f"{self.out} is a file; give a folder")
        self.systems = parse_systems(settings.models, settings.chat_template)
        self.openings = Openings() if settings.openings is None else Openings.read(settings.openings)
        self.seen = None if settings.seen is None else canonical_languages(settings.seen, "seen")
        self.local = [system for system in self.systems if not system.is_endpoint]
        if settings.reference is not None and settings.reference not in (names := [s.label for s in self.local]):
            raise UserError(
                "reference",
                f"no local model is named '{settings.reference}' "
                f"(local models: {', '.join(names) or 'none'}; endpoints give no likelihoods)",
            )
        self.sets = read_prompt_sets(settings.prompts, settings.ordinary, settings.source_language, settings.limit)
        self.languages = choose_languages(self.sets, settings.languages)
        self.conversations = list(conversations(self.sets, self.languages))
        self.placement = Placement.of(settings)
        self.judges = make_judges(settings, self.placement)
        warn_of_slow_dtype(settings.dtype, self.placement.device)
        self.identities = {system.label: system.identity for system in self.systems}
        if not self.judges and not self.local:
            raise UserError("judges", "endpoints give no likelihoods; add a judge of responses, such as refusal")
        self._endpoints = {
            system.label: endpoint_of(system, settings.max_new_tokens, settings)
            for system in self.systems
            if system.is_endpoint
        }
        self._resolved = {system.label: self._resolve(system) for system in self.local}

    def _resolve(self, system: System) -> ResolvedSystem:
        room = self.settings.max_new_tokens
        resolved = ResolvedSystem.of(system, self.settings, self.placement, room, remember=True)
        check_lengths(system, resolved.chat, self.conversations, room)
        return resolved

    # ---- journals -----------------------------------------------------------------------------------

    def responses(self, system: System) -> Journal:
        """The responses of ``system``."""
        settings: dict[str, Any] = {
            "model": self.identities[system.label],
            "decoding": "greedy, or as its record says" if system.is_endpoint else "greedy",
            "max_new_tokens": self.settings.max_new_tokens,
        }
        if not system.is_endpoint:
            resolved = self._resolved[system.label]
            settings |= resolved.journal_settings | {"engine": resolved.engine}
        return Journal(self.out / system.label / "responses.jsonl", settings)

    def verdicts(self, system: System, judge: str) -> Journal:
        """The verdicts of the judge of that name on the responses of ``system``."""
        settings = next(other.settings for other in self.judges if other.name == judge)
        return Journal(self.out / system.label / f"verdicts-{judge}.jsonl", settings)

    def margins(self, system: System) -> Journal:
        """The refusal margins of a local model."""
        settings = {"model": self.identities[system.label], "openings": digest(*self.openings.texts)}
        return Journal(
            self.out / system.label / "margins.jsonl", settings | self._resolved[system.label].journal_settings
        )

    def pairs(self, system: System) -> Journal:
        """The log-likelihoods of chosen and rejected responses under a local model."""
        settings = {"model": self.identities[system.label]}
        return Journal(
            self.out / system.label / "pairs.jsonl", settings | self._resolved[system.label].journal_settings
        )

    def representations(self, system: System) -> Path:
        """The file with the collinearity of a local model's hidden states."""
        return self.out / system.label / "representations.json"

    # ---- jobs ---------------------------------------------------------------------------------------

    @property
    def prompt_jobs(self) -> list[Job]:
        """One job for each prompt and language."""
        return [Job(key, digest(messages)) for key, messages in self.conversations]

    @cached_property
    def paired_prompts(self) -> list[tuple[Key, list[Message], EvaluationRow]]:
        """The prompts whose rows have a chosen and a rejected response."""
        rows = {(part.name, row.id): row for part in self.sets for row in part.rows if row.chosen is not None}
        return [
            (key, messages, rows[key.set, key.id]) for key, messages in self.conversations if (key.set, key.id) in rows
        ]

    @property
    def pair_jobs(self) -> list[Job]:
        """One job for each of ``paired_prompts``."""
        return [Job(key, digest(messages, row.chosen, row.rejected)) for key, messages, row in self.paired_prompts]

    def exchanges(self, responses: Journal) -> list[tuple[Job, Exchange]]:
        """Each prompt that has a response, with this response."""
        found = []
        for key, messages in self.conversations:
            record = responses.records.get(key)
            if record is not None and record["error"] is None:
                text = record["response"]
                found.append((Job(key, digest(messages, text)), Exchange(messages, text, key.language)))
        return found

    def seen_by(self, system: System) -> tuple[str, ...] | None:
        """Languages that ``system`` was trained on; None if unknown."""
        if self.seen is not None or system.provenance is None or system.provenance.languages is None:
            return self.seen
        return tuple(system.provenance.languages)

    # ---- phases -------------------------------------------------------------------------------------

    def run(self) -> None:
        """Do everything that is not done yet.

        Raises:
            UserError: An endpoint did not answer every request. All answers are kept, and all other work is done.
        """
        for system in self.systems:  # first, because results with other settings are an error
            self._check(system)
        if self.local and self.settings.dtype == "auto":
            reason = explain_dtype(self.placement.device).reason
            self.console.print(f"dtype: {self.placement.dtype}, because {reason}", soft_wrap=True)
        unanswered: list[str] = []
        for system in self.systems:
            with _collecting(unanswered):
                if system.is_endpoint:
                    self._generate(system, None)
                else:
                    self._run_local(system)
        for judge in self.judges:
            for system in self.systems:
                with _collecting(unanswered):
                    self._judge(system, judge)
            judge.close()  # so that only one judge model is in memory
        if unanswered:
            for line in unanswered[1:]:
                say(line)
            raise UserError(None, unanswered[0])

    def _check(self, system: System) -> None:
        if self.judges:
            with self.responses(system) as journal:
                answered(journal, self.prompt_jobs)
        for judge in self.judges:
            with self.verdicts(system, judge.name):
                pass
        if not system.is_endpoint and MARGIN in self.settings.judges:
            with self.margins(system) as journal:
                answered(journal, self.prompt_jobs)
        if not system.is_endpoint and self.paired_prompts:
            with self.pairs(system) as journal:
                answered(journal, self.pair_jobs)

    def _judge(self, system: System, judge: Judge) -> None:
        with self.responses(system) as journal:
            asked = self.exchanges(journal)
        jobs, exchanges = [job for job, _ in asked], [exchange for _, exchange in asked]
        with self.verdicts(system, judge.name) as journal:

            def produce(done: Collection[int]) -> Iterator[tuple[int, Mapping[str, Any]]]:
                return ((index, verdict.as_dict()) for index, verdict in judge.judge(exchanges, done))

            fill(journal, jobs, produce, f"{system.label}: {judge.name}", self.console)

    def _run_local(self, system: System) -> None:
        model = _LazyModel(self._resolved[system.label])
        self._generate(system, model)
        if MARGIN in self.settings.judges:
            with self.margins(system) as journal:
                jobs = self.prompt_jobs
                texts = [self.openings.texts] * len(jobs)

                def produce(done: Collection[int]) -> Iterator[tuple[int, Mapping[str, Any]]]:
                    for index, found in self._score(model, [m for _, m in self.conversations], texts, done, False):
                        yield index, {"margin": self.openings.margin(found), "likelihoods": _as_lists(found)}

                fill(journal, jobs, produce, f"{system.label}: margin", self.console)
        if self.paired_prompts:
            with self.pairs(system) as journal:
                responses = [(row.chosen or "", row.rejected or "") for _, _, row in self.paired_prompts]

                def produce_pairs(done: Collection[int]) -> Iterator[tuple[int, Mapping[str, Any]]]:
                    for index, found in self._score(
                        model, [m for _, m, _ in self.paired_prompts], responses, done, True
                    ):
                        yield index, {"likelihoods": _as_lists(found)}

                fill(journal, self.pair_jobs, produce_pairs, f"{system.label}: chosen and rejected", self.console)
        if self.settings.representation_prompts:
            self._measure_representations(system, model)

    def _generate(self, system: System, model: _LazyModel | None) -> None:
        if not self.judges:
            return
        with self.responses(system) as journal:
            texts = [messages for _, messages in self.conversations]

            def produce(done: Collection[int]) -> Iterator[tuple[int, Mapping[str, Any]]]:
                if len(done) == len(texts):
                    return
                # Closed here, because the likelihoods load the same model, and memory may have room for only one.
                with closing(self._generator(system, model)) as generator:
                    for index, response in generator.generate(texts, done):
                        answer = {"response": response.text, "finished": response.finished, "error": response.error}
                        yield index, answer | decoding_entry(response.decoding)

            fill(journal, self.prompt_jobs, produce, f"{system.label}: generate", self.console)

    def _generator(self, system: System, model: _LazyModel | None) -> Generator:
        if model is None:
            return EndpointGenerator(self._endpoints[system.label])
        return self._resolved[system.label].generator(self.settings.batch_tokens, loaded=lambda: model.loaded)

    def _score(
        self,
        model: _LazyModel,
        texts: Sequence[list[Message]],
        responses: Sequence[Sequence[str]],
        done: Collection[int],
        ended: bool,
    ) -> Iterator[tuple[int, list[Likelihood]]]:
        if len(done) < len(texts):
            yield from Scorer(model.loaded, self.settings.batch_tokens).score(texts, responses, done, ended)

    def _measure_representations(self, system: System, model: _LazyModel) -> None:
        path = self.representations(system)
        rows = [(part.name, row) for part in self.sets for row in part.rows][: self.settings.representation_prompts]
        chosen = {(name, row.id) for name, row in rows}
        asked = [(key, messages) for key, messages in self.conversations if (key.set, key.id) in chosen]
        settings = json.loads(
            json.dumps(
                {
                    "model": self.identities[system.label],
                    "prompts": digest([[*key, messages] for key, messages in asked]),
                    **self._resolved[system.label].journal_settings,
                }
            )
        )
        before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if before.get("settings") == settings and "silhouettes" in before:  # earlier versions did not measure these
            return  # one result for all prompts together, so with other prompts it is computed again
        found = compare_languages(system, model.loaded, asked, self.languages, self.settings.batch_tokens, self.console)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"settings": settings, **found}, indent=1))


class _LazyModel:
    """A local model that is loaded on first use."""

    def __init__(self, resolved: ResolvedSystem) -> None:
        self._resolved = resolved

    @cached_property
    def loaded(self) -> LocalModel:
        say(f"{self._resolved.system.label}: loading")
        return self._resolved.load()


@contextmanager
def _collecting(unanswered: list[str]) -> Iterator[None]:
    """Add the error of an endpoint that did not answer every request to ``unanswered``, and continue."""
    try:
        yield
    except Unanswered as error:
        unanswered.append(str(error))


def _as_lists(found: Sequence[Likelihood]) -> list[list[float]]:
    return [[likelihood.logp, likelihood.tokens] for likelihood in found]
