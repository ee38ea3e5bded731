"""Batches of responses that a model only scores, such as a reference model before training."""

from __future__ import annotations

from collections.abc import Collection

from torch.utils.data import DataLoader

from lightning_mlc.data.batches import Batch
from lightning_mlc.data.datamodule import MultilingualData, Split
from lightning_mlc.data.sampling import EvaluationBatches

SCORING_EXAMPLES = 32
"""Number of training examples of a batch. Its rows are run in blocks of ``EVALUATION_TOKENS`` tokens."""


def scoring_loader(
    data: MultilingualData, split: Split, in_source: bool, missing: Collection[int]
) -> DataLoader[Batch]:
    """This process's share of the batches that have an example whose score is missing.

    Validation and test examples are batched as in evaluation, so that a model gives exactly the same scores there.

    Args:
        data: The data, set up.
        split: The split to score.
        in_source: Responses in the source language only; otherwise in all languages.
        missing: Keys (``Batch.keys``) of the examples to score.
    """
    collator, keys = data.collator(), data.keys(split)
    batches = EvaluationBatches(data.sizes(split), _examples_per_batch(data, split))
    wanted = [batch for batch in batches if any(keys[index] in missing for index in batch.indices)]
    collate = collator.source_responses if in_source else collator.evaluation
    return data.loader(split, wanted[data.share.rank :: data.share.size], collate)


def describe_scoring(data: MultilingualData, split: Split, in_source: bool) -> dict[str, str]:
    """Everything that the scores of :func:`scoring_loader` depend on, except the model, by names for messages."""
    return {
        "data": data.fingerprint(split),
        "max_prompt_length": str(data.max_prompt_length),
        "max_response_length": str(data.max_response_length),
        "languages": data.languages[0] if in_source else ", ".join(data.languages),
        "responses": "chosen and rejected" if data.plan.rejected else "chosen",
        "mismatched": "yes" if data.plan.mismatched else "no",
        "layout": "packed" if data.layout.packed else "padded",
        "examples per batch": str(_examples_per_batch(data, split)),
    }


def _examples_per_batch(data: MultilingualData, split: Split) -> int:
    return SCORING_EXAMPLES if split == "train" else data.val_batch_size
