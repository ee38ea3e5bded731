"""A model as a judge. It is asked in its own format, on any engine."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_mlc.evaluation.judges.base import Exchange, Verdict, unintelligible
from lightning_mlc.evaluation.judges.formats import Format
from lightning_mlc.evaluation.systems.generation import Generator


class PromptedJudge:
    """A judge that asks a model, which answers in a known format.

    Args:
        name: The judge's name in reports.
        form: How to ask the model and how to read its answers.
        identity: Everything that identifies the model and its settings, as plain JSON values.
        generator: Starts the model. It is called on first use, because this takes time.
    """

    def __init__(
        self, name: str, form: Format, identity: Mapping[str, Any], generator: Callable[[], Generator]
    ) -> None:
        self.name = name
        self._form = form
        self._identity = dict(identity)
        self._make = generator
        self._generator: Generator | None = None

    @property
    def settings(self) -> dict[str, Any]:
        return {"judge": self.name, "model": self._identity}

    def close(self) -> None:
        if self._generator is not None:
            self._generator.close()
        self._generator = None

    def judge(self, exchanges: Sequence[Exchange], done: Collection[int]) -> Iterator[tuple[int, Verdict]]:
        settled = {}
        for index, exchange in enumerate(exchanges):
            # An empty response is always invalid. Other unintelligible ones are judged by the model if it can do so.
            reason = unintelligible(exchange.response)
            if reason == "empty" or (reason and not self._form.says_invalid):
                settled[index] = Verdict("invalid", None, reason)
        yield from ((index, verdict) for index, verdict in settled.items() if index not in done)
        asked = [index for index in range(len(exchanges)) if index not in settled]
        if all(index in done for index in asked):
            return
        if self._generator is None:
            self._generator = self._make()
        places = {index: place for place, index in enumerate(asked)}
        conversations = [self._form.ask(exchanges[index]) for index in asked]
        already = {places[index] for index in done if index in places}
        for place, response in self._generator.generate(conversations, already):
            verdict = Verdict(None, None, response.error) if response.error else self._form.read(response.text)
            yield asked[place], replace(verdict, decoding=response.decoding)
