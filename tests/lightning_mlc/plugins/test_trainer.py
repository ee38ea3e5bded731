"""``add_mlc`` on the Trainer of transformers: nothing changes without the loss, and with it results do not depend on
how a step is divided, on interruptions, or on what the trainer does besides."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, save_model
from small_trainers import PROMPTS, add, arguments, trained, trainer_of, weights
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
)

from lightning_mlc.errors import UserError
from lightning_mlc.plugins import MLCRegularizer, MLCTrainerMixin, add_mlc

pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), attention_dropout=0.0)


@pytest.fixture(scope="module")
def plain(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """Weights after a run without the loss."""
    return trained(trainer_of(folder, tmp_path_factory.mktemp("out")))


def test_weight_0_is_the_trainer_without_the_loss(plain: Tensor, folder: Path, tmp_path: Path) -> None:
    trainer = add(trainer_of(folder, tmp_path), weight=0)
    assert torch.equal(trained(trainer), plain)
    assert not any(name.startswith("mlc/") for logs in trainer.state.log_history for name in logs)


def test_the_trainer_stays_what_it_was(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_of(folder, tmp_path)
    assert add(trainer) is trainer
    assert isinstance(trainer, Trainer)
    assert isinstance(trainer, MLCTrainerMixin)
    assert type(trainer).__name__ == "MLCTrainer"


def test_the_gradient_is_the_sum_of_both(plain: Tensor, folder: Path, tmp_path: Path) -> None:
    """One step of SGD, so that the weights show the gradient: the objective's, and that of a loop of one's own."""
    alone = trained(trainer_of(folder, tmp_path, max_steps=1))
    start = weights(trainer_of(folder, tmp_path))
    model = AutoModelForCausalLM.from_pretrained(folder)
    options: Any = {"weight": 10.0, "extractor_dim": 16, "prompts_per_step": 4, "seed": 7}
    MLCRegularizer(PROMPTS, AutoTokenizer.from_pretrained(folder), **options).loss(model.train(), 0).backward()
    gradient = torch.cat([torch.zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in model.parameters()])
    both = trained(add(trainer_of(folder, tmp_path, max_steps=1)))
    # Differences of weights of size 1: their last bit is 6e-8 to 1.2e-7.
    torch.testing.assert_close(both - start, (alone - start) - 0.1 * gradient, rtol=1e-4, atol=5e-7)
    assert (both - alone).abs().max() > 1e-3


@pytest.mark.parametrize(("batch", "accumulation"), [(2, 2), (1, 4)])
@pytest.mark.parametrize("extractor", ["frozen", "linear", "none"])
def test_batch_and_accumulation_give_the_same(
    batch: int, accumulation: int, extractor: str, folder: Path, tmp_path: Path
) -> None:
    whole = trained(add(trainer_of(folder, tmp_path), extractor=extractor))
    options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
    divided = trained(add(trainer_of(folder, tmp_path, **options), extractor=extractor))
    # Sums of float32 in another order: 1e-6 of weights of size 0.02 to 1.
    torch.testing.assert_close(divided, whole, rtol=0, atol=1e-6)


def test_an_incomplete_last_window_counts_in_full(folder: Path, tmp_path: Path) -> None:
    """Ten rows: windows of 4, 4 and 2. The last one has fewer micro-batches, but all of the step's prompts."""
    whole = trained(add(trainer_of(folder, tmp_path, max_steps=3)))
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 3}
    divided = add(trainer_of(folder, tmp_path, **options))
    torch.testing.assert_close(trained(divided), whole, rtol=0, atol=1e-6)


def test_logs_have_the_loss_and_its_share_of_the_total(folder: Path, tmp_path: Path) -> None:
    trainer = add(trainer_of(folder, tmp_path, max_steps=3))
    trainer.train()
    logs = [found for found in trainer.state.log_history if "loss" in found]
    assert len(logs) == 3
    for name in ("loss", "excess", "explained_variance", "min_cosine", "raw/explained_variance", "raw/min_cosine"):
        assert all(f"mlc/{name}" in found for found in logs)
    alone = trainer_of(folder, tmp_path, max_steps=1)
    alone.train()
    assert logs[0]["loss"] == pytest.approx(alone.state.log_history[0]["loss"] + 10 * logs[0]["mlc/loss"], rel=1e-5)


@pytest.mark.parametrize(("every", "logging", "logged"), [(2, 2, 2), (2, 3, 2), (1, 3, 2), (3, 2, 3)])
def test_collinearity_is_in_every_log_with_a_step_that_has_the_loss(
    every: int, logging: int, logged: int, folder: Path, tmp_path: Path
) -> None:
    options = {"max_steps": 6, "logging_steps": logging}
    trainer = add(trainer_of(folder, tmp_path, **options), every_n_steps=every)
    trainer.train()
    logs = [found for found in trainer.state.log_history if "loss" in found]
    windows = [range(end - logging, end) for end in range(logging, 7, logging)]
    for window, found in zip(windows, logs, strict=True):
        has_loss = any(step % every == 0 for step in window)
        assert ("mlc/loss" in found) == has_loss
        assert ("mlc/excess" in found) == has_loss


def test_evaluation_has_no_loss_of_ours(folder: Path, tmp_path: Path) -> None:
    trainer, without = add(trainer_of(folder, tmp_path)), trainer_of(folder, tmp_path)
    found, expected = trainer.evaluate(), without.evaluate()
    assert found["eval_loss"] == expected["eval_loss"]
    assert not any("mlc" in name for name in found)


@pytest.mark.parametrize("extractor", ["frozen", "linear"])
def test_a_resumed_run_is_the_same_to_the_last_bit(extractor: str, folder: Path, tmp_path: Path) -> None:
    options = {"max_steps": 4, "optim": "adamw_torch", "learning_rate": 1e-2, "save_strategy": "steps"}
    options |= {"save_steps": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    options |= {"max_grad_norm": 0.5}
    ours = {"extractor": extractor, "center": True}

    def extractor_of(trainer: Any) -> Tensor:
        found: Tensor = trainer.mlc.state_dict()["representation.extractor.weight"]
        return found

    whole = add(trainer_of(folder, tmp_path / "whole", **options), **ours)
    expected = trained(whole)
    assert (tmp_path / "whole/checkpoint-2/mlc.safetensors").exists()
    resumed = add(trainer_of(folder, tmp_path / "whole", **options), **ours)
    found = trained(resumed, resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    assert torch.equal(found, expected)
    assert torch.equal(extractor_of(resumed), extractor_of(whole))
    if extractor == "linear":
        assert not torch.equal(extractor_of(resumed), extractor_of(add(trainer_of(folder, tmp_path), **ours)))


def test_resuming_the_last_checkpoint_restores_the_extractor(folder: Path, tmp_path: Path) -> None:
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trained(add(trainer_of(folder, tmp_path, **options)))
    with pytest.raises(UserError, match=r"^seed: is 8, but was 7 in"):
        add(trainer_of(folder, tmp_path, **options), seed=8).train(resume_from_checkpoint=True)


def test_a_final_model_is_only_a_model(folder: Path, tmp_path: Path) -> None:
    trainer = add(trainer_of(folder, tmp_path))
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert not (tmp_path / "final/mlc.safetensors").exists()
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "final")).__name__ == "LlamaForCausalLM"


class Gradients(TrainerCallback):
    """Records the norm of all gradients after clipping, and how many parameters the optimizer has."""

    def __init__(self) -> None:
        self.norms: list[float] = []
        self.trained = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **found: Any) -> None:
        parameters = [p for group in found["optimizer"].param_groups for p in group["params"] if p.grad is not None]
        self.trained = len(parameters)
        self.norms.append(float(torch.stack([p.grad.norm() for p in parameters]).norm()))


def test_a_trained_extractor_is_clipped_and_cleared_with_the_rest(folder: Path, tmp_path: Path) -> None:
    trainer = add(trainer_of(folder, tmp_path, max_grad_norm=0.5, max_steps=3), extractor="linear")
    seen = Gradients()
    trainer.add_callback(seen)
    without = Gradients()
    other = add(trainer_of(folder, tmp_path, max_grad_norm=0.5, max_steps=1))
    other.add_callback(without)
    trainer.train()
    other.train()
    assert seen.norms == pytest.approx([0.5] * 3, rel=1e-4)
    assert seen.trained == without.trained + 2  # weight and bias


def test_gradients_of_the_extractor_do_not_outlive_a_step(folder: Path, tmp_path: Path) -> None:
    """On steps without the loss, the extractor stays as it is."""
    trainer: Any = add(trainer_of(folder, tmp_path, max_steps=2), extractor="linear", every_n_steps=2)
    seen: list[Tensor] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            seen.append(trainer.mlc.state_dict()["representation.extractor.weight"].clone())

    trainer.add_callback(Watch())
    trainer.train()
    assert torch.equal(seen[0], seen[1])


def test_translations_are_trained_with_dropout_from_the_first_step(folder: Path, tmp_path: Path) -> None:
    """Trainer loads a model in evaluation mode, and turns it to training mode inside its own step only."""
    trainer: Any = add(trainer_of(folder, tmp_path, max_steps=1))
    modes: list[bool] = []

    def note(module: Any, *_: Any) -> None:
        if torch.is_grad_enabled():  # not the self-check
            modes.append(module.training)

    trainer.model.model.layers[0].register_forward_hook(note)
    trainer.model.eval()
    trainer.train()
    assert modes
    assert all(modes)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant: bool, folder: Path, tmp_path: Path) -> None:
    expected = trained(add(trainer_of(folder, tmp_path)))
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    found = trained(add(trainer_of(folder, tmp_path, **options)))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_bf16_autocast(folder: Path, tmp_path: Path) -> None:
    logs = []
    for options in ({}, {"bf16": True}):
        trainer = add(trainer_of(folder, tmp_path, **options))
        trainer.train()
        logs.append(trainer.state.log_history[0])
    assert logs[0]["mlc/loss"] != logs[1]["mlc/loss"]  # autocast reaches the translations
    assert logs[1]["mlc/loss"] == pytest.approx(logs[0]["mlc/loss"], rel=0.05)  # 8 bits


def test_other_wrappers_stay_in_the_chain(folder: Path, tmp_path: Path) -> None:
    calls: list[str] = []
    trainer: Any = trainer_of(folder, tmp_path, max_steps=1)
    inner = trainer.compute_loss

    def wrapped(*given: Any, **keywords: Any) -> Any:
        calls.append("compute_loss")
        return inner(*given, **keywords)

    trainer.compute_loss = wrapped
    add(trainer)
    trainer.train()
    assert calls == ["compute_loss"]
    assert "mlc/loss" in trainer.state.log_history[0]


def test_a_subclass_takes_the_regularizer(folder: Path, tmp_path: Path) -> None:
    class Mine(MLCTrainerMixin, Trainer):
        """A trainer of somebody's own."""

    mlc = MLCRegularizer(
        PROMPTS, AutoTokenizer.from_pretrained(folder), weight=10.0, extractor_dim=16, prompts_per_step=4, seed=7
    )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = trainer_of(folder, tmp_path).train_dataset
    mine = Mine(
        model=AutoModelForCausalLM.from_pretrained(folder),
        args=arguments(tmp_path),
        train_dataset=data,
        processing_class=tokenizer,
        mlc=mlc,
    )
    assert torch.equal(trained(mine), trained(add(trainer_of(folder, tmp_path))))


def test_prompts_of_a_step_are_those_of_the_trainers_step(folder: Path, tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    trainer: Any = add_mlc(trainer_of(folder, tmp_path, **options), PROMPTS)
    assert trainer.mlc.prompts_per_step == 6
    assert trainer.mlc.seed == 7


# ---- what is refused ---------------------------------------------------------------------------------


def test_a_second_call_is_refused(folder: Path, tmp_path: Path) -> None:
    trainer = add(trainer_of(folder, tmp_path))
    with pytest.raises(UserError, match=r"^add_mlc: this trainer has the MLC loss already"):
        add(trainer)


def test_a_trainer_that_has_begun_is_refused(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_of(folder, tmp_path, max_steps=1)
    trainer.train()
    with pytest.raises(UserError, match=r"^trainer: has begun to train; call add_mlc before train"):
        add(trainer)
    assert type(trainer) is Trainer


def test_data_parallel_is_refused(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_of(folder, tmp_path)
    trainer.args._n_gpu = 2
    with pytest.raises(UserError, match=r"^trainer: runs 2 GPUs by nn.DataParallel.*torchrun"):
        add(trainer)


def test_what_is_no_trainer_is_refused() -> None:
    wrong: Any = object()
    with pytest.raises(UserError, match=r"^trainer: must be a transformers.Trainer, got object"):
        add_mlc(wrong, PROMPTS)


def test_an_optimizer_that_steps_in_the_backward_pass_is_refused(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_of(folder, tmp_path)
    trainer.args.optim = "galore_adamw_layerwise"
    with pytest.raises(UserError, match=r"^optim: galore_adamw_layerwise steps inside the backward pass"):
        add(trainer)


def test_a_linear_extractor_needs_the_trainers_own_optimizer(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_of(folder, tmp_path)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    with pytest.raises(UserError, match=r"^extractor: 'linear' needs an optimizer that the trainer makes itself"):
        add(trainer, extractor="linear")
    assert type(trainer) is Trainer  # as it was
    add(trainer)


def test_a_trainer_without_tokenizer_is_asked_for_one(folder: Path, tmp_path: Path) -> None:
    trainer = trainer_of(folder, tmp_path)
    trainer.processing_class = None
    with pytest.raises(
        UserError, match=r"^tokenizer: the trainer has no processing_class; give the tokenizer, as add_mlc\("
    ):
        add(trainer)
    add(trainer, tokenizer=AutoTokenizer.from_pretrained(folder))
    with pytest.raises(UserError, match=r"^tokenizer: the tokenizer of .* has no chat template"):
        add(trainer_of(folder, tmp_path), tokenizer=byte_tokenizer(None))


def test_an_encoder_decoder_is_refused(folder: Path, tmp_path: Path) -> None:
    sizes: Any = {"d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 300}
    model = T5ForConditionalGeneration(T5Config(**sizes))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=[], processing_class=tokenizer)
    with pytest.raises(UserError, match=re.escape("model: T5ForConditionalGeneration is an encoder-decoder")):
        add(trainer)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("wieght", "is no option; did you mean weight?"),
        ("gpus", "is no option; options are languages, source_language,"),
    ],
)
def test_unknown_options_are_refused(option: str, said: str, folder: Path, tmp_path: Path) -> None:
    trainer = trainer_of(folder, tmp_path)
    with pytest.raises(UserError) as told:
        add(trainer, **{option: 1})
    assert str(told.value).startswith(f"{option}: {said}")
    assert type(trainer) is Trainer
