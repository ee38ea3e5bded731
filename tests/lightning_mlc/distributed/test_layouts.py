"""One process or two, data parallel or sharded: the same losses, weights, checkpoints and exports.

Everything runs through the real command. Two processes use gloo, on the CPU.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import columns, example_rows, save_model, write_jsonl
from processes import run_on_two
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import AutoModelForCausalLM

from lightning_mlc.checkpoints.format import read_checkpoint
from lightning_mlc.cli import main

pytestmark = pytest.mark.xdist_group("processes")

FSDP2 = "--config=strategy/fsdp2"
SHARD = "trainer.strategy"

# The runs cover all that can go wrong when processes share a model: passes that end at a layer, layers that run again
# in the backward pass, a reference that follows the policy, clipped gradients, logits at first positions, of which a
# process may have none; adapters, accumulation, steps without terms; KTO's divergence, which is a mean over all
# processes; scores of a reference, computed before training.
RUNS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "weights": (
        [],
        {
            "model.objective": "Sum",
            "model.objective.objectives": '[{"class_path": "DPO"}, {"class_path": "KTO", "init_args": {"beta": 1}}]',
            "model.optimizer": "SGD",
            "model.optimizer.lr": 1.0,
            "model.consistency.layer": 1,
            "model.consistency.center": "true",
            "model.consistency.self_distillation.weight": 10,
            "model.consistency.self_distillation.positions": 3,
            "model.consistency.retain.weight": 5,
            "model.consistency.retain.distance": "kl",
            "model.consistency.retain.rows": "all",
            "model.gradient_checkpointing": "true",
            "model.reference.update_every_n_steps": 1,
            "trainer.gradient_clip_val": 0.3,
        },
    ),
    "scores": ([], {"model.optimizer": "SGD", "model.optimizer.lr": 0.1}),
    "adapters": (
        ["--config=lora"],
        {
            "model.optimizer": "AdamW",
            "model.optimizer.lr": 1e-2,
            "model.consistency.every_n_steps": 2,
            "trainer.accumulate_grad_batches": 2,
            "data.batch_size": 2,
            "data.val_share": 0.2,  # 12 rows to train on: in a last step of 3, two processes would drop one
        },
    ),
}


def command(name: str, out: Path, inputs: tuple[Path, Path], processes: int, *more: str, **changes: Any) -> list[str]:
    configs, options = RUNS[name]
    settings: dict[str, Any] = {
        "out": out,
        "model.name_or_path": inputs[0],
        "data.train_path": inputs[1],
        "data.val_share": 0.25,
        "data.cache_dir": out.parent / "cache",
        "data.batch_size": 4,
        "trainer.accelerator": "cpu",
        "trainer.devices": processes,
        "trainer.precision": "32-true",
        "trainer.max_steps": 3,
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        **options,
        **changes,
    }
    settings["data.batch_size"] //= processes
    return ["fit", *configs, *more, *(f"--{key}={value}" for key, value in settings.items())]


def evaluation(kind: str, fit: list[str], *more: str) -> list[str]:
    return [kind, *(word for word in fit[1:] if "max_steps" not in word), *more]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with tied embeddings, and rows of which some lack a translation. 11 are for training, in steps of 4, 4
    and 3."""
    folder = tmp_path_factory.mktemp("inputs")
    rows = example_rows(15)
    for number, row in enumerate(rows):
        row["chosen"] += " Really." * (number % 5)
        # In most micro-batches, one process has no prompt to run, and the other has some.
        if number % 3:
            row["prompt"] = {"en": row["prompt"]["en"]}
    return save_model(folder / "model"), write_jsonl(folder / "pairs.jsonl", rows)


@pytest.fixture(scope="module")
def outs(inputs: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs, each in its own folder: first those of one process, then those of two."""
    root = tmp_path_factory.mktemp("outs")
    quick = {"trainer.limit_val_batches": 0}
    on_one = [command(name, root / f"{name}-one", inputs, 1) for name in RUNS]
    on_one.append(command("weights", root / "half-one", inputs, 1, **quick, **{"trainer.max_steps": 1}))
    for words in on_one:
        assert main(words) == 0

    halves = [
        command(
            "weights", root / "half", inputs, 2, FSDP2, **quick, **{"trainer.max_steps": 1, "checkpoint.save_top_k": -1}
        ),
        command("adapters", root / "half-adapters", inputs, 2, FSDP2, **quick, **{"trainer.max_steps": 2}),
    ]
    sharded = command("weights", root / "weights-fsdp2", inputs, 2, FSDP2)
    clip = {
        "model.consistency.mlc.weight": 0,
        "model.reference.update_every_n_steps": "null",
        "trainer.gradient_clip_val": 0.01,
        "trainer.max_steps": 1,
    } | quick
    run_on_two(
        [
            sharded,
            evaluation(
                "predict",
                sharded,
                f"--ckpt_path={root}/weights-fsdp2/checkpoints/last.ckpt",
                "--model.max_new_tokens=4",
            ),
            command("adapters", root / "adapters-fsdp2", inputs, 2, FSDP2),
            command("weights", root / "weights-ddp", inputs, 2, **{SHARD: "ddp"}),
            command("adapters", root / "adapters-ddp", inputs, 2, **{SHARD: "ddp"}),
            command(
                "weights",
                root / "weights-other",
                inputs,
                2,
                FSDP2,
                **{
                    f"{SHARD}.reshard_after_forward": "false",
                    f"{SHARD}.cpu_offload": "true",
                    f"{SHARD}.sharded_checkpoints": "false",
                },
            ),
            command("scores", root / "scores-fsdp2", inputs, 2, FSDP2, **{"model.reference.mode": "precomputed"}),
            command("weights", root / "clipped", inputs, 2, FSDP2, **clip),
            *halves,
            *([*half, "--trainer.max_steps=3", "--ckpt_path=last"] for half in halves),
            command("weights", root / "half-one", inputs, 2, FSDP2, "--ckpt_path=last", **quick),
        ],
        root,
    )
    return root


def close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # The order of float32 sums differs, and the updates carry this on.
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-5, msg=name)


def last(out: Path) -> Path:
    return out / "checkpoints" / "last.ckpt"


def weights(out: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = read_checkpoint(last(out))["state_dict"]
    return state


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run", "one"),
    [
        ("weights-ddp", "weights-one"),
        ("weights-fsdp2", "weights-one"),
        ("weights-other", "weights-one"),
        ("scores-fsdp2", "scores-one"),
        ("adapters-ddp", "adapters-one"),
        ("adapters-fsdp2", "adapters-one"),
        ("half", "weights-one"),
        ("half-adapters", "adapters-one"),
        ("half-one", "weights-one"),
    ],
)
def test_layout_changes_nothing(outs: Path, run: str, one: str) -> None:
    """Losses, metrics and validation in every step, and weights and optimizer state in the end."""
    expected, found = columns(outs / one), columns(outs / run)
    if "half" in run:  # this run has no validation
        expected, found = ({k: v for k, v in c.items() if k.startswith("train/")} for c in (expected, found))
    close({k: torch.tensor(v) for k, v in found.items()}, {k: torch.tensor(v) for k, v in expected.items()})
    assert len(expected["train/loss"]) == 3
    assert one != "weights-one" or expected["train/kl"][-1] > 0.05  # otherwise the test could not fail
    close(weights(outs / run), weights(outs / one))
    states = [read_checkpoint(last(outs / name))["optimizer_states"][0] for name in (run, one)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert states[0]["state"].keys() == states[1]["state"].keys()
    for index, values in states[1]["state"].items():
        close(states[0]["state"][index], values)


@pytest.mark.slow
def test_gradients_are_clipped_by_the_norm_over_all_processes(outs: Path, inputs: tuple[Path, Path]) -> None:
    """One step of plain SGD with learning rate 1: the change of the weights is the gradient, with the requested
    norm."""
    before = AutoModelForCausalLM.from_pretrained(inputs[0]).state_dict()
    after = {key.removeprefix("policy.model."): value for key, value in weights(outs / "clipped").items()}
    moved = {key: after[key] - before[key] for key in before if key != "lm_head.weight"}  # it is the embedding
    norm = torch.cat([value.flatten() for value in moved.values()]).double().norm()
    # Weights of 1e-2 and more, rounded to float32, move by 1e-2 in total.
    assert float(norm) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.slow
def test_export_of_a_sharded_checkpoint_is_its_full_state(outs: Path, tmp_path: Path) -> None:
    """Bitwise equal to the result of PyTorch's own converter for the folder."""
    folder = last(outs / "weights-fsdp2")
    assert main(["export", f"--ckpt_path={folder}", f"--out={tmp_path / 'model'}"]) == 0
    dcp_to_torch_save(folder.resolve(), tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=True)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    for name, value in exported.items():
        assert torch.equal(value, whole[f"state_dict/policy.model.{name}"]), name
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert trained.dtype == torch.float32


@pytest.mark.slow
def test_one_process_goes_on_with_a_sharded_checkpoint(outs: Path, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    half = tmp_path / "out"
    shutil.copytree(outs / "half", half, symlinks=True)
    (half / "checkpoints" / "last.ckpt").unlink()
    shutil.rmtree(half / "checkpoints" / "step=3.ckpt")
    assert main(command("weights", half, inputs, 1, "--ckpt_path=last")) == 0
    close(weights(half), weights(outs / "weights-one"))


@pytest.mark.slow
def test_sharded_models_respond_as_whole_ones(outs: Path, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    fit = command("weights", tmp_path / "out", inputs, 1)
    ckpt = f"--ckpt_path={last(outs / 'weights-fsdp2')}"
    assert main(evaluation("predict", fit, ckpt, "--model.max_new_tokens=4")) == 0
    one = records(tmp_path / "out" / "predictions.jsonl")
    two = [record for rank in (0, 1) for record in records(outs / "weights-fsdp2" / f"predictions.rank{rank}.jsonl")]
    assert sorted(tuple(record.values()) for record in two) == sorted(tuple(record.values()) for record in one)


def records(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
