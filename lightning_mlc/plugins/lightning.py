"""The MLC loss in a LightningModule of somebody else. The only plug-in that imports Lightning."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_mlc.errors import UserError
from lightning_mlc.lightning_internals import batch_of_epoch, ends_window, writes_logs
from lightning_mlc.plugins.regularizer import MLCRegularizer

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    _Base = LightningModule
else:
    _Base = object  # so that it goes with modules of `lightning` and of `pytorch_lightning`

logger = logging.getLogger("lightning_mlc")

CHECKPOINT_KEY = "lightning_mlc_plugin"
"""Entry of a checkpoint that holds the options which a resumed run must not change."""


class MLCModuleMixin(_Base):
    """Adds the MLC loss to what ``training_step`` of a LightningModule returns. Put it before the module's class::

        class WithMLC(MLCModuleMixin, TheirModule):
            ...

        module = WithMLC(...)
        module.mlc = MLCRegularizer("prompts.jsonl", tokenizer, weight=0.8, prompts_per_step=8)
        Trainer(...).fit(module)

    The loss is a submodule, ``mlc``. So a trained extractor is among the parameters of the module, and checkpoints hold
    it. The translations and the module's own batch are in one graph, and one backward pass serves both. A module
    without ``mlc`` trains as before.

    Raises:
        UserError: The module optimizes manually, has no causal LM of transformers, or ``training_step`` returns
            no loss.
    """

    # It is no argument of __init__, because `save_hyperparameters` would store it.
    mlc: MLCRegularizer
    """The loss and its prompts."""
    _mlc_is_checked = False
    _mlc_is_added = False

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        # Here, and not in a method, because Lightning looks at the arguments that the module's own method has, and
        # because a class may define it itself.
        if not hasattr(cls.training_step, "adds_mlc"):
            cls.training_step = _with_mlc(cls.training_step)  # type: ignore[method-assign]

    def mlc_model(self) -> nn.Module:
        """Return the causal LM whose hidden states are compared: ``self.model``. Override it if it is elsewhere."""
        model: nn.Module | None = getattr(self, "model", None)
        if model is None:
            raise UserError(
                "mlc_model", f"{type(self).__name__} has no attribute 'model'; override mlc_model() to return the LM"
            )
        return model

    def configure_model(self) -> None:
        """Make the module's model, then the extractor for it, because the optimizer comes next."""
        super().configure_model()
        if (mlc := _regularizer(self)) is not None:
            mlc.prepare(self.mlc_model())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the options that a resumed run must not change."""
        super().on_save_checkpoint(checkpoint)
        if (mlc := _regularizer(self)) is not None:
            checkpoint[CHECKPOINT_KEY] = mlc.identity()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume with other options. A module without ``mlc`` leaves out what the checkpoint has of it."""
        super().on_load_checkpoint(checkpoint)
        stored = checkpoint.get(CHECKPOINT_KEY)
        if stored is None:
            return
        mlc = _regularizer(self)
        if mlc is None:
            logger.warning("The checkpoint is of a run with the MLC loss; this module has no 'mlc' and leaves it out")
            weights = checkpoint["state_dict"]
            checkpoint["state_dict"] = {name: weights[name] for name in weights if not name.startswith("mlc.")}
            return
        mlc.require_same(stored, "the checkpoint")

    def _loss_of_mlc(self, mlc: MLCRegularizer) -> Tensor:
        """Compute the loss of this micro-batch's share of the prompts."""
        trainer = self.trainer
        batch, micro_batches = batch_of_epoch(trainer), trainer.accumulate_grad_batches
        logs = writes_logs(trainer)
        loss = mlc.loss(
            self.mlc_model(),
            trainer.global_step,
            trainer.global_rank,
            trainer.world_size,
            batch % micro_batches,
            micro_batches,
            detailed=logs,
        )
        if logs and ends_window(trainer, batch):
            # All processes call it and get the same means, so Lightning has nothing to synchronise. As tensors on the
            # host, because Lightning would copy numbers to the device and back.
            means = mlc.metrics(synchronize=True)
            self.log_dict({name: torch.tensor(value, dtype=torch.float32) for name, value in means.items()})
        # DDP waits for a gradient of each parameter, also on steps that have no translations.
        return loss + sum(0.0 * parameter.sum() for parameter in _trained(mlc))

    def _check_once(self, mlc: MLCRegularizer) -> None:
        if self._mlc_is_checked:
            return
        if not self.automatic_optimization:
            raise UserError(
                "automatic_optimization",
                "is off; without the mixin, call self.mlc.loss(...) in training_step yourself, before your own loss",
            )
        known = {id(p) for optimizer in self.trainer.optimizers for g in optimizer.param_groups for p in g["params"]}
        if any(id(parameter) not in known for parameter in _trained(mlc)):
            raise UserError(
                "extractor",
                "'linear' is not in the optimizer; give it all of self.parameters(), or use 'frozen'. If the module "
                "has a configure_model() of its own, call super().configure_model() at its end",
            )
        self._mlc_is_checked = True


def _regularizer(module: nn.Module) -> MLCRegularizer | None:
    found: MLCRegularizer | None = getattr(module, "mlc", None)
    return found


def _trained(mlc: MLCRegularizer) -> list[nn.Parameter]:
    return [parameter for parameter in mlc.parameters() if parameter.requires_grad]


def _with_mlc(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``training_step`` with the loss added to what it returns."""

    @functools.wraps(step)
    def training_step(self: MLCModuleMixin, *args: Any, **keywords: Any) -> Any:
        mlc = _regularizer(self)
        if mlc is None or self._mlc_is_added:  # by the step of a subclass that calls this one
            return step(self, *args, **keywords)
        self._check_once(mlc)
        self._mlc_is_added = True
        try:
            output = step(self, *args, **keywords)
        finally:
            self._mlc_is_added = False
        if output is None:  # skips the batch
            return None
        if isinstance(output, Tensor):
            return output + self._loss_of_mlc(mlc)
        if isinstance(output, Mapping) and "loss" in output:
            return {**output, "loss": output["loss"] + self._loss_of_mlc(mlc)}
        raise UserError("training_step", f"must return a loss or a mapping with 'loss', got {type(output).__name__}")

    training_step.adds_mlc = True  # type: ignore[attr-defined]
    return training_step
