"""Translate texts back into the language of their sources, for ``lightning-mlc lint --translator``."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_mlc.lint.texts import Text as LintText
from lightning_mlc.translation.backends.roster import make_backend
from lightning_mlc.translation.destination import destination
from lightning_mlc.translation.languages import language_of
from lightning_mlc.translation.settings import TranslationSettings
from lightning_mlc.translation.texts import Text


class BackTranslation:
    """A translator that keeps nothing: a stop loses what was translated.

    Args:
        model: The model, as ``translate --model`` takes it. How it is run is as ``translate`` does it by default.
        allow_remote: Hosts that texts may be sent to.
        device: ``auto`` for an accelerator if there is one, or a torch device.

    Raises:
        UserError: There is no such model, it cannot translate, or texts would be sent to a host that is not allowed.
    """

    def __init__(self, model: str, allow_remote: Sequence[str], device: str) -> None:
        # Where data comes from and goes to is of no concern here.
        settings = TranslationSettings("", [], "", model, device=device)
        self.destination = destination(model, "texts of the data", allow_remote)
        """Where texts go, for the user."""
        self._backend = make_backend(settings)

    def back(self, texts: Sequence[LintText], language: str) -> list[str | None]:
        """See :class:`~lightning_mlc.lint.check.BackTranslator`. What fails is tried once more in other words."""
        target = language_of(language)
        asked = [Text(_usable(text.content), language_of(text.language), target) for text in texts]
        found: list[str | None] = [None] * len(texts)
        for attempt in (1, 2):
            left = [place for place, text in enumerate(found) if text is None]
            for place, reply in self._backend.translate([asked[place] for place in left], attempt, ()):
                found[left[place]] = reply.translation
        return found

    def close(self) -> None:
        """Release the model or the connections."""
        self._backend.close()


def _usable(text: str) -> str:
    """``text`` without unpaired surrogates, which can neither be sent nor tokenised."""
    return text.encode(errors="replace").decode()
