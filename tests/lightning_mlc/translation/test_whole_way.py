"""The five commands of docs/data.md, from English prompts to an evaluated model, as they stand there."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from conftest import save_model, write_jsonl

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))
from fake_endpoint import Answer, completion, serve
from translators import SAMPLE, english_rows, holds, translate_from_sample

from lightning_mlc.cli import main
from lightning_mlc.translation.rows import read_source

PAGE = Path(__file__).parents[3] / "docs" / "data.md"
QUICK = {
    "fit": ["--trainer.max_steps=2", "--trainer.accelerator=cpu", "--trainer.precision=32-true"],
    "evaluate": ["--max_new_tokens=4", "--device=cpu", "--bootstrap=100", "--representation_prompts=2"],
}


def commands() -> list[list[str]]:
    (block,) = re.findall(
        r"<!-- commands: from English prompts -->\n```bash\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S
    )
    return [shlex.split(line) for line in block.splitlines()]


@pytest.mark.slow
def test_the_whole_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = save_model(tmp_path / "model")
    write_jsonl(tmp_path / "english.jsonl", english_rows(10))
    write_jsonl(tmp_path / "test.jsonl", SAMPLE[10:13])
    write_jsonl(tmp_path / "ordinary.jsonl", [{**row, "kind": "ordinary"} for row in SAMPLE[13:16]])
    refused = SAMPLE[4]["prompt"]["en"]

    def behaviour(text: str, before: int) -> Answer:
        return completion("I can't help with that.") if holds(text, refused) else translate_from_sample(text)

    assert [words[:2] for words in commands()] == [
        ["lightning-mlc", name] for name in ("translate", "lint", "fit", "export", "evaluate")
    ]
    with serve(behaviour) as served:
        for words in commands():
            changed = {"http://localhost:8000/v1#TRANSLATOR": f"{served.url}#m", "MODEL": str(model)}
            args = [changed.get(word, word.replace("=MODEL", f"={model}")) for word in words[1:]]
            assert main([*args, *QUICK.get(words[1], [])]) == 0, words
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [sum(text is not None for text in row["prompt"].values()) for row in rows] == [4] * 4 + [1] + [4] * 5
    results = json.loads((tmp_path / "runs" / "eval" / "results.json").read_text())
    assert {figure["model"] for figure in results["figures"]} == {"base", "new"}
    assert {part["kind"] for part in results["sets"]} == {"harmful", "ordinary"}


def test_the_row_that_is_shown_can_be_translated(tmp_path: Path) -> None:
    (shown,) = re.findall(r"<!-- code: english -->\n```json\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    (tmp_path / "english.jsonl").write_text(shown, encoding="utf-8")
    (row,) = read_source(str(tmp_path / "english.jsonl"), "en")
    assert (list(row.prompts), row.kind, sorted(row.others)) == (["en"], "harmful", ["chosen", "kind", "rejected"])
