"""How translation models are told a language: the codes of NLLB-200, M2M-100 and MADLAD-400.

A model's tokenizer has a token for each of its languages. So the tokens tell which of the three it is, and a code that
is not there is a language that the model does not know.

Sources: the list of languages of FLORES-200 (https://github.com/facebookresearch/flores), and the cards of
https://huggingface.co/facebook/m2m100_418M and https://huggingface.co/google/madlad400-3b-mt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import langcodes

from lightning_mlc.errors import UserError
from lightning_mlc.translation.languages import Language

Family = Literal["NLLB", "M2M-100", "MADLAD-400"]

_FLORES = {
    "ar": "arb",
    "az": "azj",
    "et": "est",
    "fa": "pes",
    "fil": "tgl",
    "lv": "lvs",
    "mg": "plt",
    "mn": "khk",
    "ms": "zsm",
    "ne": "npi",
    "no": "nob",
    "om": "gaz",
    "or": "ory",
    "ps": "pbt",
    "sq": "als",
    "sw": "swh",
    "uz": "uzn",
    "yi": "ydd",
}
"""ISO 639-3 codes of FLORES-200 for languages whose own ISO 639-3 code covers several."""
_M2M = {"fil": "tl", "nb": "no"}
_MADLAD = {"kmr": "ku", "nb": "no"}


def _nllb(language: Language) -> Iterator[str]:
    code = _FLORES.get(language.base) or langcodes.Language.get(language.base).to_alpha3()
    yield f"{code}_{'Hang' if language.script == 'Kore' else language.script}"


def _m2m(language: Language) -> Iterator[str]:
    if language.is_usual_script:
        yield f"__{_M2M.get(language.base, language.base)}__"


def _madlad(language: Language) -> Iterator[str]:
    yield f"<2{language.base}_{language.script}>"
    if language.is_usual_script:
        yield f"<2{language.base}>"
        yield f"<2{_MADLAD.get(language.base, language.base)}>"


_TOKENS: dict[Family, Callable[[Language], Iterator[str]]] = {"NLLB": _nllb, "M2M-100": _m2m, "MADLAD-400": _madlad}
"""The tokens that may stand for a language, the best one first."""
_SIGNS: dict[str, Family] = {"eng_Latn": "NLLB", "__en__": "M2M-100", "<2en>": "MADLAD-400"}
"""A token that only tokenizers of that family have."""


@dataclass(frozen=True)
class LanguageCodes:
    """The tokens of languages in the vocabulary of one model.

    Args:
        family: Whose tokens they are.
        has: Whether the model has a token.
    """

    family: Family
    has: Callable[[str], bool]

    @classmethod
    def of(cls, has: Callable[[str], bool], model: str) -> LanguageCodes:
        """Recognise the model by its tokens.

        Args:
            has: Whether the model has a token.
            model: Its name, for the error.

        Raises:
            UserError: It has no tokens of languages that are known here.
        """
        for sign, family in _SIGNS.items():
            if has(sign):
                return cls(family, has)
        raise UserError(
            "model",
            f"{model} does not say how it is told a language; give NLLB-200, M2M-100 or MADLAD-400, or a chat model",
        )

    def token(self, language: Language, option: str) -> str:
        """The token of ``language``.

        Raises:
            UserError: The model does not know the language.
        """
        found = next((token for token in _TOKENS[self.family](language) if self.has(token)), None)
        if found is None:
            raise UserError(option, f"this {self.family} model does not know '{language.code}'; give another model")
        return found
