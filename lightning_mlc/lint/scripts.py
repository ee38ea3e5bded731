"""The scripts of texts and languages, as ISO 15924 codes. Data: Unicode (fontTools) and CLDR (langcodes)."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

import langcodes
from fontTools import unicodedata

_NONE = frozenset({"Zyyy", "Zinh", "Zzzz"})
_KANA = 0.1
"""Text with at least this share of kana among its Han characters and kana is Japanese. A few kana occur in Chinese."""
_CLEARLY = 3
"""Chinese text is simplified if it has at least this many times as many simplified characters as traditional ones."""

OTHER_SCRIPTS: dict[str, tuple[str, ...]] = {
    "az": ("Cyrl", "Arab"),
    "bs": ("Cyrl",),
    "ha": ("Arab",),
    "kk": ("Latn", "Arab"),
    "ks": ("Deva",),
    "ku": ("Arab", "Cyrl"),
    "ky": ("Arab", "Latn"),
    "mn": ("Mong",),
    "ms": ("Arab",),
    "pa": ("Arab",),
    "sd": ("Deva",),
    "sh": ("Cyrl",),
    "sr": ("Latn",),
    "tg": ("Arab",),
    "tk": ("Cyrl", "Arab"),
    "tt": ("Latn",),
    "ug": ("Cyrl", "Latn"),
    "uz": ("Cyrl", "Arab"),
    "zh": ("Hant",),
}
"""Scripts in use for a language in addition to the likely one of CLDR. A code that names a script, a variety or a
region (``sr-Latn``, ``ckb``, ``zh-TW``) allows no other."""


class _Scripts(dict[str, str]):
    """Script of each letter or vowel sign, looked up once; empty for all other characters."""

    def __missing__(self, character: str) -> str:
        is_letter = unicodedata.category(character)[0] in "LM"
        script = unicodedata.script(character) if is_letter else ""
        found = self[character] = "" if script in _NONE else script
        return found


_SCRIPTS = _Scripts()


_WORTH = {"Hani": 3, "Hira": 2, "Kana": 2, "Hang": 2}
"""Number of letters that a character counts as. Otherwise one English name would outweigh a Chinese sentence. The
sample and the test set of MLC's authors have 0.30 characters of Chinese and 0.46 of Japanese for one of English."""


def count_scripts(text: str) -> Counter[str]:
    """Count the letters of ``text`` by script, an ISO 15924 code (``Latn``, ``Arab``, ``Hani``).

    Vowel signs count as letters. A Chinese character counts as three letters, kana and Hangul as two.
    """
    counts: Counter[str] = Counter()
    for character, count in Counter(text).items():
        if script := _SCRIPTS[character]:
            counts[script] += count * _WORTH.get(script, 1)
    return counts


def main_script(counts: Counter[str], text: str) -> str | None:
    """Name the script that most letters are in.

    Args:
        counts: Result of :func:`count_scripts`.
        text: The text.

    Returns:
        An ISO 15924 code; ``Jpan`` for Japanese, ``Hans`` and ``Hant`` for Chinese that is clearly simplified or
        traditional, ``Hani`` where that is not clear. None: the text has no letters.
    """
    kana = counts["Hira"] + counts["Kana"]
    groups = Counter({script: count for script, count in counts.items() if script not in ("Hira", "Kana", "Hani")})
    groups["Hani"] = kana + counts["Hani"]
    script, most = groups.most_common(1)[0]
    if not most:
        return None
    if script != "Hani":
        return script
    return "Jpan" if kana >= _KANA * most else _kind_of_han(text)


def _kind_of_han(text: str) -> str:
    simplified = traditional = 0
    for character in text:
        kind = _han(character)
        simplified += kind == "Hans"
        traditional += kind == "Hant"
    if simplified >= max(1, _CLEARLY * traditional):
        return "Hans"
    return "Hant" if traditional >= max(1, _CLEARLY * simplified) else "Hani"


@lru_cache(maxsize=1 << 14)
def _han(character: str) -> str:
    """``Hans`` or ``Hant`` for a character of only one of the two national standards."""
    standards = [_is_in(character, encoding) for encoding in ("gb2312", "big5")]
    return "" if standards[0] == standards[1] else "Hans" if standards[0] else "Hant"


def _is_in(character: str, encoding: str) -> bool:
    try:
        character.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


@lru_cache(maxsize=4096)
def scripts_of(language: str) -> tuple[str, ...]:
    """The scripts that a language may be written in, the likely one first; empty if CLDR does not know it.

    Args:
        language: A BCP-47 code.
    """
    tag = langcodes.Language.get(language)
    likely = tag.maximize().script
    if likely is None:
        return ()
    is_bare = tag.script is None and tag.territory is None
    return (likely, *(OTHER_SCRIPTS.get(tag.language or "", ()) if is_bare else ()))


def is_written_in(found: str, script: str) -> bool:
    """Whether text whose main script is ``found`` may count as written in ``script``."""
    if script == "Jpan":
        return found in ("Jpan", "Hani", "Hans", "Hant")
    if script == "Kore":
        return found in ("Hang", "Hani", "Hant")
    return found == script or (found == "Hani" and script in ("Hans", "Hant"))


def share_of_others(counts: Counter[str], language: str) -> float:
    """Share of the letters ``counts``, at least one, that are of no script that ``language`` may be written in."""
    parts: set[str] = set()
    for script in scripts_of(language):
        parts |= _PARTS.get(script, {script})
    return sum(count for script, count in counts.items() if script not in parts) / counts.total()


_PARTS = {
    "Jpan": {"Hani", "Hira", "Kana"},
    "Kore": {"Hang", "Hani"},
    "Hans": {"Hani", "Bopo"},
    "Hant": {"Hani", "Bopo"},
}
"""Scripts of Unicode's characters in scripts of languages."""


def script_name(script: str) -> str:
    """Name of a script for reports, without the library's optional names of languages."""
    return _NAMES.get(script, script)


_NAMES = {
    "Arab": "Arabic script",
    "Beng": "Bengali script",
    "Cyrl": "Cyrillic script",
    "Deva": "Devanagari",
    "Hang": "Hangul",
    "Hani": "Chinese characters",
    "Hans": "simplified Chinese characters",
    "Hant": "traditional Chinese characters",
    "Hebr": "Hebrew script",
    "Jpan": "Japanese script",
    "Kore": "Korean script",
    "Latn": "Latin script",
    "Thai": "Thai script",
}
