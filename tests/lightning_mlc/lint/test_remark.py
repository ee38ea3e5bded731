"""The one line of training."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from conftest import example_rows, save_model, write_jsonl

from lightning_mlc.data.file_layouts import parse_rows
from lightning_mlc.data.reading import read_rows
from lightning_mlc.data.spool import Spool
from lightning_mlc.lint.remark import remark

SOURCE = "How do I keep my bicycle from rusting in winter?"
RUSSIAN = "Как зимой уберечь велосипед от ржавчины?"


def told(tmp_path: Path, caplog: pytest.LogCaptureFixture, texts: list[str]) -> list[str]:
    rows = [{"prompt": {"en": f"{SOURCE} {n}", "ru": text}, "response": "r"} for n, text in enumerate(texts)]
    path = write_jsonl(tmp_path / "my data.jsonl", rows)
    spool = Spool.write(parse_rows(read_rows(str(path), "data.train_path"), "en"), tmp_path / "spool")
    with caplog.at_level(logging.WARNING, "lightning_mlc"):
        remark("en", ("my data.jsonl",), spool)
    return caplog.messages


def test_wrong_translations_are_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert told(tmp_path, caplog, [RUSSIAN, f"{SOURCE} 1", RUSSIAN, "?"]) == [
        "2 texts in 4 of 4 rows of my data.jsonl are surely wrong translations (copy 1, script 1, empty 1): "
        "see `lightning-mlc lint 'my data.jsonl'`"
    ]


def test_good_translations_are_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert told(tmp_path, caplog, [RUSSIAN] * 5) == []


def test_of_many_rows_some_are_looked_at(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (line,) = told(tmp_path, caplog, ["?"] * 1000)
    assert line.startswith("60 texts in 60 of 1000 rows")


def test_only_a_new_table_is_looked_at(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_mlc.cli import main

    rows = example_rows(8)
    rows[3]["prompt"]["sw"] = rows[3]["prompt"]["en"] = SOURCE
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    command = ["fit", "--trainer.accelerator=cpu", "--trainer.fast_dev_run=1", f"--data.train_path={path}"]
    command += [f"--model.name_or_path={save_model(tmp_path / 'model')}", f"--data.cache_dir={tmp_path / 'cache'}"]
    command += ["--trainer.precision=32-true", "--data.val_share=0.25"]
    counts = []
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "lightning_mlc"):
            assert main([*command, f"--out={tmp_path / 'out'}"]) == 0
        counts.append(sum("lightning-mlc lint" in message for message in caplog.messages))
    assert counts == [1, 0]
