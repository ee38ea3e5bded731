"""The MLC loss in any ``transformers.Trainer``: TRL's trainers, those of other libraries, and the Trainer itself.

The translations have a backward pass of their own, before the trainer's. So only one graph is in memory at a time, the
trainer's loss stays as it is, and its scaling does not matter.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.trainer_utils import get_last_checkpoint

from lightning_mlc.errors import UserError
from lightning_mlc.plugins.regularizer import OPTIONS, MLCRegularizer
from lightning_mlc.plugins.settings import no_such_option
from lightning_mlc.plugins.states import is_sharded, transformers_model

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import Trainer

    _Base = Trainer
else:
    _Base = object

T = TypeVar("T", bound="Trainer")

_STEPS_IN_BACKWARD = ("lomo", "layerwise")
"""Parts of the names of optimizers that step inside the backward pass, so that each pass would be a step."""


class MLCTrainerMixin(_Base):
    """Adds the MLC loss to a trainer. Put it before the trainer's class::

        class MyTrainer(MLCTrainerMixin, DPOTrainer):
            ...

        trainer = MyTrainer(..., mlc=MLCRegularizer("prompts.jsonl", tokenizer, prompts_per_step=8))

    Args:
        mlc: The loss and its prompts. None: the trainer stays as it is.

    Raises:
        UserError: The trainer cannot have the loss (see :func:`add_mlc`).
    """

    mlc: MLCRegularizer | None = None
    _mlc_micro_batch: int | None = None
    """The next micro-batch of the optimizer step, from 0. None before the first."""

    def __init__(self, *args: Any, mlc: MLCRegularizer | None = None, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        if mlc is not None:
            _check_trainer(self, mlc.settings.extractor)
            self._attach(mlc)

    def _attach(self, mlc: MLCRegularizer) -> None:
        self.mlc = mlc
        self._mlc_micro_batch = None
        mlc.prepare(_model_of(self))

    # ---- the step -----------------------------------------------------------------------------------

    def get_batch_samples(self, *args: Any, **keywords: Any) -> Any:
        """Fetch the micro-batches of an optimizer step, and count those of the translations from 0 again."""
        if self._mlc_micro_batch == 0:
            raise UserError(
                "training_step",
                f"of {type(self).__name__} does not reach that of MLCTrainerMixin, so the run has no MLC loss; call "
                "super().training_step(...) in it, and change the trainer's methods after add_mlc, not before",
            )
        found: Any = super().get_batch_samples(*args, **keywords)
        if self.mlc is not None and found[0]:
            self._mlc_micro_batch = 0
        return found

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run the translations of this micro-batch and their backward pass, then the trainer's own step.

        Returns:
            (): the sum of both losses, as the trainer logs it.
        """
        added = None if self.mlc is None else self._backward_of_mlc(self.mlc, model)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss if added is None else loss + added.to(loss.device)

    def _backward_of_mlc(self, mlc: MLCRegularizer, model: nn.Module) -> Tensor | None:
        step, micro_batches = self.state.global_step, self.current_gradient_accumulation_steps
        micro_batch = self._mlc_micro_batch or 0
        self._mlc_micro_batch = micro_batch + 1
        trained = list(mlc.parameters()) if micro_batch == 0 else []
        for parameter in trained:  # the trainer clears the gradients of its model only
            parameter.grad = None
        if not mlc.runs_at(step):
            return None
        # The trainer's own step does both, but later. Schedule-free optimizers exchange the weights in theirs.
        model.train()
        exchange = getattr(self.optimizer, "train", None)
        if callable(exchange):
            exchange()
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            loss = mlc.loss(
                model,
                step,
                self.accelerator.process_index,
                self.accelerator.num_processes,
                micro_batch,
                micro_batches,
                detailed=self._is_last_before_log(step, mlc),
            )
        reaches_weights = loss.grad_fn is not None
        loss = loss / micro_batches
        if reaches_weights:
            self._backward_without_step(loss)
        if micro_batch == micro_batches - 1:
            mlc.average_gradients()
        return loss.detach()

    def _backward_without_step(self, loss: Tensor) -> None:
        if self.is_deepspeed_enabled:
            # Its wrapper would make an optimizer step at the end of a backward pass that synchronises gradients.
            self.accelerator.deepspeed_engine_wrapped.backward(loss, sync_gradients=False, scale_wrt_gas=False)
        else:
            self.accelerator.backward(loss)

    def _is_last_before_log(self, step: int, mlc: MLCRegularizer) -> bool:
        """Whether no later step with the loss comes before the trainer logs again."""
        if self.args.logging_strategy != "steps":
            return True
        every = max(1, int(self.state.logging_steps))
        if self.args.logging_first_step and step == 0:
            return True
        next_log = step + -(step + 1) % every
        return step + mlc.settings.every_n_steps > min(next_log, self.state.max_steps - 1)

    # ---- a trained extractor ------------------------------------------------------------------------

    def create_optimizer(self, *args: Any, **keywords: Any) -> torch.optim.Optimizer:
        """Create the trainer's optimizer, with a group of its own for a trained extractor."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **keywords)
        if self.mlc is None:
            return optimizer
        self.mlc.prepare(_model_of(self))
        trained = [parameter for parameter in self.mlc.parameters() if parameter.requires_grad]
        known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if trained and id(trained[0]) not in known:
            self.mlc.to(self.args.device)
            optimizer.add_param_group({"params": trained, "weight_decay": 0.0})
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        """Clip the gradients of the model and of a trained extractor together."""
        trained = [] if self.mlc is None else [p for p in self.mlc.parameters() if p.grad is not None]
        if not trained:
            return super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        return self.accelerator.clip_grad_norm_([*model.parameters(), *trained], self.args.max_grad_norm)

    # ---- logs and checkpoints -----------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **keywords: Any) -> None:
        """Add the values of the loss to the trainer's own training logs."""
        if self.mlc is not None and "loss" in logs and "learning_rate" in logs:
            logs.update(self.mlc.metrics(synchronize=True))
        super().log(logs, *args, **keywords)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **keywords: Any) -> Any:
        """Train; a resumed run continues with the extractor of its checkpoint."""
        if self.mlc is not None:
            self._mlc_micro_batch = None
            self.mlc.metrics()  # forgets those of an earlier run
            if self.model_init is not None:  # the trainer makes a new model
                self.mlc.representation = None
            folder = resume_from_checkpoint
            if folder is True:
                folder = get_last_checkpoint(self.args.output_dir)  # type: ignore[no-untyped-call]
            if folder and os.path.isdir(folder):
                self.mlc.restore(folder, _model_of(self))
        return super().train(resume_from_checkpoint, *args, **keywords)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; into a checkpoint also the extractor, which a resumed run needs."""
        super().save_model(output_dir, _internal_call=_internal_call)
        if self.mlc is not None and _internal_call and output_dir is not None and self.args.should_save:
            self.mlc.save(output_dir)


def add_mlc(
    trainer: T, prompts: str | Path | Dataset | Sequence[Mapping[str, Any]], *, tokenizer: Any = None, **options: Any
) -> T:
    """Add the MLC loss to a trainer::

        trainer = DPOTrainer(model, args=args, train_dataset=pairs, processing_class=tokenizer)
        add_mlc(trainer, "prompts.jsonl", weight=0.8)
        trainer.train()

    The trainer keeps its class's name with ``MLC`` before it, and stays an instance of its class.

    Args:
        trainer: A ``transformers.Trainer``, such as TRL's DPOTrainer, before ``train()``.
        prompts: Prompts in several languages: a file in any layout that training reads, a ``datasets.Dataset``, or a
            list of rows.
        tokenizer: The tokenizer. None: the trainer's ``processing_class``.
        **options: Options of :class:`~lightning_mlc.plugins.regularizer.MLCRegularizer`. ``prompts_per_step`` is by
            default the number of examples of an optimizer step, ``seed`` the trainer's.

    Returns:
        The same trainer.

    Raises:
        UserError: The trainer has the loss already or has begun to train, uses ``nn.DataParallel``, or cannot have
            the loss for another reason; or the prompts or an option cannot be used, or there is no such option.
    """
    _require_trainer(trainer)
    for name in options:
        if name not in OPTIONS:
            raise no_such_option(name, name, list(OPTIONS))
    if isinstance(trainer, MLCTrainerMixin) and trainer.mlc is not None:
        raise UserError("add_mlc", "this trainer has the MLC loss already; call it once")
    if tokenizer is None:
        processing = trainer.processing_class
        tokenizer = getattr(processing, "tokenizer", processing)
    if tokenizer is None:
        raise UserError(
            "tokenizer", "the trainer has no processing_class; give the tokenizer, as add_mlc(..., tokenizer=tokenizer)"
        )
    options.setdefault("prompts_per_step", _examples_per_step(trainer))
    options.setdefault("seed", trainer.args.seed)
    _check_trainer(trainer, options.get("extractor"))
    mlc = MLCRegularizer(prompts, tokenizer, **options)
    kind: Any = type(trainer)
    chosen: Any = trainer
    if not isinstance(trainer, MLCTrainerMixin):
        # On the class, not on the instance, so that methods that other libraries have replaced stay in the chain.
        trainer.__class__ = type(f"MLC{kind.__name__}", (MLCTrainerMixin, kind), {"__module__": kind.__module__})
    try:
        chosen._attach(mlc)
    except BaseException:
        trainer.__class__ = kind
        raise
    return trainer


def _require_trainer(trainer: Any) -> None:
    """Refuse what is no ``transformers.Trainer``.

    Raises:
        UserError: It is something else.
    """
    from transformers import Trainer

    if not isinstance(trainer, Trainer):
        raise UserError(
            "trainer",
            f"must be a transformers.Trainer, got {type(trainer).__name__}; use MLCRegularizer in a loop of your own",
        )


def _check_trainer(trainer: Any, extractor: str | None) -> None:
    """Refuse a trainer that cannot have the loss. ``extractor`` is the option, None if it is not given."""
    args = trainer.args
    if args.n_gpu > 1:
        raise UserError(
            "trainer",
            f"runs {args.n_gpu} GPUs by nn.DataParallel, which MLC does not support; start it with torchrun or "
            "accelerate launch, or make one GPU visible with CUDA_VISIBLE_DEVICES",
        )
    if trainer.state.global_step > 0 or trainer.is_in_train:
        raise UserError("trainer", "has begun to train; call add_mlc before train()")
    if any(part in str(getattr(args.optim, "value", args.optim)) for part in _STEPS_IN_BACKWARD):
        raise UserError("optim", f"{args.optim} steps inside the backward pass, and MLC has a second one; use another")
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    if parallel is not None and any(getattr(parallel, f"{kind}_enabled", False) for kind in ("tp", "cp", "sp")):
        raise UserError(
            "trainer", "splits layers or sequences (TP, CP, SP), which MLC does not support; use FSDP or DDP"
        )
    transformers_model(trainer.model)
    if extractor == "linear":
        _check_trained_extractor(trainer)


def _check_trained_extractor(trainer: Any) -> None:
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or is_sharded(trainer.model):
        raise UserError(
            "extractor",
            "'linear' is trained outside of the model, which FSDP and DeepSpeed do not support; use 'frozen'",
        )
    if trainer.optimizer is not None:
        raise UserError("extractor", "'linear' needs an optimizer that the trainer makes itself; use 'frozen'")


def _model_of(trainer: Trainer) -> nn.Module:
    model: Any = trainer.model
    return model  # type: ignore[no-any-return]


def _examples_per_step(trainer: Any) -> int:
    """Number of prompts of an optimizer step of the trainer."""
    args = trainer.args
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return max(1, int(rows) // int(getattr(args, "num_generations", None) or 1))
