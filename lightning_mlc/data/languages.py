"""BCP-47 language codes."""

from __future__ import annotations

from collections.abc import Iterable

import langcodes

from lightning_mlc.errors import UserError


def is_language(code: str) -> bool:
    """Whether ``code`` is a BCP-47 code of a language that exists."""
    return bool(langcodes.tag_is_valid(code))


def canonical_language(code: str, where: str) -> str:
    """The canonical form of a BCP-47 ``code``: ``EN`` is ``en``, ``iw`` is ``he``, ``zh-hant`` is ``zh-Hant``.

    Raises:
        UserError: There is no such language. The message starts with ``where``.
    """
    if not isinstance(code, str) or not is_language(code):
        raise UserError(where, f"'{code}' is not a language code (BCP-47, such as en, sw or zh-Hant)")
    return langcodes.standardize_tag(code)


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
