"""A text in a script that its language is not written in."""

from __future__ import annotations

from lightning_mlc.lint.check import TextCheck
from lightning_mlc.lint.rows import Pair
from lightning_mlc.lint.scripts import is_written_in, script_name, scripts_of

LETTERS = 4
"""Fewest letters of a text: a name or an abbreviation may be in any script."""


class Script(TextCheck):
    """Most letters are of a script that the code of the column does not allow.

    A code that names a script, a variety or a region allows one: ``sr-Latn``, ``ckb``, ``zh-TW``. A bare code allows
    all scripts in use: ``sr``, ``ku``, ``zh``. Code, links and placeholders do not count.

    Threshold: half of the letters. The next check, ``untranslated``, warns below that.
    """

    name = "script"
    severity = "error"
    title = "a script that its language is not written in"
    of_source = True

    def fault(self, pair: Pair) -> str | None:
        text = pair.text
        if text.letters < LETTERS or text.script is None:
            return None
        expected = scripts_of(text.language)
        if not expected or any(is_written_in(text.script, script) for script in expected):
            return None
        return f"{script_name(text.script)} instead of {script_name(expected[0])}"
