"""Layers split over two processes, or over pairs of four: losses, weights, checkpoints and exports as on one process.

Everything runs through the real command, over gloo on the CPU. The model has biases, grouped heads, and dropout on
whole hidden states, which must be the same on all processes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONFIGS, SIZES, columns, example_rows, save_model, write_jsonl
from processes import Ended, Job, run_jobs
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoConfig, AutoModelForCausalLM, Phi3Config, PreTrainedConfig, Qwen3Config, Starcoder2Config

from lightning_mlc.checkpoints.format import read_checkpoint
from lightning_mlc.cli import main
from lightning_mlc.distributed.tensor_parallel import OPTION, plan_of, split
from lightning_mlc.errors import UserError

pytestmark = pytest.mark.xdist_group("processes")

TWO = ("--config=strategy/fsdp2", f"--{OPTION}=2")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """12 rows to train on, 4 in a step, with prompts in one to three languages."""
    folder = tmp_path_factory.mktemp("inputs")
    rows = example_rows(16)
    for number, row in enumerate(rows):
        row["chosen"] += " Really." * (number % 5)
        for language in ("sw", "zh")[: number % 3]:
            row["prompt"].pop(language)
    return save_split_model(folder / "model", dropout=0.1), write_jsonl(folder / "pairs.jsonl", rows)


def save_split_model(folder: Path, dropout: float) -> Path:
    save_model(folder)  # for its tokenizer
    given = AutoConfig.from_pretrained(folder)
    config = Starcoder2Config(
        **SIZES,
        num_key_value_heads=2,
        residual_dropout=dropout,
        embedding_dropout=dropout,
        **{name: getattr(given, name) for name in ("vocab_size", "eos_token_id", "pad_token_id", "bos_token_id")},
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def fit(inputs: tuple[Path, Path], out: Path, *more: str, **changes: Any) -> list[str]:
    """Three steps of four micro-batches of one example, which have the same layout on one process and on several."""
    options: dict[str, Any] = {
        "out": out,
        "model.name_or_path": inputs[0],
        "model.objective": "Sum",
        "model.objective.objectives": '[{"class_path": "DPO"}, {"class_path": "KTO", "init_args": {"beta": 1}}]',
        "model.optimizer": "AdamW",
        "model.optimizer.lr": 1e-2,
        "model.optimizer.eps": 1e-3,  # otherwise the signs of gradients near 0 decide
        "model.consistency.layer": 1,
        "model.consistency.center": "true",
        "model.consistency.self_distillation.weight": 1,
        "model.consistency.self_distillation.positions": 3,
        "model.consistency.retain.weight": 5,
        "model.consistency.retain.distance": "kl",
        "model.consistency.retain.rows": "all",
        "model.gradient_checkpointing": "true",
        "model.reference.update_every_n_steps": 2,
        "data.train_path": inputs[1],
        "data.val_share": 0.25,
        "data.batch_size": 1,
        "data.cache_dir": out.parent / "cache",
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.accumulate_grad_batches": 4,
        "trainer.gradient_clip_val": 0.3,
        "trainer.max_steps": 3,
        "trainer.precision": "32-true",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        **{name.replace("__", "."): value for name, value in changes.items()},
    }
    return ["fit", *more, *(f"--{name}={value}" for name, value in options.items())]


def evaluation(kind: str, fit: list[str], *more: str) -> list[str]:
    return [kind, *(word for word in fit[1:] if "max_steps" not in word), *more]


def split_run(inputs: tuple[Path, Path], out: Path, *more: str, processes: int = 2, **changes: Any) -> Job:
    return Job(fit(inputs, out, *TWO, *more, trainer__devices=processes, **changes), processes)


def run(jobs: dict[str, Job], scratch: Path) -> dict[str, Ended]:
    ended = dict(zip(jobs, run_jobs(list(jobs.values()), scratch), strict=True))
    for name, end in ended.items():
        assert name.startswith("refused") or end.status == 0, (name, end)
    return ended


def told(ended: Ended, start: str) -> list[str]:
    """The lines with this ``start`` that any process wrote."""
    return [line for text in ended.stderr for line in text.splitlines() if line.startswith(start)]


def last(out: Path) -> Path:
    return out / "checkpoints" / "last.ckpt"


def halves(out: Path, step: int) -> str:
    return f"--ckpt_path={out}/checkpoints/step={step}.ckpt"


def weights(out: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = read_checkpoint(last(out))["state_dict"]
    return state


def assert_close(out: Path, expected: Path, logged: bool = True) -> None:
    """Every loss and metric of each step, and weights and optimizer state in the end."""
    found, right = read_checkpoint(last(out)), read_checkpoint(last(expected))
    pairs = [(found["state_dict"], right["state_dict"])]
    states = [checkpoint["optimizer_states"][0]["state"] for checkpoint in (found, right)]
    assert states[0].keys() == states[1].keys()
    pairs += [(states[0][index], states[1][index]) for index in states[1]]
    if logged:
        values = [{k: torch.tensor(v) for k, v in columns(folder).items()} for folder in (out, expected)]
        assert len(values[1]["train/loss"]) >= 2
        pairs.append((values[0], values[1]))
    for mine, theirs in pairs:
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            # The order of float32 sums differs, and the updates carry this on.
            torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=2e-5, msg=lambda told, name=name: name + told)


# ---- two processes ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ended(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Ended]]:
    root = tmp_path_factory.mktemp("outs")
    quick = {"trainer__limit_val_batches": 0, "checkpoint__save_top_k": -1, "checkpoint__every_n_train_steps": 1}
    two = split_run(inputs, root / "two")
    file = {"trainer__strategy__sharded_checkpoints": "false"}
    precomputed = {
        "model__reference__mode": "precomputed",
        "model__reference__update_every_n_steps": "null",
        "model__consistency__retain__weight": 0,  # scores hold no distributions
    }
    jobs = {
        "one": Job(fit(inputs, root / "one", checkpoint__save_top_k=-1, checkpoint__every_n_train_steps=1), 1),
        "two": two,
        "half": split_run(inputs, root / "half", **quick, trainer__max_steps=2),
        "half, gone on with": split_run(inputs, root / "half", "--ckpt_path=last", **quick),
        "half, by one": Job(fit(inputs, root / "by-one", halves(root / "half", 2), **quick), 1),
        "one, gone on with": split_run(inputs, root / "back", halves(root / "one", 2), **quick, **file),
        "scores": split_run(inputs, root / "scores", **quick, **precomputed, trainer__max_steps=1),
        "predicted": Job(evaluation("predict", two.command, f"--ckpt_path={last(root / 'two')}"), 2),
        "predicted by one": Job(
            evaluation("predict", fit(inputs, root / "by-one"), f"--ckpt_path={last(root / 'two')}"), 1
        ),
        "refused, adapters": split_run(inputs, root / "refused", "--config=lora"),
        "refused, no plan": split_run(
            (save_model(root / "gpt2", "gpt2"), inputs[1]), root / "refused", model__consistency__layer=-1
        ),
    }
    return root, run(jobs, root / "jobs")


@pytest.mark.slow
def test_split_layers_change_nothing(ended: tuple[Path, dict[str, Ended]]) -> None:
    root, _ = ended
    assert_close(root / "two", root / "one")
    assert columns(root / "one")["train/kl"][-1] > 0.002  # far above the tolerance, so the reference makes a difference


@pytest.mark.slow
def test_a_run_goes_on_bitwise_and_elsewhere(ended: tuple[Path, dict[str, Ended]]) -> None:
    """The run is stopped after two of three steps, or stopped on another layout."""
    root, _ = ended
    found, expected = weights(root / "half"), weights(root / "two")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert_close(root / "by-one", root / "one", logged=False)
    assert last(root / "back").is_file()
    assert_close(root / "back", root / "one", logged=False)


@pytest.mark.slow
def test_one_process_tells_that_layouts_differ(ended: tuple[Path, dict[str, Ended]]) -> None:
    _, jobs = ended
    [line] = told(jobs["half, by one"], "ckpt_path: ")
    assert (
        "1 process (SingleDevice) instead of 2 processes (FSDP2, tensor parallel 2): the steps have the same examples"
        in line
    )
    assert told(jobs["half, gone on with"], "ckpt_path: ") == []


@pytest.mark.slow
def test_export_is_what_was_trained(ended: tuple[Path, dict[str, Ended]], tmp_path: Path) -> None:
    """Bitwise equal to the result of PyTorch's own converter for the folder."""
    root, _ = ended
    assert main(["export", f"--ckpt_path={last(root / 'two')}", f"--out={tmp_path / 'model'}"]) == 0
    dcp_to_torch_save(last(root / "two").resolve(), tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    for name, value in AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict().items():
        assert torch.equal(value, whole[f"state_dict/policy.model.{name}"]), name


@pytest.mark.slow
def test_scores_and_responses_are_those_of_one(ended: tuple[Path, dict[str, Ended]]) -> None:
    """Scores are computed before training and looked up; responses are written once."""
    root, _ = ended
    found, expected = columns(root / "scores"), columns(root / "one")
    for name in ("train/objective/loss", "train/rewards/margins", "train/kl"):
        assert found[name][0] == pytest.approx(expected[name][0], rel=1e-4, abs=1e-6), name
    [two] = [path for path in (root / "two").iterdir() if path.name.startswith("predictions")]
    assert records(two) == records(root / "by-one" / "predictions.jsonl")


def records(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("adapters", "layers with adapters cannot be split; set it to 1, or model.lora to null"),
        ("no plan", "transformers has no plan to split the layers of gpt2; set it to 1"),
    ],
)
def test_what_cannot_be_split_is_refused_in_one_line(
    ended: tuple[Path, dict[str, Ended]], name: str, reason: str
) -> None:
    root, jobs = ended
    end = jobs[f"refused, {name}"]
    assert (end.status, set(told(end, "error: "))) == (2, {f"error: {OPTION}: {reason}"})
    assert not list((root / "refused").glob("*"))


# ---- four processes -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_shares_of_two_processes_change_nothing(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    """Split and sharded weights: new ones, from a file, and from a folder that one process reads."""
    plain = (save_split_model(tmp_path / "model", dropout=0.0), inputs[1])  # each share would draw its own adapters
    each = {"checkpoint__save_top_k": -1, "checkpoint__every_n_train_steps": 1, "trainer__max_steps": 2}
    on_four = {"processes": 4, "trainer__accumulate_grad_batches": 2, **each}
    # KTO compares with a mean over the micro-batches of all shares.
    on_one = {"data__batch_size": 2, "trainer__accumulate_grad_batches": 2, **each}
    jobs = {
        "one": Job(fit(plain, tmp_path / "one", **on_one), 1),
        "four": split_run(plain, tmp_path / "four", **on_four),
        "file": split_run(plain, tmp_path / "file", halves(tmp_path / "one", 1), **on_four),
        "by one": Job(fit(plain, tmp_path / "by-one", halves(tmp_path / "four", 1), **on_one), 1),
    }
    run(jobs, tmp_path / "jobs")
    assert_close(tmp_path / "four", tmp_path / "one")
    for out in ("file", "by-one"):
        assert_close(tmp_path / out, tmp_path / "one", logged=False)


# ---- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            Qwen3Config(),
            r"more than pairs of linear layers, such as self_attn.q_norm \(replicated_with_grad_",
        ),
        (Phi3Config(), r"more than pairs of linear layers, such as self_attn.qkv_proj \(colwise_gather_output\)"),
        (
            CONFIGS["llama"](300),
            "4 does not divide the num_key_value_heads of llama, which is 2; give a number that does",
        ),
    ],
)
def test_plans_that_cannot_be_followed(config: PreTrainedConfig, reason: str) -> None:
    with pytest.raises(UserError, match=f"^{OPTION}: .*{reason}"):
        plan_of(config, 4)


def test_a_parameter_between_what_is_split_is_refused() -> None:
    """A norm of queries that the plan does not list would have a different gradient on each process."""
    layer = nn.ModuleDict({"attention": nn.ModuleDict({"q": nn.Linear(4, 4), "norm": nn.LayerNorm(2)})})
    with pytest.raises(UserError, match=r"ModuleDict has the parameter attention.norm.weight between the layers"):
        split(layer, {"attention.q": "colwise"}, mesh=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([f"--{OPTION}=0"], "0 does not divide the 1 processes; give a number that does"),
        ([f"--{OPTION}=2"], "2 does not divide the 1 processes; give a number that does"),
        (
            [f"--{OPTION}=2", "--trainer.strategy.cpu_offload=true"],
            "split weights have not been tested with cpu_offload",
        ),
    ],
)
def test_sizes_that_cannot_be(
    words: list[str], reason: str, inputs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*fit(inputs, tmp_path / "out", TWO[0]), *words]) == 2
    [error] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert error.startswith(f"error: {OPTION}: {reason}")


def test_memory_of_split_layers_is_not_estimated(
    inputs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"--model.name_or_path={inputs[0]}", f"--data.train_path={inputs[1]}", f"--out={tmp_path / 'out'}"]
    assert main(["estimate", *TWO, "--trainer.devices=2", *words]) == 2
    assert f"error: {OPTION}: the memory of split layers cannot be estimated" in capsys.readouterr().err
