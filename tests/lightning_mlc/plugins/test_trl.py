"""``add_mlc`` on the trainers of TRL: each with the loss, without it, and divided into micro-batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SGD_ARGUMENTS, example_rows, labelled_rows, save_model, write_jsonl
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, Trainer

from lightning_mlc.plugins import add_mlc, mlc_dataset

trl = pytest.importorskip("trl")

ROWS = example_rows(8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def trainer_of(name: str, folder: Path, out: Path, **options: Any) -> Trainer:
    """A trainer of TRL on its own kind of data, all from files of ours."""
    rows = {"SFT": example_rows(8, pairs=False), "KTO": labelled_rows(8)}.get(name, ROWS)
    data = mlc_dataset(write_jsonl(out / f"{name}.jsonl", rows))
    source, peft = trl, {}
    if name in ("ORPO", "CPO"):
        import importlib

        source = importlib.import_module(f"trl.experimental.{name.lower()}")
    if "peft_config" in options:
        peft = {"peft_config": options.pop("peft_config")}
    defaults: dict[str, Any] = {
        "output_dir": str(out / "run"),
        **SGD_ARGUMENTS,
        "per_device_train_batch_size": 4,
        "bf16": False,
        "max_length": 256,
    }
    if name in ("GRPO", "RLOO"):
        del defaults["max_length"]
        defaults |= {"num_generations": 2, "max_completion_length": 4, "temperature": 1.0}
    args = getattr(source, f"{name}Config")(**{**defaults, **options})
    keywords: dict[str, Any] = {"args": args, "train_dataset": data, **peft}
    keywords["processing_class"] = AutoTokenizer.from_pretrained(folder)
    if name in ("GRPO", "RLOO"):
        keywords["reward_funcs"] = lambda completions, **_: [float(len(str(found))) for found in completions]
    torch.manual_seed(0)
    kind: Any = AutoModelForSequenceClassification if name == "Reward" else AutoModelForCausalLM
    model = kind.from_pretrained(folder, **({"num_labels": 1} if name == "Reward" else {}))
    found: Trainer = getattr(source, f"{name}Trainer")(model=model, **keywords)
    return found


def run(name: str, folder: Path, out: Path, mlc: dict[str, Any] | None, **options: Any) -> tuple[Tensor, list[Any]]:
    """Weights after two steps, and the logs."""
    out.mkdir(exist_ok=True)
    trainer = trainer_of(name, folder, out, **options)
    if mlc is not None:
        prompts = [row["prompt"] for row in ROWS]
        add_mlc(trainer, prompts, **{"weight": 10.0, "extractor_dim": 16, "prompts_per_step": 4, **mlc})
    trainer.train()
    weights = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    return weights, [logs for logs in trainer.state.log_history if "loss" in logs]


TRAINERS = ["DPO", "SFT", "KTO", "ORPO", "CPO", "Reward"]


@pytest.mark.parametrize("name", [*TRAINERS, "GRPO", "RLOO"])
def test_every_trainer_takes_the_loss(name: str, folder: Path, tmp_path: Path) -> None:
    plain, _ = run(name, folder, tmp_path, None)
    off, logs = run(name, folder, tmp_path, {"weight": 0.0})
    assert torch.equal(off, plain)
    assert not any("mlc/loss" in found for found in logs)
    weights, logs = run(name, folder, tmp_path, {})
    assert (weights - plain).abs().max() > 1e-4
    assert all({"mlc/loss", "mlc/excess", "mlc/min_cosine"} <= found.keys() for found in logs)
    assert len(logs) == 2
    assert logs[-1]["mlc/excess"] < logs[0]["mlc/excess"]


@pytest.mark.parametrize(
    ("name", "options", "most"),
    [
        ("DPO", {}, 1e-6),
        ("SFT", {}, 1e-6),
        ("CPO", {"loss_type": "simpo"}, 1e-6),
        ("Reward", {}, 1e-6),
        # Its own loss is a mean over the tokens of a micro-batch: 2e-4 without MLC, too.
        ("ORPO", {}, 5e-4),
    ],
)
@pytest.mark.parametrize(("batch", "accumulation"), [(2, 2), (1, 4)])
def test_batch_and_accumulation_give_the_same(
    name: str, options: Any, most: float, batch: int, accumulation: int, folder: Path, tmp_path: Path
) -> None:
    whole, logs = run(name, folder, tmp_path, {}, **options)
    small = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    divided, same = run(name, folder, tmp_path, {}, **options, **small)
    torch.testing.assert_close(divided, whole, rtol=0, atol=most)
    assert [found["mlc/loss"] for found in same] == pytest.approx([found["mlc/loss"] for found in logs], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SFT", {"packing": True}),
        ("SFT", {"padding_free": True, "max_length": None}),
        ("DPO", {"precompute_ref_log_probs": True}),
        ("DPO", {"gradient_checkpointing": True}),
        ("DPO", {"loss_type": ["sigmoid", "sft"]}),
    ],
)
def test_options_of_the_trainers(name: str, options: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    plain, _ = run(name, folder, tmp_path, None, **options)
    weights, logs = run(name, folder, tmp_path, {}, **options)
    assert (weights - plain).abs().max() > 1e-4
    assert "mlc/excess" in logs[0]


def test_adapters(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def once(mlc: dict[str, Any] | None) -> tuple[Tensor, list[Any]]:
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        return run("DPO", folder, tmp_path, mlc, peft_config=config, max_steps=4)

    plain, _ = once(None)
    weights, logs = once({})
    assert (weights - plain).abs().max() > 1e-4
    assert logs[-1]["mlc/excess"] < logs[0]["mlc/excess"]


def test_the_progress_of_a_step_has_the_total_loss(folder: Path, tmp_path: Path) -> None:
    _, without = run("DPO", folder, tmp_path, None, max_steps=1)
    _, logs = run("DPO", folder, tmp_path, {}, max_steps=1)
    assert logs[0]["loss"] == pytest.approx(without[0]["loss"] + 10 * logs[0]["mlc/loss"], rel=1e-5)
    assert logs[0]["rewards/margins"] == without[0]["rewards/margins"]
