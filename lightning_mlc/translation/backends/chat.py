"""A chat model that is asked to translate, in this process or behind an endpoint."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from lightning_mlc.evaluation.journal import digest
from lightning_mlc.evaluation.systems.generation import Conversation, Generator, Response
from lightning_mlc.translation.failures import CUT, DECLINED, TOO_LONG, fault_of_reply
from lightning_mlc.translation.languages import language_of
from lightning_mlc.translation.texts import Reply, Text
from lightning_mlc.translation.wording import ask, code_of, read


class ChatBackend:
    """Asks a chat model for translations.

    Args:
        name: ``openai`` or ``transformers``.
        settings: What distinguishes the model from others: plain JSON values.
        make: Makes the generator, when it is first needed: to load a model takes time.
        fits: Whether a conversation leaves room for a reply in the model's context.
    """

    def __init__(
        self,
        name: str,
        settings: Mapping[str, Any],
        make: Callable[[], Generator],
        fits: Callable[[Conversation], bool] = lambda conversation: True,
    ) -> None:
        self.name = name
        self._settings = settings
        self._make = make
        self._fits = fits
        self._generator: Generator | None = None

    @property
    def settings(self) -> dict[str, Any]:
        english, french = language_of("en"), language_of("fr")
        wording = digest([ask("?", english, french, attempt) for attempt in (1, 2)])
        return {**self._settings, "wording": wording}

    def translate(self, texts: Sequence[Text], attempt: int, done: Collection[int]) -> Iterator[tuple[int, Reply]]:
        fits = [self._fits(ask(*text, attempt)) for text in texts]
        yield from ((index, Reply(None, TOO_LONG)) for index, fit in enumerate(fits) if not fit and index not in done)
        asked = [index for index, fit in enumerate(fits) if fit]
        if all(index in done for index in asked):
            return
        if self._generator is None:
            self._generator = self._make()
        already = {place for place, index in enumerate(asked) if index in done}
        requests = _Requests(texts, asked, attempt)
        for place, response in self._generator.generate(requests, already):
            yield asked[place], _reply(texts[asked[place]], response)

    def close(self) -> None:
        if self._generator is not None:
            self._generator.close()
        self._generator = None


class _Requests(Sequence[Conversation]):
    """What is asked about those ``texts`` whose indices are ``asked``, by index.

    Each is worded when it is needed, because all together take more memory than everything else.
    """

    def __init__(self, texts: Sequence[Text], asked: Sequence[int], attempt: int) -> None:
        self._texts = texts
        self._asked = asked
        self._attempt = attempt

    def __len__(self) -> int:
        return len(self._asked)

    def __getitem__(self, place: Any) -> Any:
        text: Text = self._texts[self._asked[place]]
        return ask(*text, self._attempt)


def _reply(text: Text, response: Response) -> Reply:
    if response.error is not None:
        return Reply(None, DECLINED)
    translation = read(response.text, code_of(*text))
    if translation is not None:
        return Reply(translation)
    return Reply(None, fault_of_reply(response.text) if response.finished else CUT)
