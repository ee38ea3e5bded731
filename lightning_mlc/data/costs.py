"""What examples cost in tokens, and which languages cost most."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow.compute
from datasets import Dataset

EXPENSIVE = 3.0
"""From how many times the source's tokens a language is called expensive. Languages that a tokenizer covers stay
below: for the sample's nine, SmolLM2's, which was made for English, takes 1.3 to 3.0 times as many. From here on, one
translation costs more than both source prompts of its pair. Up to 15 times occur (arXiv 2305.15425)."""


@dataclass(frozen=True)
class TokenCounts:
    """Tokens of N examples in L languages, without padding."""

    prompts: np.ndarray
    """(N, L) int64, tokens of each prompt; 0 where the example has none in the language. The source comes first."""
    chosen: np.ndarray
    """(N,) int64, tokens of the chosen (or only) response."""
    rejected: np.ndarray
    """(N,) int64, tokens of the rejected response; 0 without one."""

    @classmethod
    def of(cls, table: Dataset, languages: int) -> TokenCounts:
        """Count the tokens of a tokenised table, whose prompts are in so many ``languages``."""

        def lengths(column: pyarrow.ChunkedArray) -> np.ndarray:
            counted: np.ndarray = pyarrow.compute.list_value_length(column).to_numpy().astype(np.int64)
            return counted

        # Counted in Arrow: as Python lists, the tokens of a large table would take minutes and gigabytes.
        columns = {name: table.data.column(name) for name in ("languages", "prompts", "chosen", "rejected")}
        example = np.repeat(np.arange(len(table)), lengths(columns["languages"]))
        language = pyarrow.compute.list_flatten(columns["languages"]).to_numpy()
        prompts = np.zeros((len(table), languages), dtype=np.int64)
        prompts[example, language] = lengths(pyarrow.compute.list_flatten(columns["prompts"]))
        return cls(prompts, lengths(columns["chosen"]), lengths(columns["rejected"]))

    def take(self, rows: list[int]) -> TokenCounts:
        """The counts of these examples."""
        return TokenCounts(self.prompts[rows], self.chosen[rows], self.rejected[rows])

    def in_step(self, rejected: bool, translations: bool) -> np.ndarray:
        """(N, L) int64, tokens that a training step runs of each example, by language.

        Those of the source are its responses, each with the prompt before it. Rows that share a prompt run
        fewer; what is trained on together must not depend on whether the model can do that.

        Args:
            rejected: Whether rejected responses are run.
            translations: Whether translations of the prompt are run.
        """
        counts = self.prompts.copy() if translations else np.zeros_like(self.prompts)
        counts[:, 0] = np.where(self.chosen > 0, self.prompts[:, 0] + self.chosen, 0)
        if rejected:
            counts[:, 0] += np.where(self.rejected > 0, self.prompts[:, 0] + self.rejected, 0)
        return counts

    def relative_to_source(self) -> np.ndarray:
        """(L,) tokens of the prompts in each language over those of the same prompts in the source language.

        NaN where no example has a prompt in the language.
        """
        there = self.prompts > 0
        sources = (self.prompts[:, :1] * there).sum(0)
        found: np.ndarray = np.divide(
            self.prompts.sum(0), sources, out=np.full(len(sources), np.nan), where=sources > 0
        )
        return found
