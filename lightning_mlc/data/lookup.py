"""Micro-batches of a table, as a data set that a ``DataLoader`` reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.utils.data
from datasets import Dataset

from lightning_mlc.data.batches import Batch
from lightning_mlc.data.mismatches import Mismatches
from lightning_mlc.data.sampling import MicroBatch

Collate = Callable[..., Batch]
"""A method of :class:`~lightning_mlc.data.collation.Collator`."""


class MicroBatches(torch.utils.data.Dataset[Batch]):
    """Looks the examples of a micro-batch up and collates them.

    Args:
        table: The tokenised examples.
        rows: Rows of ``table`` that the split has. A micro-batch has indices into them.
        collate: Makes the batch.
        mismatches: A response to another prompt for each row of ``table``; None if none is needed.
    """

    def __init__(self, table: Dataset, rows: Sequence[int], collate: Collate, mismatches: Mismatches | None) -> None:
        self._table = table
        self._rows = rows
        self._collate = collate
        self._mismatches = mismatches

    def __getitem__(self, micro_batch: MicroBatch) -> Batch:
        keys = [self._rows[index] for index in micro_batch.indices]
        examples: list[Any] = [self._table[key] for key in keys]
        mismatched = [] if self._mismatches is None else [self._response(*self._mismatches.of(key)) for key in keys]
        return self._collate(examples, keys, micro_batch.normalizers, mismatched)

    def _response(self, row: int, column: str) -> list[int]:
        response: list[int] = self._table[row][column]
        return response
