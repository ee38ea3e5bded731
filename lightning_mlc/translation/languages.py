"""The languages of a translation: which ones are asked for, and their names in an instruction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import langcodes

from lightning_mlc.data.languages import canonical_language, canonical_languages
from lightning_mlc.errors import UserError

UNCLEAR = {
    "ku": "ckb (Sorani, Arabic script) or kmr (Kurmanji, Latin script)",
    "zh": "zh-Hans (simplified) or zh-Hant (traditional)",
    "sr": "sr-Cyrl or sr-Latn",
}
"""Codes of languages that are written in two scripts, and the codes that say which."""
_ALIASES = {"ku-Latn": "kmr", "ku-Arab": "ckb", "cmn-Hans": "zh-Hans", "cmn-Hant": "zh-Hant", "no-Latn": "nb"}

NAMES = {
    "af": "Afrikaans",
    "am": "Amharic",
    "ar": "Arabic",
    "as": "Assamese",
    "az": "Azerbaijani",
    "be": "Belarusian",
    "bg": "Bulgarian",
    "bn": "Bengali",
    "bs": "Bosnian",
    "ca": "Catalan",
    "ceb": "Cebuano",
    "ckb": "Central Kurdish (Sorani, in Arabic script)",
    "cs": "Czech",
    "cy": "Welsh",
    "da": "Danish",
    "de": "German",
    "el": "Greek",
    "en": "English",
    "es": "Spanish",
    "et": "Estonian",
    "eu": "Basque",
    "fa": "Persian",
    "fi": "Finnish",
    "fil": "Filipino",
    "fr": "French",
    "ga": "Irish",
    "gl": "Galician",
    "gu": "Gujarati",
    "ha": "Hausa",
    "he": "Hebrew",
    "hi": "Hindi",
    "hr": "Croatian",
    "hu": "Hungarian",
    "hy": "Armenian",
    "id": "Indonesian",
    "ig": "Igbo",
    "is": "Icelandic",
    "it": "Italian",
    "ja": "Japanese",
    "jv": "Javanese",
    "ka": "Georgian",
    "kk": "Kazakh",
    "km": "Khmer",
    "kmr": "Northern Kurdish (Kurmanji, in Latin script)",
    "kn": "Kannada",
    "ko": "Korean",
    "ku": "Kurdish",
    "ky": "Kyrgyz",
    "lo": "Lao",
    "lt": "Lithuanian",
    "lv": "Latvian",
    "mg": "Malagasy",
    "mk": "Macedonian",
    "ml": "Malayalam",
    "mn": "Mongolian",
    "mr": "Marathi",
    "ms": "Malay",
    "my": "Burmese",
    "nb": "Norwegian (Bokmål)",
    "ne": "Nepali",
    "nl": "Dutch",
    "no": "Norwegian",
    "om": "Oromo",
    "or": "Odia",
    "pa": "Punjabi",
    "pl": "Polish",
    "ps": "Pashto",
    "pt": "Portuguese",
    "ro": "Romanian",
    "ru": "Russian",
    "sd": "Sindhi",
    "si": "Sinhala",
    "sk": "Slovak",
    "sl": "Slovenian",
    "sn": "Shona",
    "so": "Somali",
    "sq": "Albanian",
    "sr": "Serbian",
    "sr-Cyrl": "Serbian in Cyrillic script",
    "sr-Latn": "Serbian in Latin script",
    "sv": "Swedish",
    "sw": "Swahili",
    "ta": "Tamil",
    "te": "Telugu",
    "tg": "Tajik",
    "th": "Thai",
    "tk": "Turkmen",
    "tr": "Turkish",
    "uk": "Ukrainian",
    "ur": "Urdu",
    "uz": "Uzbek",
    "vi": "Vietnamese",
    "xh": "Xhosa",
    "yo": "Yoruba",
    "yue": "Cantonese",
    "zh": "Chinese",
    "zh-Hans": "Simplified Chinese",
    "zh-Hant": "Traditional Chinese",
    "zu": "Zulu",
}
"""English names, by BCP-47 code. langcodes has names only with a second package of its data."""


@dataclass(frozen=True)
class Language:
    """A language of texts.

    Args:
        code: BCP-47 code, in its canonical form.
        base: Its language alone, or with a script that is not the usual one of the language (``sr-Latn``); the keys
            of tables.
        name: Name for instructions.
        script: ISO 15924 code of its script; empty if nobody knows.
        is_usual_script: Whether that is the script that the language alone stands for.
    """

    code: str
    base: str
    name: str
    script: str
    is_usual_script: bool


@lru_cache(maxsize=1024)
def language_of(code: str) -> Language:
    """What ``code``, a canonical BCP-47 code, stands for. A code without a name is named by itself."""
    tag = langcodes.Language.get(code)
    language = tag.language or code
    script = tag.maximize().script or ""
    with_script = f"{language}-{script}"
    base = _ALIASES.get(with_script if tag.script else code, language)
    name = NAMES.get(with_script) or NAMES.get(base) or f"the language with the BCP-47 code {code}"
    base = base.partition("-")[0]
    is_usual = script == (langcodes.Language.get(base).maximize().script or "")
    if not is_usual and with_script not in NAMES:
        name += f" in the script {script}"
    if tag.territory is not None and base in NAMES:
        name += f" (as in {tag.territory})"
    return Language(code, base, name, script, is_usual)


def targets(asked: Sequence[str], source: str, option: str = "languages") -> tuple[Language, ...]:
    """The languages to translate into.

    Args:
        asked: Codes as the user wrote them.
        source: Canonical code of the source language.
        option: The option that names them, for errors.

    Raises:
        UserError: One is no language, is named twice, is the source language, or does not say which script.
    """
    if not asked:
        raise UserError(option, "is not set; give the codes of one or several languages, such as sw ur zh-Hans")
    found = []
    for code in canonical_languages(asked, option):
        if code == source:
            raise UserError(option, f"'{code}' is the source language; leave it out, or give another --source_language")
        tag = langcodes.Language.get(code)
        language = "zh" if tag.language == "cmn" else tag.language
        says = tag.script is not None or (language == "zh" and tag.territory is not None)
        if language in UNCLEAR and not says:
            raise UserError(option, f"'{code}' does not say which script; write {UNCLEAR[language]}")
        found.append(language_of(code))
    return tuple(found)


def redone(asked: Sequence[str], among: Sequence[Language]) -> frozenset[str]:
    """The codes of ``--redo``.

    Raises:
        UserError: One is not one of the languages of the translation.
    """
    codes = {language.code for language in among}
    found = frozenset(canonical_language(code, "redo") for code in asked)
    if others := sorted(found - codes):
        raise UserError("redo", f"'{others[0]}' is not one of --languages ({', '.join(sorted(codes))})")
    return found
