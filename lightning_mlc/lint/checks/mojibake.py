"""Text that was decoded with the wrong encoding."""

from __future__ import annotations

from lightning_mlc.lint.check import TextCheck
from lightning_mlc.lint.rows import Pair


class Mojibake(TextCheck):
    """UTF-8 read as Latin-1, Windows-1252, Windows-1251 or another encoding of one byte, as ftfy recognises it.

    Two conditions must hold: ftfy finds sequences that occur in no language (``badness``), and another decoding mends
    them. So a text is reported only if it was surely another one. No false alarm on the sample.
    """

    name = "mojibake"
    severity = "error"
    title = "decoded with the wrong encoding"
    packages = ("ftfy",)
    of_source = True

    def fault(self, pair: Pair) -> str | None:
        from ftfy import fix_encoding
        from ftfy.badness import is_bad

        text = pair.text.content
        if text.isascii() or not is_bad(text):
            return None
        return "a wrong encoding" if fix_encoding(text) != text else None
