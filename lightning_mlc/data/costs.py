"""Number of tokens of examples, and the languages that take most of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.compute
from datasets import Dataset

from lightning_mlc.data.row_plan import RowPlan
from lightning_mlc.data.sampling import Sizes
from lightning_mlc.errors import UserError

EXPENSIVE = 3.0
"""A language is expensive if its prompts take at least this many times the tokens of the source prompts. Languages that
a tokenizer covers stay below: SmolLM2's tokenizer, made for English, takes 1.3 to 3.0 times as many for the nine
languages of the sample. Factors up to 15 occur (arXiv 2305.15425)."""


def highest_token(table: Dataset) -> int:
    """Highest id in the prompts and responses of a tokenised table; -1 if it has none."""
    found = []
    for name in ("prompts", "chosen", "rejected", "translated_chosen", "translated_rejected"):
        column = table.data.column(name)
        while isinstance(column.type, pyarrow.ListType | pyarrow.LargeListType):
            column = pyarrow.compute.list_flatten(column)
        found.append(pyarrow.compute.max(column).as_py())
    return max((int(token) for token in found if token is not None), default=-1)


@dataclass(frozen=True)
class TokenCounts:
    """Number of tokens of N examples in L languages, the source language first, without padding."""

    prompts: np.ndarray
    """(N, L) int64, tokens of each prompt; 0 where the example has none in the language."""
    chosen: np.ndarray
    """(N, L) int64, tokens of the chosen (or only) response to each: the language's own, else the source's."""
    rejected: np.ndarray
    """(N, L) int64, the same of the rejected response; 0 without one."""
    ordinary: np.ndarray
    """(N,) bool, whether the prompt is an ordinary one."""
    translated: np.ndarray
    """(N, L) bool, whether the language has responses of its own."""

    @classmethod
    def of(cls, table: Dataset, languages: int) -> TokenCounts:
        """Count the tokens of a tokenised table whose prompts are in ``languages`` languages."""

        # In Arrow, because as Python lists the tokens of a large table would take minutes and gigabytes.
        def lengths(column: pyarrow.ChunkedArray) -> np.ndarray:
            counted: np.ndarray = pyarrow.compute.list_value_length(column).to_numpy().astype(np.int64)
            return counted

        def by_language(name: str, where: str, counts: np.ndarray) -> np.ndarray:
            """Write lengths of the lists in column ``name`` into ``counts``, at the languages in column ``where``."""
            place = table.data.column(where)
            language = pyarrow.compute.list_flatten(place).to_numpy()
            if len(language):  # an empty column has a type that has no length
                example = np.repeat(np.arange(len(table)), lengths(place))
                counts[example, language] = lengths(pyarrow.compute.list_flatten(table.data.column(name)))
            return counts

        def responses(name: str) -> np.ndarray:
            of_source = lengths(table.data.column(name))
            return by_language(f"translated_{name}", "translated", np.repeat(of_source[:, None], languages, axis=1))

        nothing = np.zeros((len(table), languages), dtype=np.int64)
        prompts = by_language("prompts", "languages", nothing.copy())
        own_chosen, own_rejected = (
            by_language(f"translated_{name}", "translated", nothing.copy()) for name in ("chosen", "rejected")
        )
        ordinary = table.data.column("ordinary").to_numpy()
        return cls(prompts, responses("chosen"), responses("rejected"), ordinary, own_chosen + own_rejected > 0)

    @property
    def sizes(self) -> Sizes:
        """Sizes from which the normalizers of a step follow."""
        is_group = (self.prompts > 0).sum(1) > 1
        return Sizes(
            response_tokens=self.chosen[:, 0],
            groups=is_group.astype(int),
            ordinary_groups=(is_group & self.ordinary).astype(int),
            chosen=(self.chosen[:, 0] > 0).astype(int),
            rejected=(self.rejected[:, 0] > 0).astype(int),
        )

    def take(self, rows: list[int]) -> TokenCounts:
        """The counts of these examples."""
        return TokenCounts(
            self.prompts[rows], self.chosen[rows], self.rejected[rows], self.ordinary[rows], self.translated[rows]
        )

    def in_step(self, plan: RowPlan) -> np.ndarray:
        """(N, L) int64, number of tokens that a training step runs of each example, by language.

        Each response counts together with its prompt, as in the rows of the
        :class:`~lightning_mlc.data.collation.Collator`.
        Rows that share a prompt run fewer tokens, but that is not counted, because the division into micro-batches
        must not depend on the model's attention.
        """
        chosen = np.where(self.chosen > 0, self.prompts + self.chosen, 0)
        others = (self.rejected > 0) & (plan.rejected | (self.chosen == 0))
        answered = (self.prompts > 0) * (chosen + np.where(others, self.prompts + self.rejected, 0))
        # The beginning of the source's response, where its first positions are compared.
        compared = np.where(self.chosen[:, :1] > 0, self.chosen[:, :1], self.rejected[:, :1])
        alone = (self.prompts > 0) * (self.prompts + np.clip(np.minimum(plan.positions, compared) - 1, 0, None))
        counts: np.ndarray = alone
        if plan.responses_in == "all":
            counts = answered + alone * (self.translated & (compared > 1) & (plan.positions > 1))
        if plan.responses_in == "source":
            counts[:, 0] = answered[:, 0]
        if not plan.translations:
            counts[:, 1:] = 0
        return counts

    def relative_to_source(self) -> np.ndarray:
        """(L,) number of tokens of the prompts in each language, relative to the same prompts in the source language.

        NaN where no example has a prompt in the language.
        """
        there = self.prompts > 0
        sources = (self.prompts[:, :1] * there).sum(0)
        found: np.ndarray = np.divide(
            self.prompts.sum(0), sources, out=np.full(len(sources), np.nan), where=sources > 0
        )
        return found


class Extent(NamedTuple):
    """The largest numbers of tokens in some tables."""

    longest_sequence: int
    """Most tokens of a prompt with one response."""
    longest_row: int
    """Most tokens of a prompt with both responses; no row is longer."""

    @classmethod
    def of(cls, tables: Iterable[Dataset], languages: int) -> Extent:
        """The extent of ``tables``, whose prompts are in ``languages`` languages."""
        sequence, row = 0, 0
        for table in tables:
            counts = TokenCounts.of(table, languages)
            prompt, chosen, rejected = (
                int(found.max(initial=0)) for found in (counts.prompts, counts.chosen, counts.rejected)
            )
            sequence = max(sequence, prompt + max(chosen, rejected))
            row = max(row, prompt + chosen + rejected)
        return cls(sequence, row)


def require_room(costs: np.ndarray, budget: int, languages: tuple[str, ...], where: Callable[[int], str]) -> None:
    """Refuse examples that a micro-batch has no room for.

    Args:
        costs: (N, L) int64, tokens of each example by language (:meth:`TokenCounts.in_step`).
        budget: Tokens of a micro-batch (``data.tokens_per_batch``).
        languages: Codes of the L languages.
        where: File and row of an example, given its index.

    Raises:
        UserError: An example has more tokens than ``budget``.
    """
    totals = costs.sum(1)
    if totals.max() <= budget:
        return
    too_long = int((totals > budget).sum())
    worst = int(totals.argmax())
    dearest = [f"{languages[i]} {costs[worst, i]}" for i in np.argsort(-costs[worst])[:3] if costs[worst, i]]
    raise UserError(
        "data.tokens_per_batch",
        f"{budget} is less than the {totals[worst]} tokens of {where(worst)} alone "
        f"(most in {', '.join(dearest)}; {too_long} examples have too many); raise it to {totals[worst]}, "
        "lower data.max_prompt_length or data.max_response_length, or drop languages (data.languages)",
    )
