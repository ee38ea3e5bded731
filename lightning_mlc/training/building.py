"""Build what a run trains: the policy, as it is loaded, wrapped and tried, its optimizer and its schedule."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from transformers import PreTrainedConfig

from lightning_mlc.consistency import Representation
from lightning_mlc.distributed import tensor_parallel
from lightning_mlc.distributed.sharding import FSDP2
from lightning_mlc.errors import UserError, first_line
from lightning_mlc.models.compiling import require_compiler
from lightning_mlc.models.loading import dtype_of, enable_checkpointing, frozen_dtype_of, load_causal_lm
from lightning_mlc.models.lora import LoRA, add_lora
from lightning_mlc.models.parts import beyond_text, submodule
from lightning_mlc.models.policy import Policy
from lightning_mlc.models.quantization import require_quantizable, require_whole
from lightning_mlc.models.requirements import require_fitting
from lightning_mlc.models.self_check import Checked, self_check
from lightning_mlc.sources import ModelSource
from lightning_mlc.training.schedules import Warmup, by_step


@dataclass(frozen=True)
class PolicyBuilder:
    """Loads the model of a run and makes a :class:`~lightning_mlc.models.policy.Policy` of it.

    Args:
        source: Where the model comes from.
        lora: Adapters to train instead of the weights; None trains the weights.
        gradient_checkpointing: Recompute activations in the backward pass.
        activation_offload: Keep in CPU memory what gradient checkpointing keeps for the backward pass.
        compiles: Compile the decoder layers.
        attn_implementation: Attention implementation of transformers; None takes its default.
        packing: Whether rows are packed; None packs them where the model gives the same results.

    Raises:
        UserError: Two of the options cannot work together.
    """

    source: ModelSource
    lora: LoRA | None = None
    gradient_checkpointing: bool = False
    activation_offload: bool = False
    compiles: bool = False
    attn_implementation: str | None = None
    packing: bool | None = None

    def __post_init__(self) -> None:
        if self.activation_offload and not self.gradient_checkpointing:
            raise UserError(
                "model.activation_offload",
                "offloads what gradient checkpointing keeps; set model.gradient_checkpointing to true",
            )
        if self.compiles and self.activation_offload:
            raise UserError(
                "model.compile",
                "layers that offload their activations cannot be compiled; "
                "set model.activation_offload or model.compile to false",
            )
        if self.compiles and self.lora is not None and self.lora.quantize == "int8":
            raise UserError(
                "model.compile",
                "int8 products cannot be compiled under gradient checkpointing; "
                "set model.lora.quantize to nf4, or model.compile to false",
            )

    # ---- checks before anything is loaded -------------------------------------------------------------

    def require_device(self, device: torch.device) -> None:
        """Refuse options that need a GPU, on the CPU."""
        if self.activation_offload and device.type == "cpu":
            raise UserError(
                "model.activation_offload",
                "the model is on the CPU, and its activations with it; set model.activation_offload to false",
            )

    def require_shardable(self, sharding: FSDP2) -> None:
        """Refuse options that a sharded model does not have, or is not known to have."""
        if self.lora is not None and self.lora.quantize is not None:
            raise UserError(
                "model.lora.quantize",
                "a quantised model cannot be sharded over processes; set it to null, or trainer.strategy to ddp",
            )
        if self.compiles:
            raise UserError(
                "model.compile",
                "a model that is sharded over processes cannot be compiled; set it to false, or trainer.strategy to "
                "ddp",
            )
        if self.lora is not None and sharding.tensor_parallel_size > 1:
            raise UserError(
                tensor_parallel.OPTION, "layers with adapters cannot be split; set it to 1, or model.lora to null"
            )

    def require_loadable(self, config: PreTrainedConfig, precision: str, trains: bool) -> None:
        """Refuse a quantised model where whole weights are needed, and the other way round."""
        if self.lora is not None and self.lora.quantize is not None:
            require_quantizable(self.source, config, precision)
        elif self.lora is None and trains:
            require_whole(self.source, config)

    def require_fitting(self, config: PreTrainedConfig, highest_token: int, longest: int) -> None:
        """Refuse a model that the data does not fit: its vocabulary, its positions, its layers."""
        require_fitting(self.source, config, self.lora, self.attn_implementation, highest_token, longest)

    def require_compiler(self, device: torch.device) -> None:
        """Refuse to compile layers where no compiler works."""
        if self.compiles:
            require_compiler(device)

    # ---- the policy -----------------------------------------------------------------------------------

    def load(self, precision: str, device: torch.device, weights: bool = True) -> Any:
        """The model, before it has adapters.

        Args:
            precision: ``trainer.precision``, from which the dtype follows.
            device: Device of a quantised model; others are on the CPU.
            weights: Whether to read the weights, and not shapes alone.
        """
        if self.lora is None:
            return load_causal_lm(self.source, dtype_of(precision), self.attn_implementation, weights)
        return self.lora.load_base(self.source, frozen_dtype_of(precision), device, self.attn_implementation, weights)

    def wrap(self, model: Any, offload: bool = False) -> Policy:
        """``model`` as it is trained: with adapters, if any, and gradient checkpointing.

        Args:
            model: Of :meth:`load`.
            offload: Keep in CPU memory what gradient checkpointing keeps.
        """
        if self.lora is not None:
            model = add_lora(model, self.lora)
        else:
            for name in beyond_text(model):  # these parts get no gradients, which DDP would wait for
                submodule(model, name).requires_grad_(False)
        if self.gradient_checkpointing:
            enable_checkpointing(model, offload)
            if self.lora is not None:
                model.enable_input_require_grads()
        # transformers returns models in eval mode, where dropout and gradient checkpointing do nothing.
        return Policy(model).train()

    def finish(self, model: Any, checked: Checked | None, predicts: bool) -> Policy:
        """``model``, of :meth:`load`, as it is run.

        Args:
            model: The model.
            checked: How it is run, if a copy of it was tried before: a reference, for example.
            predicts: Whether it generates, which calls the layers in other ways than the compiled one.
        """
        policy = self.wrap(model, self.activation_offload)
        if checked is not None:
            checked.apply(policy)
        if self.compiles and not predicts:
            policy.compile_layers()
        return policy

    def try_out(
        self, policy: Policy, layer: int | None, longest: int, trainer: Trainer, sharding: FSDP2 | None
    ) -> Checked:
        """Try a model that was just loaded; the ways to run it that give the right results are set in ``policy``.

        Args:
            policy: The model.
            layer: Layer of the hidden states; None if none is needed.
            longest: Most tokens that a row has.
            trainer: Knows device and processes.
            sharding: The strategy that will shard the model; None if none will.
        """
        if sharding is None:
            # Lightning moves it there in a moment. Some kinds of attention, and most models, need the device.
            policy.to(trainer.strategy.root_device)
            return self_check(policy, layer, longest, self.packing)
        # Only process 0 has weights to try, and all processes must run the same passes.
        checked = self_check(policy, layer, longest, self.packing) if trainer.is_global_zero else None
        checked = sharding.broadcast(checked)
        assert checked is not None
        checked = replace(checked, layout=replace(checked.layout, few_passes=True))
        checked.apply(policy)
        return checked


def default_optimizer(parameters: Iterable[Any]) -> torch.optim.Optimizer:
    """AdamW at a rate that suits preference learning on a whole model."""
    return torch.optim.AdamW(parameters, lr=5e-7, weight_decay=0.0)


def make_optimizer(
    make: OptimizerCallable,
    policy: Policy,
    representation: Representation | None,
    extractor_lr: float | None,
    trainer: Trainer,
) -> torch.optim.Optimizer:
    """The optimizer of the trained parameters of the policy and of the extractor.

    Args:
        make: The configured optimizer.
        policy: The policy.
        representation: The extractor; None if there is none.
        extractor_lr: Learning rate of the extractor; None takes the policy's.
        trainer: Its precision and gradient clipping rule some optimizers out.

    Raises:
        UserError: The optimizer cannot be made, or does not work here.
    """
    groups: list[dict[str, Any]] = [{"params": [p for p in policy.parameters() if p.requires_grad]}]
    extractor = [] if representation is None else [p for p in representation.parameters() if p.requires_grad]
    if extractor:
        groups.append({"params": extractor, **({} if extractor_lr is None else {"lr": extractor_lr})})
    with naming("model.optimizer"):
        optimizer = make(groups)
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise UserError("model.optimizer", "SparseAdam takes sparse gradients alone; take Adam")
    mixed = str(trainer.precision).endswith("-mixed")
    if optimizer.defaults.get("fused") and mixed and trainer.gradient_clip_val:
        raise UserError(
            "model.optimizer.fused",
            "Lightning cannot clip gradients of a fused optimizer in mixed precision; "
            "set fused to false, or trainer.gradient_clip_val to null",
        )
    return optimizer


def make_schedule(make: LRSchedulerCallable, optimizer: torch.optim.Optimizer, trainer: Trainer) -> dict[str, Any]:
    """The learning-rate schedule in Lightning's form, stepped once per optimizer step.

    Raises:
        UserError: It cannot be made.
    """
    with naming("model.scheduler"):
        scheduler = by_step(make(optimizer))
    if isinstance(scheduler, Warmup):
        scheduler.set_total_steps(trainer.estimated_stepping_batches)
    return {"scheduler": scheduler, "interval": "step"}


@contextmanager
def naming(option: str) -> Iterator[None]:
    """Turn what torch refuses inside into an error that names ``option``.

    Raises:
        UserError: torch refused something.
    """
    try:
        yield
    except (ValueError, TypeError) as error:
        raise UserError(option, f"{first_line(error)}; change its options, or take another") from error
