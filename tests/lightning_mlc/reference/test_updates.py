"""A reference that follows the policy (TR-DPO)."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import columns, example_rows, write_jsonl
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from transformers import AutoModelForCausalLM

from lightning_mlc.cli import main
from lightning_mlc.commands.training import run
from lightning_mlc.consistency import MLC, Consistency
from lightning_mlc.data.datamodule import MultilingualData
from lightning_mlc.objectives import DPO
from lightning_mlc.reference import OnlineReference, ReferenceSettings
from lightning_mlc.training.module import AlignmentModule

NAME = "model.model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "pairs.jsonl", example_rows(12))


class Weights(Callback):
    """Records a weight of the policy after each optimizer step."""

    def __init__(self) -> None:
        self.policy: list[Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if trainer.global_step > len(self.policy):
            self.policy.append(pl_module.policy.state_dict()[NAME].clone())


def weight(reference: object) -> Tensor:
    assert isinstance(reference, OnlineReference)
    return reference.state_dict()[NAME]


def test_each_update_is_the_sum_that_the_paper_has(tiny_model: Path, data_file: Path) -> None:
    """With accumulation, so that optimizer steps differ from batches."""
    settings = ReferenceSettings(update_every_n_steps=2, update_share=0.25)
    module = AlignmentModule(
        str(tiny_model),
        DPO(),
        Consistency(mlc=MLC(weight=0.0)),
        settings,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.5),
    )
    kept = Weights()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=5,
        accumulate_grad_batches=2,
        callbacks=[kept],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, MultilingualData(str(data_file), val_share=0.0, batch_size=1, name_or_path=str(tiny_model)))
    assert len(kept.policy) == 5
    initial = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()[NAME.removeprefix("model.")]
    assert not torch.equal(kept.policy[1], initial)
    first = 0.25 * kept.policy[1] + 0.75 * initial
    expected = 0.25 * kept.policy[3] + 0.75 * first
    # float32: rounding of one product and one sum per update.
    torch.testing.assert_close(weight(module._reference), expected, rtol=1e-6, atol=1e-8)
    assert (weight(module._reference) - initial).abs().max() > 1e-5


def arguments(command: str, model: Path, file: Path, out: Path, *more: str) -> list[str]:
    options = {
        "out": out,
        "model.name_or_path": model,
        "model.optimizer": "SGD",
        "model.optimizer.lr": 0.1,
        "model.reference.update_every_n_steps": 2,
        "model.consistency.mlc.weight": 0,
        "data.train_path": file,
        "data.val_share": 0.25,
        "data.batch_size": 2,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
    }
    return [command, *(f"--{name}={value}" for name, value in options.items()), *more]


def test_a_reference_replaced_at_every_step_is_the_policy(tiny_model: Path, data_file: Path, tmp_path: Path) -> None:
    """So every step and every validation gives rewards of 0 and a loss of log 2, unless an old score is left over."""
    more = ["--model.reference.update_every_n_steps=1", "--model.reference.update_share=1", "--trainer.max_steps=8"]
    run(arguments("fit", tiny_model, data_file, tmp_path / "out", *more, "--trainer.val_check_interval=2"))
    logged = columns(tmp_path / "out")
    # float32: training without dropout, and the same rows in the same batches.
    assert logged["train/objective/loss"] == pytest.approx([math.log(2)] * 8, rel=1e-6)
    assert logged["train/rewards/margins"] == pytest.approx([0.0] * 8, abs=1e-6)
    assert len(logged["val/loss"]) >= 4
    assert logged["val/rewards/margins/worst"] == [0.0] * len(logged["val/loss"])
    assert logged["val/nll/en"][-1] != logged["val/nll/en"][0]


def test_a_resumed_run_is_the_whole_run(tiny_model: Path, data_file: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(arguments("fit", tiny_model, data_file, whole, "--trainer.max_steps=8"))
    # Stopped between two updates, when the reference is neither the initial model nor the policy.
    run(arguments("fit", tiny_model, data_file, parts, "--trainer.max_steps=3"))
    resumed = run(arguments("fit", tiny_model, data_file, parts, "--trainer.max_steps=8", "--ckpt_path=last"))
    after = [json.loads((out / "report" / "summary.json").read_text())["after"] for out in (whole, parts)]
    assert after[1] == after[0]
    checkpoints = [
        torch.load(out / "checkpoints" / "last.ckpt", weights_only=True)[OnlineReference.KEY] for out in (whole, parts)
    ]
    assert all(torch.equal(checkpoints[1][name], known) for name, known in checkpoints[0].items())
    assert torch.equal(weight(resumed.model._reference), checkpoints[1][NAME])
    measured = run(arguments("validate", tiny_model, data_file, parts, "--ckpt_path=last"))
    assert measured.model.validation_results == after[0]


def test_a_checkpoint_of_an_updating_step_has_the_update(tiny_model: Path, data_file: Path, tmp_path: Path) -> None:
    more = ["--trainer.max_steps=3", "--checkpoint.every_n_train_steps=2", "--checkpoint.save_top_k=-1"]
    run(arguments("fit", tiny_model, data_file, tmp_path / "out", *more))
    checkpoint = torch.load(tmp_path / "out" / "checkpoints" / "step=2.ckpt", weights_only=True)
    initial = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()[NAME.removeprefix("model.")]
    expected = 0.6 * checkpoint["state_dict"][f"policy.{NAME}"] + 0.4 * initial
    torch.testing.assert_close(checkpoint[OnlineReference.KEY][NAME], expected, rtol=1e-6, atol=1e-8)


def test_only_then_is_the_reference_in_the_checkpoint(tiny_model: Path, data_file: Path, tmp_path: Path) -> None:
    frozen = ["--model.reference.update_every_n_steps=null", "--trainer.max_steps=2"]
    run(arguments("fit", tiny_model, data_file, tmp_path / "frozen", *frozen))
    run(arguments("fit", tiny_model, data_file, tmp_path / "updated", "--trainer.max_steps=2"))
    checkpoints = {name: tmp_path / name / "checkpoints" / "last.ckpt" for name in ("frozen", "updated")}
    assert OnlineReference.KEY not in torch.load(checkpoints["frozen"], weights_only=True)
    # The export is the policy, with or without updates.
    assert main(["export", "--ckpt_path", str(checkpoints["updated"]), "--out", str(tmp_path / "hf")]) == 0
    policy = torch.load(checkpoints["updated"], weights_only=True)["state_dict"][f"policy.{NAME}"]
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()[NAME.removeprefix("model.")]
    assert torch.equal(exported, policy)


def test_a_reference_that_moved_is_not_dropped_silently(
    tiny_model: Path, data_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(arguments("fit", tiny_model, data_file, tmp_path / "out", "--trainer.max_steps=2"))
    frozen = ["--ckpt_path=last", "--model.reference.update_every_n_steps=null"]
    for mode in ("online", "precomputed"):
        options = [*frozen, f"--model.reference.mode={mode}"]
        assert main(arguments("validate", tiny_model, data_file, tmp_path / "out", *options)) == 2
        assert "trained with a reference that follows the policy" in capsys.readouterr().err
    # But where no reference is used, nothing is lost.
    options = [*frozen, "--model.objective=SimPO"]
    assert main(arguments("validate", tiny_model, data_file, tmp_path / "out", *options)) == 0


def test_updates_start_from_a_checkpoint_without_any(tiny_model: Path, data_file: Path, tmp_path: Path) -> None:
    """Its reference was the initial model, so updates start from that."""
    frozen = ["--model.reference.update_every_n_steps=null", "--trainer.max_steps=3"]
    run(arguments("fit", tiny_model, data_file, tmp_path / "out", *frozen))
    before = torch.load(tmp_path / "out" / "checkpoints" / "last.ckpt", weights_only=True)
    policy = copy.deepcopy(before["state_dict"][f"policy.{NAME}"])
    initial = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()[NAME.removeprefix("model.")]
    assert not torch.equal(policy, initial)
    resumed = run(
        arguments("fit", tiny_model, data_file, tmp_path / "out", "--trainer.max_steps=4", "--ckpt_path=last")
    )
    now = resumed.model.policy.state_dict()[NAME]
    torch.testing.assert_close(weight(resumed.model._reference), 0.6 * now + 0.4 * initial, rtol=1e-6, atol=1e-8)
