"""``add_mlc`` on runs that do not go straight on: they begin again, end early, or have their steps replaced."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_model
from datasets import IterableDataset
from small_trainers import add, logs_of, trained, trainer_of
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from lightning_mlc.errors import UserError
from lightning_mlc.plugins import MLCRegularizer, MLCTrainerMixin

pytest.importorskip("accelerate")

SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
MICRO = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), attention_dropout=0.0)


class Spy(MLCRegularizer):
    """Notes the step, the micro-batch and the number of micro-batches of each call."""

    calls: list[tuple[int, int, int]]

    def loss(self, model: Any, step: int, *places: Any, **keywords: Any) -> Tensor:
        self.calls.append((step, *places[2:4]))
        return super().loss(model, step, *places, **keywords)


def calls_of(trainer: Any) -> list[tuple[int, int, int]]:
    trainer.mlc.__class__ = Spy
    trainer.mlc.calls = []
    trainer.train()
    found: list[tuple[int, int, int]] = trainer.mlc.calls
    return found


class OutOfMemory(Trainer):
    """Has too little memory for its first batch."""

    has_failed = False

    def compute_loss(self, *arguments: Any, **keywords: Any) -> Any:
        if not self.has_failed:
            self.has_failed = True
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return super().compute_loss(*arguments, **keywords)


def test_a_retry_with_a_smaller_batch_has_the_loss_from_its_first_step(folder: Path, tmp_path: Path) -> None:
    """It begins step 0 a second time, in the middle of which the first attempt failed."""
    options = {"train_sampling_strategy": "sequential"}
    retried = add(trainer_of(folder, tmp_path, OutOfMemory, auto_find_batch_size=True, **options))
    found = trained(retried)
    assert retried.state.train_batch_size == 3
    expected = add(trainer_of(folder, tmp_path, per_device_train_batch_size=3, **options))
    assert torch.equal(found, trained(expected))


def test_a_step_whose_data_ended_begins_again(folder: Path, tmp_path: Path) -> None:
    """Ten rows in micro-batches of one: the third window of an epoch ends early, and the Trainer makes no step then."""

    def kind(*arguments: Any, train_dataset: Any, **keywords: Any) -> Trainer:
        def rows() -> Iterator[Any]:
            yield from train_dataset

        return Trainer(*arguments, train_dataset=IterableDataset.from_generator(rows), **keywords)

    made: Any = kind
    trainer = add(trainer_of(folder, tmp_path, made, **{**MICRO, "max_steps": 3}))
    whole = [(number, 4) for number in range(4)]
    found = [(micro_batch, count) for _, micro_batch, count in calls_of(trainer)]
    assert found == [*whole, *whole, (0, 2), (1, 2), *whole]


class Breaks(TrainerCallback):
    """Ends a run in the middle of its second step."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            raise KeyError("a callback of the user")


@pytest.mark.parametrize("extractor", ["frozen", "linear"])
def test_a_run_after_one_that_failed_forgets_its_unfinished_step(extractor: str, folder: Path, tmp_path: Path) -> None:
    """Both runs have a learning rate of 0, so that they differ by what is left of the first one only."""
    options = {**MICRO, "learning_rate": 0.0, "logging_steps": 2}
    trainer = add(trainer_of(folder, tmp_path, **options), extractor=extractor)
    trainer.add_callback(Breaks)
    with pytest.raises(KeyError):
        trainer.train()
    trainer.remove_callback(Breaks)
    trainer.train()
    untouched = add(trainer_of(folder, tmp_path, **options), extractor=extractor)
    untouched.train()
    found, expected = logs_of(trainer)[0], logs_of(untouched)[0]
    assert {name: found[name] for name in found if name.startswith("mlc/")} == {
        name: expected[name] for name in expected if name.startswith("mlc/")
    }


def with_model_init(folder: Path) -> Any:
    def kind(model: Any, args: Any, **keywords: Any) -> Trainer:
        return Trainer(None, args, model_init=lambda: AutoModelForCausalLM.from_pretrained(folder), **keywords)

    return kind


def test_a_trainer_that_makes_its_model_anew_makes_the_extractor_anew(folder: Path, tmp_path: Path) -> None:
    """As each trial of a search for hyperparameters does."""
    trainer: Any = add(trainer_of(folder, tmp_path, with_model_init(folder)), extractor="linear", center=True)
    first = trained(trainer)
    extractor = {name: tensor.clone() for name, tensor in trainer.mlc.state_dict().items()}
    assert torch.equal(trained(trainer), first)
    assert all(torch.equal(tensor, extractor[name]) for name, tensor in trainer.mlc.state_dict().items())


def test_a_model_that_is_made_anew_resumes(folder: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"extractor": "linear", "center": True}
    whole = trained(add(trainer_of(folder, tmp_path, with_model_init(folder), **SAVING), **options))
    resumed = add(trainer_of(folder, tmp_path, with_model_init(folder), **SAVING), **options)
    assert torch.equal(trained(resumed, resume_from_checkpoint=str(tmp_path / "checkpoint-2")), whole)


def test_a_run_without_the_loss_can_go_on_with_it(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = trained(trainer_of(folder, tmp_path, **SAVING))
    checkpoint = str(tmp_path / "checkpoint-2")
    resumed = add(trainer_of(folder, tmp_path, **SAVING))
    assert not torch.equal(trained(resumed, resume_from_checkpoint=checkpoint), plain)
    assert f"{checkpoint} has no mlc.safetensors: the MLC loss begins here" in caplog.text
    with pytest.raises(UserError, match=r"checkpoint-2: has no mlc.safetensors, so no trained extractor; use"):
        add(trainer_of(folder, tmp_path, **SAVING), extractor="linear").train(resume_from_checkpoint=checkpoint)


def test_a_run_that_resumes_with_other_accumulation_says_so(folder: Path, tmp_path: Path) -> None:
    """Because a step has as many prompts as the trainer takes examples."""
    from lightning_mlc.plugins import add_mlc

    prompts = [{"en": f"Bag {number}?", "sw": f"Gunia {number}?"} for number in range(20)]
    add_mlc(trainer_of(folder, tmp_path, **SAVING), prompts, extractor_dim=16).train()
    doubled = trainer_of(folder, tmp_path, gradient_accumulation_steps=2, **SAVING)
    with pytest.raises(UserError, match=r"^prompts_per_step: is 8, but was 4 in"):
        add_mlc(doubled, prompts, extractor_dim=16).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# ---- steps of somebody else -------------------------------------------------------------------------


class NotOurs(MLCTrainerMixin, Trainer):
    """Has a step of its own, which does not call the one above it."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss: Tensor = model(**self._prepare_inputs(inputs)).loss
        self.accelerator.backward(loss)
        return loss.detach()


def test_a_step_that_leaves_the_loss_out_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^training_step: of NotOurs does not reach that of MLCTrainerMixin"):
        add(trainer_of(folder, tmp_path, NotOurs)).train()
    assert trained(trainer_of(folder, tmp_path, NotOurs)).isfinite().all()  # without the loss, it may do so


def test_a_step_that_was_replaced_before_is_refused(folder: Path, tmp_path: Path) -> None:
    trainer: Any = trainer_of(folder, tmp_path)
    inner = trainer.training_step
    trainer.training_step = lambda *arguments: inner(*arguments)
    with pytest.raises(UserError, match=r"^training_step: of MLCTrainer does not reach .* after add_mlc, not before"):
        add(trainer).train()


class Whole(Trainer):
    """Has a step of its own that calls none."""

    training_step = NotOurs.training_step


def test_a_step_of_the_trainers_class_gets_the_loss(folder: Path, tmp_path: Path) -> None:
    plain, off = (
        trained(trainer_of(folder, tmp_path, Whole)),
        trained(add(trainer_of(folder, tmp_path, Whole), weight=0)),
    )
    assert torch.equal(off, plain)
    assert not torch.equal(trained(add(trainer_of(folder, tmp_path, Whole))), plain)


class Exchanging(torch.optim.SGD):
    """As optimizers without a schedule, it has other weights in evaluation than in training."""

    is_training = False

    def train(self) -> None:
        self.is_training = True

    def eval(self) -> None:
        self.is_training = False


def test_translations_run_with_the_weights_of_training(folder: Path, tmp_path: Path) -> None:
    """Also after an evaluation, from which the Trainer returns only in its own step."""

    def kind(*arguments: Any, **keywords: Any) -> Trainer:
        return Trainer(*arguments, optimizer_cls_and_kwargs=(Exchanging, {"lr": 0.1}), **keywords)

    made: Any = kind
    trainer: Any = add(trainer_of(folder, tmp_path, made, eval_strategy="steps", eval_steps=1, max_steps=3))
    seen: list[bool] = []

    def note(*_: Any) -> None:
        if torch.is_grad_enabled():
            seen.append(trainer.optimizer.optimizer.is_training)

    trainer.model.model.layers[0].register_forward_hook(note)
    trainer.train()
    assert len(seen) >= 6  # translations and examples of three steps
    assert all(seen)


# ---- options of the trainer with the loss off -------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing_factor": 0.1},
        {"eval_strategy": "steps", "eval_steps": 1, **MICRO},
        {"neftune_noise_alpha": 5.0},
        {**MICRO, "max_steps": -1, "num_train_epochs": 2},
        {"bf16": True, "gradient_checkpointing": True},
        {"optim": "adafactor"},
    ],
    ids=lambda options: "-".join(options),
)
def test_weight_0_is_the_trainer_without_the_loss(options: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    plain = trained(trainer_of(folder, tmp_path, **options))
    assert torch.equal(trained(add(trainer_of(folder, tmp_path, **options), weight=0)), plain)
    assert not torch.equal(trained(add(trainer_of(folder, tmp_path, **options))), plain)
