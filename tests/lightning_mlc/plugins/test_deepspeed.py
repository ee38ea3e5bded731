"""The order of calls on an engine of DeepSpeed, which accelerate's own wrapper makes.

The engine is a stand-in, because DeepSpeed is not among the packages of the tests: it runs its model and notes the
calls. Whether DeepSpeed trains right with them is not tested.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import DistributedType
from accelerate.utils.deepspeed import DeepSpeedEngineWrapper
from conftest import byte_tokenizer, example_rows, save_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from lightning_mlc.errors import UserError
from lightning_mlc.plugins import add_mlc


class DeepSpeedEngine(nn.Module):
    """Has the name and the methods of DeepSpeed's engine that accelerate and the Trainer call."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.calls: list[str] = []
        self.losses: list[float] = []

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        self.calls.append("forward")
        return self.module(*arguments, **keywords)

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        self.calls.append("boundary" if is_boundary else "no boundary")

    def backward(self, loss: Tensor, scale_wrt_gas: bool = True) -> None:
        self.calls.append("scaled backward" if scale_wrt_gas else "backward")
        self.losses.append(loss.item())
        loss.backward()

    def step(self) -> None:
        self.calls.append("step")


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    """A trainer that believes DeepSpeed to be on."""
    tokenizer = byte_tokenizer()
    ids = tokenizer("No, that bag is not yours.")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "model"))
    made = Trainer(
        model,
        TrainingArguments(output_dir=str(tmp_path / "out"), report_to=[], use_cpu=True),
        train_dataset=[{"input_ids": ids, "labels": ids}] * 4,
        processing_class=tokenizer,
    )
    made.is_deepspeed_enabled = True
    # Of this accelerator only, because its state is that of all.
    made.accelerator.state = _State(made.accelerator.state)
    return made


class _State:
    def __init__(self, state: Any) -> None:
        self._state = state
        self.distributed_type = DistributedType.DEEPSPEED

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)


PROMPTS = [row["prompt"] for row in example_rows(6)]
PAIR = ["forward", "no boundary", "backward"]


@pytest.mark.parametrize("prompts_per_step", [1, 4])
def test_each_forward_has_its_backward(trainer: Trainer, prompts_per_step: int) -> None:
    """Two micro-batches of one step; DeepSpeed steps in the last backward pass only."""
    add_mlc(trainer, PROMPTS, extractor_dim=16, prompts_per_step=prompts_per_step)
    engine = DeepSpeedEngine(trainer.model)
    trainer.accelerator.deepspeed_engine_wrapped = DeepSpeedEngineWrapper(engine)
    trainer.current_gradient_accumulation_steps = 2
    batch = trainer.data_collator([trainer.train_dataset[0]])
    for last in (False, True):
        trainer.accelerator.gradient_state._set_sync_gradients(last)
        trainer.training_step(engine, dict(batch))
    assert engine.calls == [*PAIR, *PAIR, *PAIR, "forward", "boundary", "backward", "step"]
    # The loss of the translations is small, and that of random weights on 265 tokens is log 265, halved.
    objective = float(torch.tensor(len(byte_tokenizer())).log()) / 2
    assert engine.losses[1::2] == pytest.approx([objective] * 2, rel=0.05)
    assert all(loss < objective / 4 for loss in engine.losses[::2])
    assert max(engine.losses[::2]) > 0


def test_a_trained_extractor_is_refused(trainer: Trainer) -> None:
    kind = type(trainer)
    with pytest.raises(UserError, match="DeepSpeed do not support; use 'frozen'") as refused:
        add_mlc(trainer, PROMPTS, extractor="linear")
    assert refused.value.option == "extractor"
    assert "\n" not in str(refused.value)
    assert type(trainer) is kind
