"""``model.declined``: validation answers prompts, and logs the shares of harmful and of ordinary ones that decline."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import columns, save_model, write_jsonl
from datasets import Dataset
from lightning.pytorch.trainer.states import TrainerFn
from processes import run_on_two
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_mlc.checkpoints.finding import checkpoint_files
from lightning_mlc.checkpoints.format import read_checkpoint
from lightning_mlc.cli import main
from lightning_mlc.data.sampling import spread
from lightning_mlc.data.splits import to_answer
from lightning_mlc.training.declined import Declined

MARK = "Z"
DIMENSION = 20
"""The dimension of hidden states that shows whether the prompt has the mark."""
REFUSAL, ANSWER = "I can't", "So"


def refusing_model(folder: Path) -> Path:
    """Save a model that responds with ``REFUSAL`` to prompts with ``MARK``, and with ``ANSWER`` to others.

    All tokens attend equally to all before them, so the last one knows whether the mark is there. Each later token
    follows from the one before it.
    """
    save_model(folder, tie_word_embeddings=False)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return found

    [start], [end], [mark] = ids("<|assistant|>"), ids("<|end|>"), ids(MARK)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.zero_()
        embeddings, head = model.get_input_embeddings().weight, model.lm_head.weight
        embeddings[mark, DIMENSION] = 1
        attention = model.model.layers[0].self_attn
        attention.v_proj.weight[0, DIMENSION] = 1  # of the first head
        attention.o_proj.weight[DIMENSION, 0] = 1e4
        embeddings[start, 0] = 1e-3
        head[ids(ANSWER)[0], 0] = 1
        head[ids(REFUSAL)[0], DIMENSION] = 1
        chains = [*zip(ids(REFUSAL), [*ids(REFUSAL)[1:], end], strict=True)]
        chains += zip(ids(ANSWER), [*ids(ANSWER)[1:], end], strict=True)
        for place, (token, following) in enumerate(chains, start=1):
            embeddings[token, place] = 1
            head[following, place] = 1e6
    model.save_pretrained(folder)
    return folder


SHARES = {
    "harmful": {"en": 1.0, "sw": 0.5, "mean": 0.75, "worst": 0.5, "spread": 0.5},
    "ordinary": {"en": 0.0, "sw": 0.25, "mean": 0.125, "worst": 0.25, "spread": 0.25},
    "gap": {"en": 1.0, "sw": 0.25, "mean": 0.625, "worst": 0.25, "spread": 0.75},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model that refuses marked prompts, and rows of which it refuses ``SHARES``. Each prompt comes twice."""
    folder = tmp_path_factory.mktemp("inputs")
    rows: list[dict[str, Any]] = []
    for number in range(8):
        ordinary = number % 2 == 1
        swahili = number in (0, 4, 5)  # two of four harmful prompts, one of four ordinary ones
        prompt = {
            "en": f"bag {number} {'' if ordinary else MARK}",
            "sw": f"mfuko {number} {MARK if swahili else ''}",
        }
        row = {"kind": "ordinary" if ordinary else "harmful", "prompt": prompt, "chosen": "No.", "rejected": "Sure."}
        rows += [{"id": f"{number}", **row}, {"id": f"{number} again", **row, "chosen": "Not at all."}]
    return refusing_model(folder / "model"), write_jsonl(folder / "rows.jsonl", rows)


def command(name: str, inputs: tuple[Path, Path], out: Path, *more: str, **changes: Any) -> list[str]:
    options = {
        "out": out,
        "model.name_or_path": inputs[0],
        "model.optimizer": "SGD",
        "model.optimizer.lr": 0,
        "model.declined.prompts": 4,
        "data.train_path": inputs[1],
        "data.val_path": inputs[1],
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.max_steps": 2,
        "trainer.enable_progress_bar": "false",
        **changes,
    }
    return [name, *more, *(f"--{key}={value}" for key, value in options.items())]


def shares(out: Path) -> dict[str, list[float]]:
    found = columns(out)
    return {name.removeprefix("val/declined/"): found[name] for name in found if name.startswith("val/declined/")}


EXPECTED = {f"{kind}/{name}": value for kind, own in SHARES.items() for name, value in own.items()}


def test_shares_are_logged_before_training_and_at_every_validation(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    assert main(command("fit", inputs, tmp_path / "out")) == 0
    assert shares(tmp_path / "out") == {name: [value, value] for name, value in EXPECTED.items()}
    summary = json.loads((tmp_path / "out" / "report" / "summary.json").read_text())
    assert summary["before"]["val/declined/gap/mean"] == EXPECTED["gap/mean"]


def test_few_tokens_can_be_too_few_for_a_refusal(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    assert main(command("fit", inputs, tmp_path / "out", "--model.declined.max_new_tokens=3")) == 0
    assert set(shares(tmp_path / "out")["harmful/mean"]) == {0.0}


@pytest.mark.parametrize("name", ["validate", "test"])
def test_other_commands_show_the_same(
    name: str, inputs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"data.test_path": inputs[1]} if name == "test" else {}
    words = [word for word in command(name, inputs, tmp_path / "out", **more) if "max_steps" not in word]
    assert main(words) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["sw"]]
    assert line.split()[-2:] == ["50%", "25%"]


def test_a_run_ends_when_too_many_ordinary_prompts_are_declined(
    inputs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limit = ["--config=stop_early", "--trainer.val_check_interval=2", "--model.declined.prompts=4"]
    for name, threshold, steps in (("above", 0.1, 2), ("equal", 0.125, 6)):
        own = [*limit, f"--model.declined.max_ordinary={threshold}"]
        assert main(command("fit", inputs, tmp_path / name, *own, **{"trainer.max_steps": 6})) == 0
        summary = json.loads((tmp_path / name / "report" / "summary.json").read_text())
        assert summary["steps"] == steps
        kept = {path.name for path in checkpoint_files(tmp_path / name)}
        assert kept == {"last.ckpt", *(f"step={step}.ckpt" for step in range(2, steps + 1, 2))}
    told = "12.5% of ordinary prompts are declined"
    err = capsys.readouterr().err
    assert err.count(f"{told} before training, more than the limit (model.declined.max_ordinary: 10.0%)") == 1
    assert err.count(f"the run ends: {told} (model.declined.max_ordinary: 10.0%)") == 1


@pytest.mark.parametrize(
    ("more", "option", "text"),
    [
        (["--model.declined.prompts=0"], "model.declined.prompts", "must be at least 1, got 0"),
        (["--model.declined.max_new_tokens=0"], "model.declined.max_new_tokens", "must be at least 1, got 0"),
        (["--model.declined.max_ordinary=30"], "model.declined.max_ordinary", "from 0 to below 1, or null, got 30"),
        (["--data.val_path=OTHER"], "model.declined", "is of kind ordinary; add such rows"),
        (["--data.val_path=null", "--data.val_share=0"], "model.declined", "nothing is validated"),
        (["--trainer.limit_val_batches=0"], "model.declined", "nothing is validated"),
        (["--trainer.limit_val_batches=1"], "trainer.limit_val_batches", "some prompts of model.declined would not be"),
        (["--trainer.limit_val_batches=0.5"], "trainer.limit_val_batches", "is 0.5"),
        (
            ["--model.declined=null", "--checkpoint.monitor=val/declined/gap/mean"],
            "checkpoint.monitor",
            "val/declined/gap/mean is measured with model.declined only",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(
    more: list[str], option: str, text: str, inputs: tuple[Path, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    rows = [json.loads(line) for line in inputs[1].read_text().splitlines()]
    other = write_jsonl(tmp_path / "harmful.jsonl", [row for row in rows if row["kind"] == "harmful"])
    words = [*command("fit", inputs, tmp_path / "out"), *(word.replace("OTHER", str(other)) for word in more)]
    assert main(words) == 2
    [line] = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith(f"error: {option}: ")
    assert text in line
    assert not list((tmp_path / "out").glob("*"))


def test_prompts_of_each_kind_are_chosen_once_from_the_whole() -> None:
    """Rows 2 to 9 are to choose from: five harmful prompts, of which one comes twice, and two ordinary ones."""
    same_prompt = [0, 1, 2, 3, 3, 4, 5, 6, 7, 8]
    ordinary = [False, False, False, False, False, False, False, True, True, False]
    table = Dataset.from_dict({"same_prompt": same_prompt, "ordinary": ordinary})
    assert to_answer(table, range(2, 10), 3, "val") == [0, 5, 3, 6, 7]  # in turn


def test_places_are_spread() -> None:
    assert spread(np.arange(10, 21), 3) == [10, 15, 20]
    assert spread([4, 5], 8) == [4, 5]
    assert spread([4, 5, 6], 1) == [4]
    assert spread([], 3) == []
    assert spread([4, 5], 10**15) == [4, 5]


def test_a_mean_that_is_rounded_up_is_not_above_the_limit() -> None:
    trainer: Any = SimpleNamespace(
        state=SimpleNamespace(fn=TrainerFn.FITTING), sanity_checking=False, global_step=1, should_stop=False
    )
    for share, stops in ((0.1 + 0.2, False), (0.301, True)):
        Declined(max_ordinary=0.3).end_above({"val/declined/ordinary/mean": share}, trainer)
        assert trainer.should_stop is stops


def test_a_model_with_too_few_positions_is_told(
    inputs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_model(tmp_path / "gpt2", "gpt2", n_positions=256)
    assert main(command("fit", (model, inputs[1]), tmp_path / "out", "--model.declined.max_new_tokens=250")) == 2
    assert "exceed the 256 positions that GPT2LMHeadModel has learnt" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["link", "true"])
def test_the_latest_checkpoint_is_kept_where_an_earlier_one_is_the_best(
    kind: str, inputs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All gaps are equal, so the first checkpoint stays the best. A resumed run continues from the latest one."""
    more = [
        "--config=stop_early",
        "--trainer.val_check_interval=2",
        "--checkpoint.save_top_k=1",
        f"--checkpoint.save_last={kind}",
    ]
    out = tmp_path / "out"
    steps = {"trainer.max_steps": 5, "model.declined.max_ordinary": "null", "model.optimizer.lr": 1e-9}
    assert main(command("fit", inputs, out, *more, **steps)) == 0
    kept = {path.name: read_checkpoint(path)["global_step"] for path in checkpoint_files(out)}
    assert kept == {"step=2.ckpt": 2, "last.ckpt": 5}
    assert f"export --ckpt_path {out}/checkpoints/step=2.ckpt" in capsys.readouterr().out
    assert main(command("fit", inputs, out, *more, "--ckpt_path=last", **steps | {"trainer.max_steps": 7})) == 0
    kept = {path.name: read_checkpoint(path)["global_step"] for path in checkpoint_files(out)}
    assert kept == {"step=2.ckpt": 2, "last.ckpt": 7}


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("strategy", ["--trainer.strategy=ddp", "--config=strategy/fsdp2"])
def test_two_processes_log_and_keep_the_same(strategy: str, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """Batches of three prompts: one process has more than the other. The first checkpoint is the best."""
    out = tmp_path / "out"
    more = ["--config=stop_early", strategy, "--trainer.val_check_interval=2", "--checkpoint.save_top_k=1"]
    two = {
        "trainer.devices": 2,
        "data.val_batch_size": 3,
        "model.declined.max_ordinary": "null",
        "trainer.max_steps": 4,
    }
    run_on_two([command("fit", inputs, out, *more, **two)], tmp_path)
    assert shares(out) == {name: [value, value, value] for name, value in EXPECTED.items()}
    assert {path.name for path in checkpoint_files(out)} == {"step=2.ckpt", "last.ckpt"}
    assert not (out / "checkpoints" / "last.ckpt").is_symlink()
