"""Numbers that stand for texts, to compare many texts without keeping them in memory."""

from __future__ import annotations

import hashlib


def digest(text: str) -> int:
    """Return 64 bits of a hash of ``text`` as a signed number, never 0. It is the same in every process."""
    found = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
    return found or 1
