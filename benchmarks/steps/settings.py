"""Settings that all variants share, and the pairs of each step."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from benchmarks.published import Pair
from lightning_mlc.data.datamodule import MultilingualData
from lightning_mlc.data.file_layouts import parse_rows
from lightning_mlc.data.reading import read_rows
from lightning_mlc.data.tokenization import ChatTokenizer
from lightning_mlc.errors import UserError
from lightning_mlc.sources import ModelSource, load_tokenizer

BETA, WEIGHT, TEMPERATURE, EXTRACTOR_DIM, CLIP = 0.1, 0.8, 0.2, 512, 1.0
"""The published settings, and the usual limit of the gradient's norm."""


@dataclass(frozen=True)
class StepSettings:
    """Settings that all variants share."""

    model: ModelSource
    data: str
    languages: tuple[str, ...]
    """The language of the responses first."""
    batch_size: int
    warm_up: int
    """Number of first steps that are not measured, because libraries initialise lazily and memory still grows."""
    steps: int
    """Number of steps after the warm-up, which are measured."""
    counted_steps: int
    """Number of measured steps that are repeated to count their FLOPs, from the first one on."""
    precision: str
    device: str
    gradient_checkpointing: bool
    learning_rate: float
    max_prompt_length: int
    max_response_length: int
    seed: int
    overrides: tuple[str, ...] = ()
    """``KEY=VALUE`` options of ``lightning-mlc fit``, for ``dpo`` and ``dpo_mlc``."""
    extractor: str | None = None
    """File to which ``dpo_mlc`` writes its initial extractor, and from which ``published`` reads it."""


def plan_pairs(settings: StepSettings) -> list[list[Pair]]:
    """Return the pairs of each step, in the order in which training will see them.

    Raises:
        UserError: A row lacks a language or a rejected response; there are too few rows.
    """
    examples = list(parse_rows(read_rows(settings.data, "--data"), settings.languages[0]))
    for example in examples:
        missing = [language for language in settings.languages if language not in example.prompts]
        if missing:
            raise UserError(
                example.where,
                f"has no prompt in '{missing[0]}', which the published recipe needs; "
                "give --languages that every row has",
            )
        if example.rejected is None:
            raise UserError(example.where, "has no rejected response; give preference pairs")
    steps = settings.warm_up + settings.steps
    if steps * settings.batch_size > len(examples):
        raise UserError(
            "--data",
            f"{settings.data} has {len(examples)} rows, too few for {steps} steps of {settings.batch_size}; "
            "give more data or fewer --steps",
        )
    chat = ChatTokenizer(
        load_tokenizer(settings.model), settings.max_prompt_length, settings.max_response_length, "cut"
    )
    by_id = {example.id: example for example in examples}
    planned = []
    for ids in _order(settings, steps):
        rows = [chat.encode(by_id[id], settings.languages) for id in ids]
        planned.append([Pair(row["id"], tuple(row["prompts"]), row["chosen"], row["rejected"]) for row in rows])
    return planned


def _order(settings: StepSettings, steps: int) -> list[tuple[str, ...]]:
    """Return the ids in the batches that training will draw."""
    data = MultilingualData(
        settings.data,
        languages=list(settings.languages),
        source_language=settings.languages[0],
        val_share=0.0,
        batch_size=settings.batch_size,
        max_prompt_length=settings.max_prompt_length,
        max_response_length=settings.max_response_length,
        seed=settings.seed,
        name_or_path=settings.model.name_or_path,
        gguf_file=settings.model.gguf_file,
    )
    data.prepare_data()
    data.setup("fit")
    return [batch.ids for batch in islice(data.train_dataloader(), steps)]
