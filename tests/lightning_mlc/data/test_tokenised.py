"""A tokenised example and the table that stores it share one definition."""

from __future__ import annotations

from pathlib import Path
from typing import get_type_hints

from lightning_mlc.data.datamodule import MultilingualData
from lightning_mlc.data.tokenised import COLUMNS, TokenisedExample


def test_a_row_of_a_table_is_a_tokenised_example(tiny_model: Path, pairs_file: Path) -> None:
    data = MultilingualData(str(pairs_file), name_or_path=str(tiny_model), num_proc=1)
    data.prepare_data()
    data.setup("fit")
    row = data._tables["train"][0]
    hints = get_type_hints(TokenisedExample)
    assert list(row) == list(COLUMNS) == list(hints)
    for name, kind in hints.items():
        assert isinstance(row[name], getattr(kind, "__origin__", kind)), name
