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
        conversations = [ask(*text, attempt) for text in texts]
        asked = [index for index, conversation in enumerate(conversations) if self._fits(conversation)]
        too_long = set(range(len(texts))).difference(asked)
        yield from ((index, Reply(None, TOO_LONG)) for index in sorted(too_long.difference(done)))
        if all(index in done for index in asked):
            return
        if self._generator is None:
            self._generator = self._make()
        already = {place for place, index in enumerate(asked) if index in done}
        for place, response in self._generator.generate([conversations[index] for index in asked], already):
            yield asked[place], _reply(texts[asked[place]], response)

    def close(self) -> None:
        if self._generator is not None:
            self._generator.close()
        self._generator = None


def _reply(text: Text, response: Response) -> Reply:
    if response.error is not None:
        return Reply(None, DECLINED)
    translation = read(response.text, code_of(*text))
    if translation is not None:
        return Reply(translation)
    return Reply(None, fault_of_reply(response.text) if response.finished else CUT)
