"""From tokenised examples to the batch of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lightning_mlc.data.batches import Batch, Normalizers
from lightning_mlc.data.row_layout import Layout, pad_in_chunks
from lightning_mlc.data.row_plan import RowPlan
from lightning_mlc.data.rows import (
    BEGINNING,
    CHOSEN,
    MISMATCHED,
    NO_RESPONSE,
    REJECTED,
    TokenRows,
    TokenSequence,
)
from lightning_mlc.data.tokenised import TokenisedExample

EVALUATION_TOKENS = 4096
"""Number of tokens of a block in evaluation. It bounds the memory of the logits."""

Examples = Sequence[TokenisedExample]
Responses = Sequence[list[int]]


@dataclass(frozen=True)
class Collator:
    """Makes the batches of a data source.

    Args:
        languages: Codes of the languages, the source language first.
        pad_id: Token id of padding.
        plan: Which rows a step runs.
        layout: How they are padded or packed. Prompts to generate from are always padded.

    Each method takes the examples of a batch, their keys (``Batch.keys``), the normalizers of the step, and a response
    to another prompt for each example, or no such response.
    """

    languages: tuple[str, ...]
    pad_id: int
    plan: RowPlan
    layout: Layout

    def training(
        self, examples: Examples, keys: Sequence[int], normalizers: Normalizers, mismatched: Responses = ()
    ) -> Batch:
        """A training step: responses in the languages of the plan, and the other prompts alone."""
        responses: list[TokenSequence] = []
        translations: list[TokenSequence] = []
        prompts = []
        for index, example in enumerate(examples):
            for language, prompt in zip(example["languages"], example["prompts"], strict=True):
                if language == 0 and self.plan.responses_in != "none":
                    responses += self._with_responses(example, prompt, index, language)
                elif self.plan.responses_in == "all":
                    translations += self._with_responses(example, prompt, index, language)
                    prompts += self._apart(example, prompt, index, language)
                else:
                    prompts.append(self._alone(example, prompt, index, language))
        return self._batch(
            examples,
            keys,
            normalizers,
            mismatched,
            self.layout.blocks(responses, self.pad_id),
            self.layout.blocks(prompts, self.pad_id),
            self.layout.blocks(translations, self.pad_id),
        )

    def evaluation(
        self, examples: Examples, keys: Sequence[int], normalizers: Normalizers, mismatched: Responses = ()
    ) -> Batch:
        """Validation: the responses after the prompt in every language."""
        responses: list[TokenSequence] = []
        prompts: list[TokenSequence] = []
        for index, example in enumerate(examples):
            for language, prompt in zip(example["languages"], example["prompts"], strict=True):
                responses += self._with_responses(example, prompt, index, language)
                prompts += self._apart(example, prompt, index, language)
        blocks = (self.layout.blocks(rows, self.pad_id, max_tokens=EVALUATION_TOKENS) for rows in (responses, prompts))
        return self._batch(examples, keys, normalizers, mismatched, *blocks)

    def source_responses(
        self, examples: Examples, keys: Sequence[int], normalizers: Normalizers, mismatched: Responses = ()
    ) -> Batch:
        """Scoring: the responses in the source language, in blocks as in evaluation."""
        source = [
            TokenisedExample(**{**row, "languages": row["languages"][:1], "prompts": row["prompts"][:1]})
            for row in examples
        ]
        return self.evaluation(source, keys, normalizers, mismatched)

    def prediction(
        self, examples: Examples, keys: Sequence[int], normalizers: Normalizers, mismatched: Responses = ()
    ) -> Batch:
        """Generation: the prompts in every language, padded on the left."""
        prompts = [
            TokenSequence(prompt, (), index, language, NO_RESPONSE)
            for index, example in enumerate(examples)
            for language, prompt in zip(example["languages"], example["prompts"], strict=True)
        ]
        return self._batch(
            examples, keys, normalizers, mismatched, (), pad_in_chunks(prompts, self.pad_id, side="left")
        )

    def _with_responses(
        self, example: TokenisedExample, prompt: list[int], index: int, language: int
    ) -> list[TokenSequence]:
        chosen, rejected = example["chosen"], example["rejected"]
        if language in example["translated"]:
            place = example["translated"].index(language)
            chosen, rejected = example["translated_chosen"][place], example["translated_rejected"][place]
        rows: list[TokenSequence] = []
        positions = 0 if self._is_apart(example, language) else self._positions(example)
        if chosen:
            rows.append(TokenSequence(prompt, chosen, index, language, CHOSEN, positions=positions))
        # Each prompt needs one row with a response, because the prompt's hidden state is taken from it.
        if rejected and (self.plan.rejected or not rows):
            first = 0 if rows else positions
            rows.append(TokenSequence(prompt, rejected, index, language, REJECTED, leads=not rows, positions=first))
        return rows

    def _alone(
        self, example: TokenisedExample, prompt: list[int], index: int, language: int, leads: bool = True
    ) -> TokenSequence:
        """The prompt without a response that is scored, and as much of the source's as the compared positions need."""
        positions = self._positions(example)
        beginning = _compared(example)[: max(0, positions - 1)]
        kind = BEGINNING if beginning else NO_RESPONSE
        return TokenSequence(prompt, beginning, index, language, kind, leads=leads, positions=positions)

    def _apart(self, example: TokenisedExample, prompt: list[int], index: int, language: int) -> list[TokenSequence]:
        """A row of its own for the compared positions, if the rows with responses do not have them."""
        return [self._alone(example, prompt, index, language, leads=False)] if self._is_apart(example, language) else []

    def _is_apart(self, example: TokenisedExample, language: int) -> bool:
        """Whether the prompt's rows with responses begin with another response than the one that is compared."""
        return language in example["translated"] and self._positions(example) > 1

    def _positions(self, example: TokenisedExample) -> int:
        """The number of positions that are compared; without a response there is only the end of the prompt."""
        return min(self.plan.positions, max(1, len(_compared(example))))

    def _batch(
        self,
        examples: Examples,
        keys: Sequence[int],
        normalizers: Normalizers,
        mismatched: Responses,
        responses: tuple[TokenRows, ...],
        prompts: tuple[TokenRows, ...],
        translations: tuple[TokenRows, ...] = (),
    ) -> Batch:
        others = [
            TokenSequence(examples[index]["prompts"][0], response, index, 0, MISMATCHED, leads=False)
            for index, response in enumerate(mismatched)
        ]
        return Batch(
            ids=tuple(example["id"] for example in examples),
            keys=torch.tensor(keys, dtype=torch.int64),
            languages=self.languages,
            source=0,
            responses=responses,
            prompts=prompts,
            normalizers=normalizers,
            translations=translations,
            mismatched=self.layout.blocks(others, self.pad_id),
            is_ordinary=torch.tensor([example["ordinary"] for example in examples], dtype=torch.bool),
        )


def _compared(example: TokenisedExample) -> list[int]:
    """The source language's response whose first positions are compared: the chosen one, or the only one."""
    return example["chosen"] or example["rejected"]
