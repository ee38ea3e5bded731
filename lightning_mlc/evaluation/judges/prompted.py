"""A model as judge: asked in its format, whatever runs it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_mlc.evaluation.judges.base import Exchange, Verdict, unintelligible
from lightning_mlc.evaluation.judges.formats import Format
from lightning_mlc.evaluation.systems.generation import Generator


class PromptedJudge:
    """Judges with a generator that answers in a known format.

    Args:
        name: What reports call it.
        form: How to ask and to read.
        identity: What tells this model from another one: plain JSON values.
        generator: Makes what runs the model, on first use: loading one takes time.
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
            # Nothing to read is invalid whoever judges; what is no language, unless the judge knows by itself.
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
