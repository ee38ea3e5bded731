"""Reference scores that are looked up by the keys of their examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_mlc.data.batches import Batch
from lightning_mlc.models.forward import Grid


class ReferenceScores(NamedTuple):
    """Scores of N examples in L languages for K kinds of responses.

    The languages are the first L of the data's: all of them, or only the source language.
    """

    keys: Tensor
    """(N,) int64: keys of the examples (``Batch.keys``), ascending, without repeats."""
    logps: Tensor
    """(N, L, K): log-probabilities, as in :class:`~lightning_mlc.models.forward.Grid`."""
    tokens: Tensor
    """(N, L, K): numbers of tokens; 0 where an example has no such response."""

    @classmethod
    def of(cls, batch: Batch, grid: Grid, languages: int | None = None) -> ReferenceScores:
        """Take the scores of a batch from its results.

        Args:
            batch: The batch.
            grid: Results of the reference model for ``batch``.
            languages: How many languages to keep. None: all.
        """
        order = batch.keys.argsort()
        return cls(batch.keys[order], grid.logps[order, :languages], grid.tokens[order, :languages])

    @classmethod
    def union(cls, parts: Sequence[ReferenceScores]) -> ReferenceScores:
        """Join ``parts``. If an example is in several parts, the first one counts."""
        parts = [part for part in parts if len(part.keys)]
        if not parts:
            none = torch.zeros(0, 1, 1)
            return cls(none[:, 0, 0].long(), none, none)
        keys, logps, tokens = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        _, first = np.unique(keys.cpu().numpy(), return_index=True)
        index = torch.as_tensor(first, device=keys.device)
        return cls(keys[index], logps[index], tokens[index])

    def missing(self, keys: Sequence[int]) -> list[int]:
        """Return those of ``keys`` that have no scores."""
        known = set(self.keys.tolist())
        return [key for key in keys if key not in known]

    def grid(self, batch: Batch) -> Grid:
        """Look up the scores of ``batch``, without waiting for the device.

        Unknown examples, and languages that were not scored, get NaN, so that using them cannot go unnoticed.
        """
        row = torch.searchsorted(self.keys, batch.keys).clamp(max=len(self.keys) - 1)
        known = (self.keys[row] == batch.keys)[:, None, None]
        scored, kinds = self.logps.shape[1:]
        logps = self.logps.new_full((len(batch), len(batch.languages), kinds), float("nan"))
        tokens = torch.zeros_like(logps)
        logps[:, :scored] = torch.where(known, self.logps[row], float("nan"))
        tokens[:, :scored] = torch.where(known, self.tokens[row], 0)
        return Grid(logps, tokens, None, (tokens > 0).any(2))

    def to(self, device: torch.device | str) -> ReferenceScores:
        """Return the same scores on ``device``."""
        return ReferenceScores(*(tensor.to(device) for tensor in self))
