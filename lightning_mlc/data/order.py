"""The order in which training runs the examples."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lightning_mlc.data.windows import ByExamples, ByTokens, Cut, Division


@dataclass(frozen=True)
class TrainingOrder:
    """What the order of N examples follows from, apart from the division among processes.

    Args:
        rows: N rows of the table.
        batch_size: Number of examples of a micro-batch.
        budget: Number of tokens of a micro-batch, instead of ``batch_size``; None for none.
        costs: (N,) int64, number of tokens of each example. It depends on length limits, languages, objective and
            consistency terms. None without a budget.
        seed: Seed of the shuffle.
    """

    rows: Sequence[int]
    batch_size: int
    budget: int | None
    costs: np.ndarray | None
    seed: int

    def cut(self, division: Division) -> Cut:
        """Cuts each epoch into optimizer steps and micro-batches."""
        if self.budget is None or self.costs is None:
            return ByExamples(len(self.rows), self.batch_size, division, self.seed)
        return ByTokens(self.costs, self.budget, division, self.seed)

    def digest(self) -> str:
        """A digest of the rows and, under a budget, of their costs. The order follows from it, seed and division."""
        sha = hashlib.sha256(np.asarray(self.rows, np.int64).tobytes())
        if self.costs is not None:
            sha.update(np.asarray(self.costs, np.int64).tobytes())
        return sha.hexdigest()[:20]
