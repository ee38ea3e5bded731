"""Languages that an identifier of languages cannot be trusted to tell apart, or has under another code."""

from __future__ import annotations

from functools import lru_cache

import langcodes

_FAMILIES: tuple[frozenset[str], ...] = (
    frozenset({"ar", "ary", "arz", "apc", "acm", "ajp", "aeb", "ars", "arq"}),
    frozenset({"zh", "yue", "wuu", "lzh", "hak", "nan", "gan"}),
    # py3langid has `ku` for Kurmanji and no `ckb`: it takes Sorani for Southern Kurdish (`sdh`).
    frozenset({"ku", "ckb", "sdh"}),
    frozenset({"no", "nb", "nn"}),
    frozenset({"bs", "hr", "sr", "sh", "cnr"}),
    frozenset({"id", "ms"}),
    frozenset({"gn", "gug"}),
    frozenset({"he", "hbo"}),
    frozenset({"uz", "uzs"}),
    frozenset({"kok", "gom"}),
    frozenset({"ki", "kik"}),
    frozenset({"ff", "fuv"}),
    frozenset({"tl", "fil"}),
)


@lru_cache(maxsize=4096)
def family(language: str) -> str:
    """One code for all languages of a family; for a language without one, its own code without script and region."""
    own = langcodes.Language.get(langcodes.standardize_tag(language, macro=True)).language or language
    return next((min(group) for group in _FAMILIES if own in group), own)


def are_related(one: str, other: str) -> bool:
    """Whether two BCP-47 codes are of one family."""
    return family(one) == family(other)
