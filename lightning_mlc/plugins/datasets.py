"""Our files as the columns of TRL, so that one file serves both."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_mlc.data.file_layouts import parse_rows
from lightning_mlc.data.languages import canonical_language
from lightning_mlc.data.reading import read_rows
from lightning_mlc.data.records import Example

if TYPE_CHECKING:
    from datasets import Dataset


def mlc_dataset(path: str | Path, source_language: str = "en") -> Dataset:
    """Read a file in any layout of ours as a data set for TRL.

    Args:
        path: A file, a folder of ``datasets.save_to_disk``, ``hf://owner/name``, or ``sample``.
        source_language: BCP-47 code of the language of the responses.

    Returns:
        Rows in TRL's conversational form. They have ``prompt`` in the source language, and ``chosen`` and ``rejected``,
        or ``completion``, or ``completion`` and ``label``. In addition they have ``id`` and ``translations``: the
        prompt in the other languages, null where there is none.
        :func:`~lightning_mlc.plugins.trainer.add_mlc` takes them as
        its prompts.

    Raises:
        UserError: The file cannot be read, or a row is malformed.
    """
    from datasets import Dataset

    source = canonical_language(source_language, "source_language")
    examples = list(parse_rows(read_rows(str(path), "path"), source))
    others = list(dict.fromkeys(code for example in examples for code in example.prompts if code != source))
    return Dataset.from_list([_row(example, source, others) for example in examples])


def _row(example: Example, source: str, others: list[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"id": example.id, "prompt": example.prompts[source]}
    if example.chosen is not None and example.rejected is not None:
        row |= {"chosen": _answer(example.chosen), "rejected": _answer(example.rejected)}
    else:
        text = example.chosen if example.chosen is not None else example.rejected
        assert text is not None
        row["completion"] = _answer(text)
        if example.labelled:
            row["label"] = example.chosen is not None
    row["translations"] = {code: example.prompts.get(code) for code in others}
    return row


def _answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]
