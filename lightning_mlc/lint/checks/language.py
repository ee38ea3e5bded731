"""A text in another language than its column says."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from lightning_mlc.errors import UserError
from lightning_mlc.lint.check import TextCheck
from lightning_mlc.lint.families import family
from lightning_mlc.lint.rows import Pair

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier

DOUBT = 0.01
"""Probability of the column's own language at which a text is taken for another."""
LETTERS = 20
"""Fewest letters of a text; identification of shorter texts is often wrong."""
LONGEST = 400
"""Characters of a text that are looked at; time grows with them, and the answer no longer changes."""
_NO_LANGUAGE = "zxx"
_USUAL_CODES = {"sdh": "ckb"}
"""py3langid does not have `ckb`, and takes Sorani for Southern Kurdish."""


class Language(TextCheck):
    """The language that py3langid finds (139 languages) is not that of the column.

    Languages that it cannot tell apart are one family, and it is never said that a text is in the wrong one of a
    family: Kurdish is told apart by script, see :mod:`~lightning_mlc.lint.checks.mixed_scripts`. Columns in a language
    that it does not know are not checked.

    Threshold: the column's own family has at most 1 % of the probability. No false alarm in 4,082 texts of the sample
    and of real data in ten languages, and each of them was found in every other column. To ask how probable the
    language found is would be worse: a probability of 0.9 misses one in ten Russian texts, which share it with
    Bulgarian and Ukrainian.
    """

    name = "language"
    severity = "error"
    title = "another language than its column says"
    packages = ("py3langid",)
    of_source = True

    def fault(self, pair: Pair) -> str | None:
        text = pair.text
        if text.letters < LETTERS:
            return None
        own = family(text.language)
        if own not in _known_families():
            return None
        prose = text.prose[:LONGEST]
        found, _ = _identifier().classify(prose)
        if found == _NO_LANGUAGE or family(found) == own:
            return None
        doubt = sum(probability for language, probability in _identifier().rank(prose) if family(language) == own)
        return f"looks like {_USUAL_CODES.get(found, found)}" if doubt <= DOUBT else None


@cache
def _identifier() -> LanguageIdentifier:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    try:
        # One of its own, because `py3langid.set_languages` of another library would change the shared one.
        return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
    except OSError as error:
        raise UserError(
            None, f"cannot unpack the data of the checks ({error.strerror}); free some space in the temporary folder"
        ) from error


@cache
def _known_families() -> frozenset[str]:
    return frozenset(map(family, _identifier().labels))
