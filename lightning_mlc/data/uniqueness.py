"""Whether ids are unique, for any number of rows: some thirty bytes are kept of each, and not the ids."""

from __future__ import annotations

import numpy as np

from lightning_mlc.data.hashing import digest

_FEWEST = 1 << 14


class UniqueIds:
    """Ids that have been seen, by 64 bits of a hash, each with the number of its row.

    Two different ids are taken for the same with a chance of 1 in 370,000 among ten million rows.
    """

    def __init__(self) -> None:
        self._recent: dict[int, int] = {}
        self._hashes = np.empty(0, np.int64)
        self._numbers = np.empty(0, np.int64)

    def row_with(self, id: str, number: int) -> int | None:
        """The number of the earlier row with this ``id``; None, and remember it as that of row ``number``."""
        hashed = digest(id)
        place = int(np.searchsorted(self._hashes, hashed))
        if place < len(self._hashes) and self._hashes[place] == hashed:
            return int(self._numbers[place])
        if hashed in self._recent:
            return self._recent[hashed]
        self._recent[hashed] = number
        if len(self._recent) >= max(_FEWEST, len(self._hashes) // 8):
            self._sort()
        return None

    def _sort(self) -> None:
        """Move those kept lately, in a dictionary, to the sorted arrays, which take a tenth of the room."""
        count = len(self._recent)
        hashes = np.concatenate([self._hashes, np.fromiter(self._recent.keys(), np.int64, count)])
        numbers = np.concatenate([self._numbers, np.fromiter(self._recent.values(), np.int64, count)])
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._numbers, self._recent = hashes[order], numbers[order], {}
