"""Check that ids are unique, for any number of rows. About thirty bytes are kept per id, not the id itself."""

from __future__ import annotations

import numpy as np

from lightning_mlc.data.hashing import digest

_FEWEST = 1 << 14


class UniqueIds:
    """The ids seen so far, as 64 bits of a hash, each with the number of its row.

    With ten million rows, the chance that two different ids are taken for the same is 1 in 370,000.
    """

    def __init__(self) -> None:
        self._recent: dict[int, int] = {}
        self._hashes = np.empty(0, np.int64)
        self._numbers = np.empty(0, np.int64)

    def row_with(self, id: str, number: int) -> int | None:
        """Look up an id, and remember it if it is new.

        Args:
            id: The id.
            number: Number of its row.

        Returns:
            Number of the earlier row with this id. None: the id is new.
        """
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
        """Move the recent ids from the dictionary to the sorted arrays, which take a tenth of the memory."""
        count = len(self._recent)
        hashes = np.concatenate([self._hashes, np.fromiter(self._recent.keys(), np.int64, count)])
        numbers = np.concatenate([self._numbers, np.fromiter(self._recent.values(), np.int64, count)])
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._numbers, self._recent = hashes[order], numbers[order], {}
