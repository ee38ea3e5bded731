"""Check one translation."""

from __future__ import annotations

from functools import cache

from lightning_mlc.data.languages import canonical_language
from lightning_mlc.lint.check import LintSettings, TextCheck
from lightning_mlc.lint.checks import all_checks
from lightning_mlc.lint.findings import Finding
from lightning_mlc.lint.rows import Pair
from lightning_mlc.lint.texts import Text


def check_translation(source: str, translation: str, source_language: str, language: str) -> list[Finding]:
    """Find errors in one translation: all checks of a text that find errors and need no other row.

    Args:
        source: The text that was translated.
        translation: Its translation.
        source_language: BCP-47 code of the source.
        language: BCP-47 code that the translation should be in.

    Returns:
        What is wrong; empty if nothing is. No finding contains text of either.

    Raises:
        UserError: A code is not of a language, or a package of the extra ``lint`` is not installed.
    """
    text = Text(translation, canonical_language(language, "language"))
    pair = Pair(Text(source, canonical_language(source_language, "source_language")), text)
    return [check.found(pair, note) for check in _checks() if (note := check.fault(pair)) is not None]


@cache
def _checks() -> tuple[TextCheck, ...]:
    found = []
    for kind in all_checks().values():
        if issubclass(kind, TextCheck) and kind.severity == "error" and kind.option is None:
            kind.require_packages()
            found.append(kind.made(LintSettings()))
    return tuple(found)
