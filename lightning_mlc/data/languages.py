"""BCP-47 language codes."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import langcodes

from lightning_mlc.errors import UserError, shortened


def is_language(code: str) -> bool:
    """Whether ``code`` is a BCP-47 code of a language that exists."""
    return _canonical(code) is not None


@lru_cache(maxsize=4096)  # asked for every text of every row
def _canonical(code: str) -> str | None:
    return langcodes.standardize_tag(code) if langcodes.tag_is_valid(code) else None


def canonical_language(code: str | bool, where: str) -> str:
    """The canonical form of a BCP-47 ``code``: ``EN`` is ``en``, ``iw`` is ``he``, ``zh-hant`` is ``zh-Hant``.

    Raises:
        UserError: There is no such language. The message starts with ``where``.
    """
    if isinstance(code, bool):
        raise UserError(where, f"{code} is not a language code; YAML reads no, yes, on and off so, put them in quotes")
    language = _canonical(code) if isinstance(code, str) else None
    if language is None:
        raise UserError(where, f"'{shortened(str(code))}' is not a language code (BCP-47, such as en, sw or zh-Hant)")
    return language


def canonical_languages(codes: Iterable[str], where: str) -> tuple[str, ...]:
    """Canonical forms of ``codes``, in their order.

    Raises:
        UserError: One is no language code, or two are the same language.
    """
    seen: dict[str, str] = {}
    for code in codes:
        language = canonical_language(code, where)
        if language in seen:
            raise UserError(where, f"language '{language}' is given twice ('{seen[language]}' and '{code}')")
        seen[language] = code
    return tuple(seen)
