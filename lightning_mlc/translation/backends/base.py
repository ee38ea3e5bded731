"""The interface of everything that translates."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Protocol

from lightning_mlc.translation.texts import Reply, Text


class Backend(Protocol):
    """A model that translates."""

    name: str
    """``openai`` or ``transformers``."""

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that translations depend on, in addition to the text: plain JSON values."""

    def translate(self, texts: Sequence[Text], attempt: int, done: Collection[int]) -> Iterator[tuple[int, Reply]]:
        """Translate the ``texts`` whose index is not in ``done``, and yield each as it comes.

        Args:
            texts: All texts, those that are done too: batches must not depend on where a run was stopped.
            attempt: 1, or 2 for texts whose first attempt failed.
            done: Indices of texts that need no translation any more.

        Raises:
            UserError: The model cannot be loaded or asked.
        """

    def close(self) -> None:
        """Release the model or the connections."""
