"""BCP-47 language codes."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import langcodes

from lightning_mlc.errors import UserError, shortened


def is_language(code: str) -> bool:
    """Whether ``code`` is a BCP-47 code of a language that exists."""
    return _canonical(code) is not None


@lru_cache(maxsize=4096)  # called for every text of every row
def _canonical(code: str) -> str | None:
    return langcodes.standardize_tag(code) if langcodes.tag_is_valid(code) else None


def canonical_language(code: str | bool, where: str) -> str:
    """Return the canonical form of a language code: ``en`` for ``EN``, ``he`` for ``iw``, ``zh-Hant`` for ``zh-hant``.

    Args:
        code: A BCP-47 code. A bool comes from YAML, which reads ``no`` as false.
        where: Place of the code, for errors.

    Raises:
        UserError: No such language exists.
    """
    if isinstance(code, bool):
        raise UserError(
            where, f"{code} is not a language code; YAML reads no, yes, on and off as true or false: put them in quotes"
        )
    language = _canonical(code) if isinstance(code, str) else None
    if language is None:
        raise UserError(where, f"'{shortened(str(code))}' is not a language code (BCP-47, such as en, sw or zh-Hant)")
    return language


def canonical_languages(codes: Iterable[str], where: str) -> tuple[str, ...]:
    """Return the canonical forms of language codes, in the same order.

    Args:
        codes: BCP-47 codes.
        where: Place of the codes, for errors.

    Raises:
        UserError: One is not a language code, or two are the same language.
    """
    seen: dict[str, str] = {}
    for code in codes:
        language = canonical_language(code, where)
        if language in seen:
            raise UserError(where, f"language '{language}' is given twice ('{seen[language]}' and '{code}')")
        seen[language] = code
    return tuple(seen)
