"""The codes of translation models."""

from __future__ import annotations

import pytest
from transformers.models.m2m_100.tokenization_m2m_100 import FAIRSEQ_LANGUAGE_CODES as M2M
from transformers.models.nllb.tokenization_nllb import FAIRSEQ_LANGUAGE_CODES as NLLB

from lightning_mlc.errors import UserError
from lightning_mlc.translation.backends.codes import LanguageCodes
from lightning_mlc.translation.languages import NAMES, language_of

M2M_TOKENS = [f"__{code}__" for code in M2M["m2m100"]]
MADLAD_TOKENS = [f"<2{code}>" for code in ("en", "sw", "zh", "zh_Hant", "sr", "ku", "ckb", "ps", "no", "fil")]


def token(vocabulary: list[str], code: str) -> str | None:
    codes = LanguageCodes.of(vocabulary.__contains__, "model")
    try:
        return codes.token(language_of(code), "languages")
    except UserError:
        return None


@pytest.mark.parametrize(
    ("code", "nllb", "m2m", "madlad"),
    [
        ("en", "eng_Latn", "__en__", "<2en>"),
        ("sw", "swh_Latn", "__sw__", "<2sw>"),
        ("zh-Hans", "zho_Hans", "__zh__", "<2zh>"),
        ("zh-Hant", "zho_Hant", None, "<2zh_Hant>"),
        ("sr-Cyrl", "srp_Cyrl", "__sr__", "<2sr>"),
        ("sr-Latn", None, None, None),
        ("ckb", "ckb_Arab", None, "<2ckb>"),
        ("kmr", "kmr_Latn", None, "<2ku>"),
        ("ps", "pbt_Arab", "__ps__", "<2ps>"),
        ("ar", "arb_Arab", "__ar__", None),
        ("ko", "kor_Hang", "__ko__", None),
        ("nb", "nob_Latn", "__no__", "<2no>"),
        ("fil", "tgl_Latn", "__tl__", "<2fil>"),
        ("en-GB", "eng_Latn", "__en__", "<2en>"),
        ("tlh", None, None, None),
    ],
)
def test_languages_have_the_tokens_of_each_family(code: str, nllb: str, m2m: str, madlad: str) -> None:
    assert [token(vocabulary, code) for vocabulary in (NLLB, M2M_TOKENS, MADLAD_TOKENS)] == [nllb, m2m, madlad]


def test_nllb_knows_every_language_with_a_name() -> None:
    # Written in Latin letters, and Kurdish without a script: nobody can ask for them.
    unknown = {code for code in NAMES if token(NLLB, code) is None}
    assert unknown == {"sr-Latn", "ku"}


def test_a_language_that_a_model_does_not_know_is_one_line() -> None:
    codes = LanguageCodes.of(NLLB.__contains__, "model")
    with pytest.raises(UserError, match=r"^redo: this NLLB model does not know 'sr-Latn'; give another model$"):
        codes.token(language_of("sr-Latn"), "redo")


def test_other_models_are_refused() -> None:
    with pytest.raises(UserError, match=r"model: t5-small does not say how it is told a language; give NLLB-200,"):
        LanguageCodes.of(["▁the", "translate"].__contains__, "t5-small")
