"""A study: the grid is checked first, work is shared and resumed, and figures match those computed by hand."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import example_rows, save_model, write_jsonl
from matplotlib.image import imread

from benchmarks.study.__main__ import main, parse
from benchmarks.study.grid import DataSettings, StudyEvaluation, check_cells, read_grid
from benchmarks.study.measuring import Measurer
from benchmarks.study.page import GRID, PAGE, ROWS, write_report
from benchmarks.study.results import collect
from benchmarks.study.runs import claim, is_claimed
from benchmarks.study.split import split_rows
from benchmarks.study.uncertainty import SeedFigure, interval, seed_figures, student_quantile
from lightning_mlc.errors import UserError
from lightning_mlc.evaluation.systems.local import chat_of
from lightning_mlc.evaluation.systems.system import System

ROOT = Path(__file__).parents[2]
STUDIES = sorted((ROOT / "benchmarks" / "studies").glob("*.yaml"))

TINY: dict[str, Any] = {
    "name": "tiny",
    "seeds": [1],
    "data": {"heldout": 4},
    "evaluation": {"generate": 2, "max_new_tokens": 4, "ordinary_limit": 3},
    "fit": {
        "trainer.max_steps": 6,
        "trainer.max_epochs": -1,
        "trainer.enable_progress_bar": False,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.log_every_n_steps": 1,
        "checkpoint.every_n_train_steps": 2,
        "model.optimizer": "torch.optim.AdamW",
        "model.optimizer.lr": 1e-3,
    },
    "cells": {
        "dpo": {"model.consistency.mlc.weight": 0},
        "dpo-mlc": {"model.consistency.mlc.weight": 0.8},
    },
    "questions": [{"title": "Does it help?", "compare": {"dpo-mlc": "dpo"}}],
}


def write_grid(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump({**TINY, **changes}, sort_keys=False))
    return path


# ---- the grid ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow) if path.stem.startswith("smollm2") else path for path in STUDIES],
    ids=lambda path: path.stem,
)
def test_shipped_grids_are_ones_that_fit_takes(path: Path, tiny_model: Path) -> None:
    grid = read_grid(path)
    assert grid.name == path.stem
    own = {} if grid.configs else {"model.name_or_path": str(tiny_model)}
    models = check_cells(grid, own)
    assert set(models) == set(grid.cells)
    compared = {cell for question in grid.questions for pair in question.compare.items() for cell in pair}
    assert set(grid.cells) <= compared, "a cell that stands in no table"
    assert f"<!-- study {grid.name}: begin -->" in PAGE.read_text(encoding="utf-8")


def test_commands_of_the_page_are_ones_that_parse() -> None:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("python -m benchmarks")]
    assert len(lines) == 8
    for line in lines:
        options = parse(shlex.split(line)[3:])
        assert options.report is not None or options.config.is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cells": {"a": {"model.objectve": "DPO"}}}, r"cells\.a: there is no option --model.objectve; did you mean"),
        ({"cells": {"a": {"model.objective.beta": -1}}}, r"cells\.a: model\.objective\.beta: must be"),
        ({"cells": {"a": {"out": "x"}}}, r"cells\.a\.out: cannot be set here"),
        ({"cells": {"base": {}}}, r"cells\.base: is the model before training"),
        ({"cells": {"../a": {}}}, r"cells: '\.\./a' must be letters"),
        ({"seeds": []}, r"seeds: must be a list"),
        ({"seeds": [1, 1]}, r"seeds: must not contain a seed twice"),
        ({"seed": [1]}, r"seed: there is no such key; did you mean seeds\?"),
        ({"data": {"held_out": 4}}, r"data\.held_out: there is no such key; did you mean heldout\?"),
        ({"data": {"heldout": 1}}, r"data\.heldout: must be an integer of at least 2"),
        ({"evaluation": {"generate": 5}}, r"evaluation\.generate: must be 0, or between 2 and data\.heldout"),
        ({"evaluation": {"languages": ["zh", "en"]}}, r"evaluation\.languages: must begin with 'en', the language of"),
        ({"evaluation": {"responses": "some"}}, r"evaluation\.responses: must be all or source, got 'some'"),
        ({"evaluation": {"judges": ["gpt"]}}, r"judges: there is no judge 'gpt'"),
        (
            {"questions": [{"title": "?", "compare": {"dpo": "sft"}}]},
            r"questions\[0\]\.compare: there is no cell 'sft'",
        ),
        ({"pictured": ["dpo", "dpo-mcl"]}, r"pictured: there is no cell 'dpo-mcl'; did you mean dpo-mlc\?"),
        ({"pictured": "dpo"}, r"pictured: must be a list of cells"),
    ],
)
def test_a_bad_grid_is_told_before_anything_is_trained(
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
    tiny_model: Path,
    pairs_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, out = write_grid(tmp_path / "grid.yaml", **{"questions": [], **changes}), tmp_path / "out"
    arguments = [f"--config={path}", f"--out={out}", f"--data={pairs_file}", f"--model={tiny_model}"]
    assert main(arguments) == 2
    told = capsys.readouterr().err.strip()
    assert re.match("error: " + message, told), told
    assert "\n" not in told
    assert not (out / "cells").exists()


# ---- rows ----------------------------------------------------------------------------------------------------------


def test_harmful_rows_of_another_file_are_measured_and_what_is_measured_is_not_trained_on(
    tmp_path: Path, tiny_model: Path
) -> None:
    rows = example_rows(12)
    train = [*rows[:4], *({**row, "kind": "ordinary"} for row in rows[4:8])]
    other = [*rows[2:4], *rows[8:11], {**rows[11], "kind": "ordinary"}]
    settings = DataSettings(5, heldout_from=str(write_jsonl(tmp_path / "other.jsonl", other)))
    chat, path = chat_of(System("tiny", str(tiny_model))), str(write_jsonl(tmp_path / "train.jsonl", train))
    ordinary = [[{"role": "user", "content": rows[4]["prompt"]["en"]}]]
    found = split_rows(path, settings, "en", chat, tmp_path / "data", ordinary)
    assert prompts_of(found.heldout) == {rows[i]["prompt"]["en"] for i in (2, 3, 8, 9, 10)}
    assert prompts_of(found.train) == {rows[i]["prompt"]["en"] for i in (0, 1, 5, 6, 7)}
    assert found.rows == {"train": 5, "heldout": 5, "too long": 0}
    with pytest.raises(UserError, match=r"data\.heldout: is 6, but data\.heldout_from has 5 harmful rows that fit"):
        split_rows(path, dataclasses.replace(settings, heldout=6), "en", chat, tmp_path / "more", ordinary)


def prompts_of(path: Path) -> set[str]:
    return {json.loads(line)["prompt"]["en"] for line in path.read_text(encoding="utf-8").splitlines()}


def test_no_prompt_is_on_both_sides(tmp_path: Path, tiny_model: Path) -> None:
    rows = example_rows(20)
    rows += [{**row, "id": f"again-{row['id']}", "chosen": "Never."} for row in rows[:10]]  # other answers
    chat, settings = chat_of(System("tiny", str(tiny_model))), DataSettings(heldout=8)
    first = split_rows(str(write_jsonl(tmp_path / "a.jsonl", rows)), settings, "en", chat, tmp_path / "a")
    prompts = {
        name: {json.loads(line)["prompt"]["en"] for line in path.read_text().splitlines()}
        for name, path in (("train", first.train), ("heldout", first.heldout))
    }
    assert not prompts["train"] & prompts["heldout"]
    assert prompts["train"] | prompts["heldout"] == {row["prompt"]["en"] for row in rows}
    assert first.rows["heldout"] in (8, 9)  # a prompt that occurs twice is held out twice
    assert first.rows["train"] + first.rows["heldout"] == 30
    again = split_rows(str(write_jsonl(tmp_path / "b.jsonl", rows[:20])), settings, "en", chat, tmp_path / "b")
    turned = split_rows(str(write_jsonl(tmp_path / "c.jsonl", rows[19::-1])), settings, "en", chat, tmp_path / "c")
    assert again.digest == turned.digest != first.digest


def test_long_rows_are_in_neither(tmp_path: Path, tiny_model: Path) -> None:
    rows = example_rows(8)
    rows[3]["prompt"]["zh"] += "很" * 100
    rows[5]["rejected"] += "!" * 100
    chat = chat_of(System("tiny", str(tiny_model)))
    path = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    found = split_rows(path, DataSettings(2, 150, 60), "en", chat, tmp_path / "data")
    assert found.rows == {"train": 4, "heldout": 2, "too long": 2}
    assert "很很" not in found.train.read_text() + found.heldout.read_text()
    with pytest.raises(UserError, match=r"data\.heldout: 6 of 6 rows leave none to train on \(2 rows are longer"):
        split_rows(path, DataSettings(6, 150, 60), "en", chat, tmp_path / "data")


def test_rows_of_another_study_are_not_written_over(tmp_path: Path, tiny_model: Path) -> None:
    chat, settings = chat_of(System("tiny", str(tiny_model))), DataSettings(2, 150, 60)
    first, other = (str(write_jsonl(tmp_path / f"{count}.jsonl", example_rows(count))) for count in (8, 7))
    found = split_rows(first, settings, "en", chat, tmp_path / "data")
    before = found.train.read_text()
    with pytest.raises(UserError, match="has other rows"):
        split_rows(other, settings, "en", chat, tmp_path / "data")
    assert found.train.read_text() == before
    assert split_rows(first, settings, "en", chat, tmp_path / "data").digest == found.digest


# ---- runs ----------------------------------------------------------------------------------------------------------


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start the command in a new process group."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "OMP_NUM_THREADS": "1",
    }
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "benchmarks.study", *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )


def wait_for(condition: Callable[[], bool], seconds: float = 600) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.slow
def test_two_processes_finish_what_was_killed(tmp_path: Path, tiny_model: Path) -> None:
    """One process is killed during training; two others resume and divide the remaining work."""
    data, out = write_jsonl(tmp_path / "pairs.jsonl", example_rows(12)), tmp_path / "out"
    slow = {**TINY["fit"], "trainer.max_steps": 60}
    grid = write_grid(tmp_path / "grid.yaml", fit=slow)
    arguments = [f"--config={grid}", f"--out={out}", f"--data={data}", f"--model={tiny_model}", "--keep_weights"]
    run = out / "cells" / "dpo" / "seed-1" / "run"
    killed = start(arguments, tmp_path / "killed.log")
    wait_for(lambda: bool(list(run.glob("checkpoints/step=*.ckpt"))) or killed.poll() is not None)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    wait_for(lambda: not is_claimed(run.parent / "lock"))  # its training has ended too
    assert not (run.parent / "measured.json").exists()
    before = speed_by_step(run)
    both = start([*arguments, "--processes=2"], tmp_path / "both.log")
    assert both.wait(timeout=1200) == 0
    log = (tmp_path / "both.log").read_text()
    for task in ("dpo seed 1", "dpo-mlc seed 1"):
        assert log.count(f"] {task}\n") == 1, log
    assert log.count(" of 3 done") == 2, "each process says so in the end"
    after = speed_by_step(run)
    assert set(after) == set(range(60))
    kept = [step for step in before if after[step] == before[step]]
    assert len(kept) >= 2, "training began anew"  # up to its last checkpoint
    measured = json.loads((run.parent / "measured.json").read_text())
    assert measured["languages"] == ["en", "sw", "zh"]
    assert len(measured["chosen"]) == 4
    assert torch.tensor(measured["verdicts"]["refusal"]).shape == (2, 3)
    # Nothing is left to do, and other settings are refused.
    assert main(arguments) == 0
    assert main([*arguments[:-1], f"--data={write_jsonl(tmp_path / 'other.jsonl', example_rows(10))}"]) == 2
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- study tiny: begin -->\nnot measured yet\n<!-- study tiny: end -->\nb\n")
    write_report(out, page)
    assert "`dpo-mlc` - `dpo`" in page.read_text()


def speed_by_step(run: Path) -> dict[int, float]:
    """Return the tokens per second of each step, which a repeated training would not reproduce."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if None not in row.values()]
    return {int(row["step"]): float(row["speed/tokens_per_second"]) for row in rows}


@pytest.mark.slow
def test_weights_are_removed_and_failures_told(
    tmp_path: Path, tiny_model: Path, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = {"works": {"trainer.max_steps": 1}, "fails": {"data.languages": ["en", "xh"]}}
    ordinary = [{"prompt": {"en": text}} for text in ("How do I bake bread?", "How do I kill a process?")]
    asked = write_jsonl(tmp_path / "ordinary.jsonl", ordinary)
    grid = write_grid(tmp_path / "grid.yaml", cells=cells, questions=[], evaluation={"ordinary": str(asked)})
    out = tmp_path / "out"
    arguments = [f"--config={grid}", f"--out={out}", f"--data={pairs_file}", f"--model={tiny_model}"]
    assert main(arguments) == 1
    assert "fails seed 1" in capsys.readouterr().out
    done = out / "cells" / "works" / "seed-1"
    assert (done / "measured.json").exists()
    assert not (done / "run").exists()
    write_jsonl(asked, ordinary[::-1])
    assert main(arguments) == 2
    assert "was made with other settings (ordinary)" in capsys.readouterr().err
    assert not (out / "cells" / "fails" / "seed-1" / "measured.json").exists()


def test_a_base_model_is_measured_with_the_template_of_the_grid(tmp_path: Path, pairs_file: Path) -> None:
    """Its file has no chat template, and ``fit`` gives it the one that the grid names."""
    model = save_model(tmp_path / "base", template=None)
    grid = write_grid(tmp_path / "grid.yaml", fit={**TINY["fit"], "model.chat_template": "plain"})
    out = tmp_path / "out"
    arguments = [f"--config={grid}", f"--out={out}", f"--data={pairs_file}", f"--model={model}"]
    assert main([*arguments, "--only", "base"]) == 0
    measured = json.loads((out / "cells" / "base" / "untrained" / "measured.json").read_text())
    assert len(measured["margin"]) == TINY["data"]["heldout"]


def test_responses_in_the_source_language_alone_change_no_other_figure(tmp_path: Path, tiny_model: Path) -> None:
    heldout = write_jsonl(tmp_path / "heldout.jsonl", example_rows(3))
    ordinary = [{"en": [{"role": "user", "content": "How do I bake bread?"}]}]
    system = System("tiny", str(tiny_model))
    every = StudyEvaluation(device="cpu", dtype="float32")
    source = dataclasses.replace(every, responses="source", languages=("zh", "en"))
    full = Measurer(heldout, every, "en", None, ordinary).measure_model(system)
    part = Measurer(heldout, source, "en", None, ordinary).measure_model(system)
    assert full["languages"] == ["en", "sw", "zh"]
    assert part["languages"] == ["zh", "en"]
    for key in ("chosen", "rejected"):
        assert [row[0] for row in part[key]] == [None] * 3
        for ours, wanted in zip(part[key], full[key], strict=True):
            assert ours[1] == pytest.approx(wanted[0], abs=1e-4)  # float32 sums in other batches
    for key in ("margin", "ordinary_margin"):
        for ours, wanted in zip(part[key], full[key], strict=True):
            assert ours == [
                value if value is None else pytest.approx(value, abs=1e-5) for value in (wanted[2], wanted[0])
            ]
    assert None in [row[0] for row in part["ordinary_margin"]]
    assert None not in [row[1] for row in part["margin"]]


def test_a_claim_excludes_others(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with claim(lock) as first, claim(lock) as second:
        assert first is not None
        assert second is None
        assert is_claimed(lock)
    assert not is_claimed(lock)


# ---- intervals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.7062), (2, 4.3027), (4, 2.7764), (30, 2.0423), (1e4, 1.9602)])
def test_student_quantile(freedom: float, quantile: float) -> None:
    """Values from textbook tables."""
    assert student_quantile(0.95, freedom) == pytest.approx(quantile, abs=1e-3)


def test_interval_by_hand() -> None:
    parts = torch.tensor([[1.0, 2.0], [3.0, 6.0]], dtype=torch.float64)
    # Mean squares: seeds 2 (1.5^2 + 1.5^2) = 9, prompts 2 (1 + 1) = 4, rest 4 (0.5^2) = 1; each with 1 degree.
    half = math.sqrt((9 + 4 - 1) / 4) * student_quantile(0.95, 12**2 / (9**2 + 4**2 + 1**2))
    found = interval(SeedFigure(parts.mean(1), parts))
    assert found == pytest.approx((3.0, 3.0 - half, 3.0 + half))
    # If seeds are alike, only prompts count, and vice versa.
    alike = torch.tensor([[1.0, 3.0], [1.0, 3.0]], dtype=torch.float64)
    assert interval(SeedFigure(alike.mean(1), alike)).high == pytest.approx(2 + 12.7062, abs=1e-3)
    one = interval(SeedFigure(alike[:1].mean(1), alike[:1]))
    assert one.high == pytest.approx(2 + 12.7062, abs=1e-3)
    assert interval(SeedFigure(alike.T.mean(1), alike.T)).high == pytest.approx(2 + 12.7062, abs=1e-3)


def test_intervals_cover_what_they_say() -> None:
    """Three seeds and twenty prompts that both vary: the true mean is in the interval in about 95 of 100 draws."""
    generator = torch.Generator().manual_seed(0)
    inside = 0
    for _ in range(400):
        seeds, prompts, rest = (
            torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 1), (1, 20), (3, 20))
        )
        parts = 0.5 * seeds + prompts + rest
        found = interval(SeedFigure(parts.mean(1), parts))
        inside += found.low <= 0 <= found.high
    assert 0.92 <= inside / 400 <= 0.99


def test_pseudo_values_of_a_mean_are_the_numbers() -> None:
    numbers = torch.tensor([1.0, 5.0, 6.0], dtype=torch.float64)
    found = seed_figures([lambda weights: {"mean": (weights @ numbers) / weights.sum(1)}], 3)["mean"]
    assert found.values.tolist() == [4.0]
    assert found.parts[0].tolist() == pytest.approx(numbers.tolist())


# ---- figures -------------------------------------------------------------------------------------------------------


def measured(chosen: list[list[float]], margin: list[list[float]]) -> dict[str, Any]:
    """Measurements of two prompts in two languages. All responses have 10 tokens; rejected ones have log-probability
    -20."""
    return {
        "languages": ["en", "sw"],
        "chosen": [[[logp, 10] for logp in row] for row in chosen],
        "rejected": [[[-20.0, 10] for _ in row] for row in chosen],
        "margin": margin,
        "ordinary_margin": [[-1.0, -1.0], [-1.0, -1.0]],
        "layers": {
            "-1": {name: [0.5, 0.7] for name in ("explained_variance", "explained_variance_centred", "min_cosine")}
        },
        "verdicts": {"refusal": [[0, 1], [0, -1]]},
        "refused": {"refusal": [[1.0, 0.0], [0.0, None]]},  # one answer is safe and does not decline
        "ordinary_refused": {"refusal": [[0.0, 1.0], [0.0, None]]},
        "fit_seconds": 1.0,
        "seconds": 1.0,
        "environment": {"device": "a CPU", "threads": 1, "torch": "2", "transformers": "5", "commit": "c"},
    }


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Two cells with two seeds, written by hand."""
    contents = {
        "base/untrained": measured([[-20, -20], [-20, -20]], [[-1, -1], [-1, -1]]),
        "dpo/seed-1": measured([[-18, -21], [-16, -21]], [[1, -1], [1, 1]]),
        "dpo/seed-2": measured([[-18, -21], [-16, -21]], [[1, -1], [1, 1]]),
        "dpo-mlc/seed-1": measured([[-15, -18], [-13, -18.5]], [[1, -1], [1, 1]]),
        "dpo-mlc/seed-2": measured([[-15, -18], [-13, -18.5]], [[1, -1], [1, 1]]),
    }
    for place, content in contents.items():
        folder = tmp_path / "cells" / place
        folder.mkdir(parents=True)
        (folder / "measured.json").write_text(json.dumps(content))
    write_grid(tmp_path / GRID, seeds=[1, 2])
    (tmp_path / ROWS).write_text(json.dumps({"train": 5, "heldout": 2, "too long": 1}))
    return tmp_path


def test_figures_are_those_counted_by_hand(study: Path) -> None:
    results = collect(read_grid(study / GRID), study)
    levels = {(f["cell"], f["measure"], f["scope"]): f["value"] for f in results["figures"]}
    assert levels["base", "reward accuracy", "mean"] == 0.5  # ties with itself
    assert levels["dpo", "reward accuracy", "en"] == 1.0
    assert levels["dpo", "reward accuracy", "sw"] == 0.0
    assert levels["dpo", "reward accuracy", "worst"] == 0.0
    assert levels["dpo", "reward margin", "en"] == 3.0  # (2 + 4) / 2
    assert levels["dpo", "reward margin", "mean"] == 1.0  # (3 - 1) / 2
    assert levels["dpo", "NLL of chosen responses", "mean"] == pytest.approx(1.7)  # only in English
    assert levels["dpo", "refusal margin", "sw"] == 0.0
    assert levels["dpo", "explained variance, last layer", "mean"] == pytest.approx(0.6)
    assert levels["dpo", "invalid, judged by refusal", "mean"] == 0.0
    assert levels["dpo", "safe, judged by refusal", "mean"] == 0.5  # all in English, and none of the one in Swahili
    assert levels["dpo", "harmful prompts declined, judged by refusal", "en"] == 0.5
    assert levels["dpo", "ordinary prompts declined, judged by refusal", "sw"] == 1.0
    assert levels["dpo", "agreement (PAG) of margins", "all"] == 0.5  # of the second prompt only
    # Safe: 2 of 2 in English, 0 of 1 in Swahili. Only the first prompt has two verdicts, which differ.
    assert levels["dpo", "variance of safe, judged by refusal", "all"] == pytest.approx(100 * 0.25)
    assert levels["dpo", "agreement (PAG) of verdicts, judged by refusal", "all"] == 0.0
    changes = {(f["cell"], f["against"], f["measure"], f["scope"]): f for f in results["differences"]}
    change = changes["dpo-mlc", "dpo", "reward margin", "mean"]
    # Per prompt 3 and (3 + 2.5) / 2. Seeds are alike, so t(1) times the standard error of two prompts.
    assert change["value"] == pytest.approx(2.875)
    assert change["high"] - change["value"] == pytest.approx(12.7062 * 0.125, rel=1e-4)
    assert change["by_seed"] == [2.875, 2.875]


def test_telling_apart_by_hand(study: Path, tmp_path: Path) -> None:
    """Six harmful and seven ordinary prompts; in Swahili five are left of the latter, which are too few."""
    harmful = [[float(i), 0.0] for i in range(6)] + [[99.0, 99.0]]  # the last one is an ordinary row
    ordinary = [[float(i) - 2.5, 0.0 if i < 5 else None] for i in range(7)]
    content = measured([[-18, -21], [-16, -21]], harmful) | {
        "ordinary_margin": ordinary,
        "refused": {"refusal": [[float(i < 3), 1.0] for i in range(6)] + [[1.0, 1.0]]},
        "is_ordinary": [False] * 6 + [True],
        "ordinary_refused": {"refusal": [[float(i < 1), 1.0] for i in range(7)]},
    }
    for place in (study / "cells").rglob("measured.json"):
        place.write_text(json.dumps(content))
    grid = read_grid(study / GRID)
    figures = {(f["cell"], f["measure"], f["scope"]): f for f in collect(grid, study)["figures"]}
    pairs = [(first, second[0]) for first, _ in harmful[:6] for second in ordinary]
    area = figures["dpo", "told apart by margin", "en"]
    assert area["value"] == pytest.approx(sum(first > second for first, second in pairs) / 42)
    assert 0 <= area["low"] < area["value"] < area["high"] <= 1
    assert area["prompts"] == 14
    assert figures["dpo", "told apart by margin", "mean"]["value"] == area["value"]
    assert ("dpo", "told apart by margin", "sw") not in figures
    declines = "told apart by declines, judged by refusal"
    assert figures["dpo", declines, "en"]["value"] == pytest.approx(3 / 6 - 1 / 7, abs=1e-6)
    refused_alike = figures["dpo", declines, "sw"]
    assert (refused_alike["value"], refused_alike["low"], refused_alike["high"]) == (0, None, None)
    page = tmp_path / "page.md"
    page.write_text("<!-- study tiny: begin -->\n<!-- study tiny: end -->\n")
    write_report(study, page)
    text = page.read_text()
    assert "How well the model tells harmful prompts from ordinary ones" in text
    assert re.search(r"### The model before training\n\n.*\n.*\n\| en \|", text)
    assert "| sw | 2.5" not in text  # too few ordinary prompts to compare
    assert "| `dpo` | 50 / 14 | 100 / 100 |" in text


def test_the_page_says_noise_where_an_interval_includes_0(study: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- study tiny: begin -->\nnot measured yet\n<!-- study tiny: end -->\nafter\n")
    write_report(study, page)
    text = page.read_text()
    rows = {
        line.split("|")[1].strip(): line.split("|")[2].strip() for line in text.splitlines() if line.startswith("|")
    }
    assert rows["reward margin (nats)"] == "**+2.88** [1.29, 4.46] better"
    assert rows["refusal margin (nats per token)"] == "+0 [0, 0] within noise"
    assert "`dpo`" in rows
    assert "not measured yet" not in text
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "2 held out, 1 left out as too long" in text
    for measure in ("reward", "refusal"):
        assert (tmp_path / "images" / f"study_tiny_1_{measure}.png").stat().st_size > 1000
    assert (tmp_path / "images" / "study_tiny_declined_refusal.png").stat().st_size > 1000
    assert "](images/study_tiny_declined_refusal.png)" in text
    write_report(study, page)
    assert page.read_text() == text  # writing again changes nothing


def test_the_picture_has_the_cells_that_the_grid_names(study: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    heights = []
    for pictured in ([], ["dpo-mlc", "base"]):
        write_grid(study / GRID, seeds=[1, 2], pictured=pictured)
        page.write_text("<!-- study tiny: begin --><!-- study tiny: end -->")
        write_report(study, page)
        heights.append(imread(tmp_path / "images" / "study_tiny_declined_refusal.png").shape[0])
    assert heights[1] < heights[0]  # two rows instead of three


def test_what_is_missing_is_said(study: Path, tmp_path: Path) -> None:
    (study / "cells" / "dpo-mlc" / "seed-2" / "measured.json").unlink()
    page = tmp_path / "page.md"
    page.write_text("<!-- study tiny: begin --><!-- study tiny: end -->")
    write_report(study, page)
    assert "Not measured yet: `dpo-mlc` (seed 2)." in page.read_text()
    page.write_text("no place")
    with pytest.raises(UserError, match="has no marks for the study"):
        write_report(study, page)
