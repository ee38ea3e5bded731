"""Warnings about the data: empty responses, cut texts, languages that cost much."""

from __future__ import annotations

import logging

import numpy as np
import pyarrow
from datasets import Dataset
from lightning.pytorch.utilities import rank_zero_only
from pyarrow.compute import greater, list_value_length

from lightning_mlc.data.costs import EXPENSIVE

logger = logging.getLogger("lightning_mlc")

NAMED_ROWS = 5
"""Number of rows that a warning names at most."""


@rank_zero_only
def warn_of_empty_responses(table: Dataset) -> None:
    """Warn of examples of ``table`` whose response has no text."""
    empty = _rows_where(table.data.column("empty_response"))
    if len(empty):
        logger.warning(
            "%d examples have an empty response, so the model will learn to answer with nothing: %s",
            len(empty),
            _first_of(len(empty), table[empty[:NAMED_ROWS]]["where"]),
        )


@rank_zero_only
def warn_of_cut_texts(table: Dataset, max_prompt_length: int, max_response_length: int) -> None:
    """Warn of examples of ``table`` whose prompt or response was longer than its limit in tokens."""
    prompts = _rows_where(greater(list_value_length(table.data.column("cut_prompts")), 0))
    if len(prompts):
        first = table[prompts[:NAMED_ROWS]]
        places = [
            f"{where} ({', '.join(languages)})"
            for where, languages in zip(first["where"], first["cut_prompts"], strict=True)
        ]
        logger.warning(
            "%d examples have a prompt longer than data.max_prompt_length=%d tokens, which was cut: %s",
            len(prompts),
            max_prompt_length,
            _first_of(len(prompts), places),
        )
    responses = _rows_where(table.data.column("cut_response"))
    if len(responses):
        logger.warning(
            "%d examples have a response longer than data.max_response_length=%d tokens, which was cut: %s",
            len(responses),
            max_response_length,
            _first_of(len(responses), table[responses[:NAMED_ROWS]]["where"]),
        )


@rank_zero_only
def warn_of_expensive_languages(languages: tuple[str, ...], factors: np.ndarray, shares: np.ndarray) -> None:
    """Warn of languages whose prompts take many tokens.

    Args:
        languages: Codes of L languages, the source language first.
        factors: (L,) number of tokens of the prompts, relative to the same prompts in the source language.
        shares: (L,) share of a step's tokens.
    """
    expensive = [int(index) for index in np.argsort(-np.nan_to_num(factors)) if factors[index] >= EXPENSIVE]
    if expensive:
        logger.warning(
            "prompts in %s take several times as many tokens as the same prompts in %s with this tokenizer, and "
            "each step pays for them; drop languages (data.languages), run translations on fewer steps "
            "(model.consistency.every_n_steps), or take a model whose tokenizer covers them better",
            ", ".join(
                f"{languages[i]} ({factors[i]:.1f} times, {shares[i]:.0%} of a step's tokens)" for i in expensive
            ),
            languages[0],
        )


def _rows_where(flags: pyarrow.ChunkedArray) -> np.ndarray:
    return np.flatnonzero(flags.to_numpy())


def _first_of(count: int, places: list[str]) -> str:
    """``places``, the first of ``count``, and the number of the others."""
    return ", ".join(places) + (f" and {count - len(places)} more" if count > len(places) else "")
