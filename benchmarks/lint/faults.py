"""Faults that are planted into good translations, one function for each kind."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable, Mapping
from typing import NamedTuple

from lightning_mlc.lint.texts import Text

Texts = Mapping[str, str]
"""The prompts of a row by language."""


class Place(NamedTuple):
    """Where a fault goes."""

    texts: Texts
    """The row's good prompts."""
    before: Texts
    """Those of the row before it."""
    source: str
    """Code of the source language."""
    language: str
    """Code of the text that the fault replaces."""
    random: random.Random

    @property
    def text(self) -> str:
        """The good text."""
        return self.texts[self.language]


Plant = Callable[[Place], str | None]
"""Returns the text with a fault. None: this text cannot have it."""

REFUSALS = {
    "en": "I'm sorry, but I can't help with that request.",
    "zh": "对不起，我不能协助处理这个请求。",
    "ru": "К сожалению, я не могу помочь с этим запросом.",
    "ja": "申し訳ありませんが、そのご依頼にはお手伝いできません。",
    "ar": "أنا آسف، لا أستطيع المساعدة في هذا الطلب.",
    "bn": "দুঃখিত, আমি এই অনুরোধে সাহায্য করতে পারব না।",
    "sw": "Samahani, siwezi kukusaidia na ombi hili.",
    "ur": "معذرت، میں اس درخواست میں مدد نہیں کر سکتا۔",
    "ps": "بخښنه غواړم، زه په دې غوښتنه کې مرسته نشم کولی.",
    "ku": "Bibore, ez nikarim bi vê daxwazê re alîkariyê bikim.",
}
_ANSWERS = ("Sure! Here are some ideas that may help you.", "As an AI language model, I would suggest the following.")


def _other(place: Place, same_script: bool) -> str | None:
    """The text of another language of the row, which is of the same script or not."""
    script = Text(place.text, place.language).script
    others = [
        text
        for code, text in place.texts.items()
        if code not in (place.language, place.source) and (Text(text, code).script == script) == same_script
    ]
    return place.random.choice(others) if others else None


def language(place: Place) -> str | None:
    """The row's text in another language, of the same script if there is one."""
    return _other(place, same_script=True) or _other(place, same_script=False)


def script(place: Place) -> str | None:
    """The row's text in a language of another script; not where the column's code allows several scripts."""
    return None if place.language in ("ku", "ja", "zh") else _other(place, same_script=False)


def mixed_scripts(place: Place) -> str | None:
    """Text of the other script in the Kurdish column, from another column."""
    if place.language != "ku":
        return None
    return place.texts.get("ps" if place.text[0].isascii() else "sw")


def copy(place: Place) -> str:
    """The source, as it is or with a word less."""
    source = place.texts[place.source]
    words = source.split()
    if place.random.random() < 0.5 or len(words) < 8:
        return source
    del words[place.random.randrange(len(words))]
    return " ".join(words)


def same_text(place: Place) -> str | None:
    """The text of another language."""
    return language(place)


def empty(place: Place) -> str:
    """Nothing, a space, or a mark."""
    return place.random.choice(["", " ", "?", "。"])


def characters(place: Place) -> str:
    """A replacement character, a control character or an entity somewhere."""
    at = place.random.randrange(len(place.text))
    return place.text[:at] + place.random.choice(["\ufffd", "\x00", "\x9d", "&quot;", "&#39;"]) + place.text[at:]


def mojibake(place: Place) -> str | None:
    """UTF-8 read as Latin-1 or Windows-1252."""
    if place.text.isascii():
        return None
    encoding = place.random.choice(["latin-1", "cp1252"])
    try:
        return place.text.encode().decode(encoding)
    except UnicodeDecodeError:  # Windows-1252 does not have every byte
        return place.text.encode().decode("latin-1")


def answer(place: Place) -> str:
    """A refusal in the column's language or in English, or the beginning of an answer."""
    refusals = [REFUSALS[code] for code in (place.language, "en") if code in REFUSALS]
    return place.random.choice([*refusals, refusals[0], *_ANSWERS])


def length(place: Place) -> str:
    """A fifth of the text, or the text five times."""
    short = place.text[: max(1, len(place.text) // 5)]
    return place.random.choice([short, " ".join([place.text] * 5)])


def digits(place: Place) -> str | None:
    """One digit changed, or a number added where there is none."""
    where = [index for index, character in enumerate(place.text) if character.isdecimal()]
    if not where:
        return f"{place.text} 137"
    at = place.random.choice(where)
    changed = (int(place.text[at]) + place.random.randint(1, 9)) % 10
    return f"{place.text[:at]}{changed}{place.text[at + 1 :]}"


def question(place: Place) -> str | None:
    """A full stop for the question mark."""
    marks = [mark for mark in "?？؟" if mark in place.text]
    if not place.texts[place.source].endswith("?") or not marks:
        return None
    return place.text.replace(marks[0], "。" if marks[0] == "？" else ".")


def cut(place: Place) -> str | None:
    """The last third is missing."""
    return place.text[: len(place.text) * 2 // 3].rstrip(" .?!。？؟।۔") if len(place.text) > 10 else None


def repetition(place: Place) -> str:
    """The last words, or characters without spaces, ten times."""
    words = place.text.split()
    loop, between = (words[-4:], " ") if len(words) > 4 else (list(place.text[-5:-1]), "")
    return place.text + between + between.join(loop * 10)


def untranslated(place: Place) -> str | None:
    """The source's last third, five words at least, follows."""
    source = place.texts[place.source].split()
    if len(source) < 12:
        return None
    return place.text + " " + " ".join(source[-max(5, len(source) // 3) :])


def same_translation(place: Place) -> str | None:
    """The text of the row before."""
    return place.before.get(place.language)


def normal_form(place: Place) -> str:
    """Decomposed, or with an invisible mark."""
    decomposed = unicodedata.normalize("NFD", place.text)
    marks = ["\u200b", "\u200f", "\ufeff"]
    return place.random.choice([decomposed] if decomposed != place.text else [mark + place.text for mark in marks])


def quotes(place: Place) -> str:
    """In quotes, or after a preface."""
    return place.random.choice([f'"{place.text}"', f"“{place.text}”", f"Translation: {place.text}"])


FAULTS: dict[str, Plant] = {
    plant.__name__: plant
    for plant in (
        language,
        script,
        mixed_scripts,
        copy,
        same_text,
        empty,
        characters,
        mojibake,
        answer,
        length,
        digits,
        question,
        cut,
        repetition,
        untranslated,
        same_translation,
        normal_form,
        quotes,
    )
}
"""Faults of texts by the name of the check that should find them."""
LINK = " https://example.org/a"
"""What is added to a source, so that its translations have lost it."""
