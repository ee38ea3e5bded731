"""Rows of a tokenised table as the batch of a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lightning_mlc.data.batches import Batch, Normalizers
from lightning_mlc.data.row_layout import Layout, pad_in_chunks
from lightning_mlc.data.rows import CHOSEN, MISMATCHED, NO_RESPONSE, REJECTED, Row, TokenRows

EVALUATION_TOKENS = 4096
"""Tokens of a block in evaluation, which bounds the memory that its logits take."""


ResponsesIn = Literal["none", "source", "all"]
"""In which languages the prompts of a training step are followed by responses: the language's own where the
example has them, else those of the source language."""


@dataclass(frozen=True)
class Collator:
    """What all batches of a data source have in common."""

    languages: tuple[str, ...]
    """The source language first."""
    pad_id: int
    with_rejected: bool
    layout: Layout
    """How the rows of a step are laid out. Prompts to generate from are always padded."""
    responses_in: ResponsesIn = "source"

    def training(self, examples: Sequence[Mapping[str, Any]], keys: Sequence[int], normalizers: Normalizers) -> Batch:
        """Responses where ``responses_in`` says; the other rows are prompts alone."""
        responses: list[Row] = []
        translations: list[Row] = []
        prompts = []
        for index, example in enumerate(examples):
            for language, prompt in zip(example["languages"], example["prompts"], strict=True):
                if language == 0 and self.responses_in != "none":
                    responses += self._with_responses(example, prompt, index, language)
                elif self.responses_in == "all":
                    translations += self._with_responses(example, prompt, index, language)
                else:
                    prompts.append(Row(prompt, (), index, language, NO_RESPONSE))
        return self._batch(
            examples,
            keys,
            normalizers,
            self.layout.blocks(responses, self.pad_id),
            self.layout.blocks(prompts, self.pad_id),
            self.layout.blocks(translations, self.pad_id),
        )

    def evaluation(self, examples: Sequence[Mapping[str, Any]], keys: Sequence[int], normalizers: Normalizers) -> Batch:
        """The responses after the prompt in every language."""
        responses: list[Row] = []
        for index, example in enumerate(examples):
            for language, prompt in zip(example["languages"], example["prompts"], strict=True):
                responses += self._with_responses(example, prompt, index, language)
        blocks = self.layout.blocks(responses, self.pad_id, max_tokens=EVALUATION_TOKENS)
        return self._batch(examples, keys, normalizers, blocks, ())

    def source_responses(
        self, examples: Sequence[Mapping[str, Any]], keys: Sequence[int], normalizers: Normalizers
    ) -> Batch:
        """The responses that :meth:`training` has, without translations and in blocks as in evaluation."""
        source = [{**row, "languages": row["languages"][:1], "prompts": row["prompts"][:1]} for row in examples]
        return self.evaluation(source, keys, normalizers)

    def prediction(self, examples: Sequence[Mapping[str, Any]], keys: Sequence[int], normalizers: Normalizers) -> Batch:
        """The prompts in every language."""
        prompts = [
            Row(prompt, (), index, language, NO_RESPONSE)
            for index, example in enumerate(examples)
            for language, prompt in zip(example["languages"], example["prompts"], strict=True)
        ]
        return self._batch(examples, keys, normalizers, (), pad_in_chunks(prompts, self.pad_id, side="left"))

    def _with_responses(self, example: Mapping[str, Any], prompt: list[int], index: int, language: int) -> list[Row]:
        chosen, rejected = example["chosen"], example["rejected"]
        if language in example["translated"]:
            place = example["translated"].index(language)
            chosen, rejected = example["translated_chosen"][place], example["translated_rejected"][place]
        rows = []
        if chosen:
            rows.append(Row(prompt, chosen, index, language, CHOSEN))
        # Whatever is learned, each prompt has a row with a response: it has the prompt's hidden state, too.
        if rejected and (self.with_rejected or not rows):
            rows.append(Row(prompt, rejected, index, language, REJECTED, leads=not rows))
        return rows

    def _batch(
        self,
        examples: Sequence[Mapping[str, Any]],
        keys: Sequence[int],
        normalizers: Normalizers,
        responses: tuple[TokenRows, ...],
        prompts: tuple[TokenRows, ...],
        translations: tuple[TokenRows, ...] = (),
    ) -> Batch:
        mismatched = [
            Row(example["prompts"][0], example["mismatched"], index, 0, MISMATCHED, leads=False)
            for index, example in enumerate(examples)
            if "mismatched" in example
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
            mismatched=self.layout.blocks(mismatched, self.pad_id),
        )
