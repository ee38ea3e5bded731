"""A model sharded over processes: PyTorch's FSDP2 as a Lightning strategy.

Every process holds a part of each weight, of its gradient and of its optimizer state. The weights of a decoder layer
are gathered when the layer runs and freed afterwards. Each gradient is reduced to the process that holds the weight.
The computation stays the same, and so do losses, gradients and checkpoints.

There are two differences from data parallelism, in which processes communicate only once a step:

- Processes communicate in every layer, so all must run the same number of passes (:meth:`FSDP2.with_equal_passes`).
- A process cannot hold a whole model, not even while it is loaded. Process 0 reads the model, and the others know only
  its shapes (:func:`materialize`).

Processes may also split the work on one example (:mod:`lightning_mlc.distributed.tensor_parallel`). The processes then
form a mesh of two dimensions: processes of consecutive ranks split a layer, and the parts are sharded along the other
dimension.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import (
    DDPStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from lightning_mlc.checkpoints import format as checkpoint_format
from lightning_mlc.data.batches import Batch, Normalizers
from lightning_mlc.data.rows import NO_RESPONSE, TokenRows, TokenSequence
from lightning_mlc.distributed import tensor_parallel
from lightning_mlc.errors import UserError
from lightning_mlc.lightning_internals import move_except, set_backend, set_data_parallel_size
from lightning_mlc.models.policy import Policy
from lightning_mlc.models.tensors import replace_tensors


class FSDP2(ModelParallelStrategy):
    """Fully sharded data parallelism over all processes, and tensor parallelism within groups of them.

    Args:
        reshard_after_forward: Free a layer's weights after its forward pass and gather them again for the
            backward pass (ZeRO-3). False keeps them until then (ZeRO-2): more memory, less communication.
        cpu_offload: Keep weights, gradients and optimizer state in CPU memory, and run the optimizer there.
        tensor_parallel_size: The number of processes that split each layer and run the same examples. 1: no split.
        sharded_checkpoints: Save a checkpoint as a folder, to which each process adds its part. False: gather
            everything in the CPU memory of process 0 and save one file, like the other strategies.
        timeout_minutes: How long a process waits for the others before it gives up.
    """

    def __init__(
        self,
        reshard_after_forward: bool = True,
        cpu_offload: bool = False,
        tensor_parallel_size: int = 1,
        sharded_checkpoints: bool = True,
        timeout_minutes: int = 30,
    ) -> None:
        super().__init__(
            tensor_parallel_size=tensor_parallel_size,
            save_distributed_checkpoint=sharded_checkpoints,
            timeout=timedelta(minutes=timeout_minutes),
        )
        self.reshard_after_forward = reshard_after_forward
        self.cpu_offload = cpu_offload
        self.tensor_parallel_size = tensor_parallel_size
        self.sharded_checkpoints = sharded_checkpoints
        self._cpu_group: Any = None

    # ---- processes ----------------------------------------------------------------------------------

    def setup_environment(self) -> None:
        processes, together = self.num_nodes * self.num_processes, self.tensor_parallel_size
        if together > 1 and self.cpu_offload:
            raise UserError(
                tensor_parallel.OPTION,
                "split weights have not been tested with cpu_offload; set it to 1, "
                "or trainer.strategy.cpu_offload to false",
            )
        if together < 1 or processes % together:
            raise UserError(
                tensor_parallel.OPTION,
                f"{together} does not divide the {processes} processes; "
                "give a number that does, or change trainer.devices",
            )
        set_data_parallel_size(self, processes // together)
        if self.cpu_offload and self.root_device.type == "cuda":
            # Gradients are in CPU memory, so their norm is summed over the processes by gloo.
            set_backend(self, "cpu:gloo,cuda:nccl")
        super().setup_environment()
        # For counts, which are exchanged without waiting for the GPU.
        self._cpu_group = distributed.new_group(backend="gloo")

    def model_to_device(self) -> None:
        """Move everything that is not sharded. Shards stay where they are: with ``cpu_offload`` in CPU memory."""
        assert self.lightning_module is not None
        move_except(self.lightning_module, self.root_device, stays=_is_part)

    # ---- sharding -----------------------------------------------------------------------------------

    def require_splittable(self, config: Any) -> dict[str, str]:
        """The plan to split the layers of a model with ``config``. Empty if ``tensor_parallel_size`` is 1.

        Raises:
            UserError: They cannot be split.
        """
        return tensor_parallel.plan_of(config, self.tensor_parallel_size) if self.tensor_parallel_size > 1 else {}

    def shard(self, policy: Policy, precision: str) -> Policy:
        """Shard ``policy`` in place, if it is not yet: each decoder layer is a unit, and the rest is one more.

        The rest (embeddings, final norm, ``lm_head``) stays gathered from its forward pass to its backward pass, and
        holds both ends of tied embeddings. A policy without trained parameters has no backward pass.
        """
        if is_sharded(policy):
            return policy
        trains = any(parameter.requires_grad for parameter in policy.parameters())
        options = self._options(precision)
        plan = self.require_splittable(policy.causal_lm.config)
        for layer in policy.layers:
            materialize(layer, self.root_device)
            if plan:
                tensor_parallel.split(layer, plan, self.device_mesh["tensor_parallel"])
            fully_shard(layer, reshard_after_forward=self.reshard_after_forward or not trains, **options)
        materialize(policy, self.root_device)
        fully_shard(policy, reshard_after_forward=not trains, **options)
        register_fsdp_forward_method(policy, "generate")
        return policy

    def shard_methods(self, module: nn.Module, *methods: str) -> None:
        """Shard a small ``module`` as one unit in its own precision. ``methods`` gather weights as ``forward`` does."""
        materialize(module, self.root_device)
        if next(module.parameters(), None) is None:
            return
        fully_shard(module, **self._options("32-true"))
        for method in methods:
            register_fsdp_forward_method(module, method)

    def _options(self, precision: str) -> dict[str, Any]:
        half = torch.bfloat16 if precision == "bf16-mixed" else None
        offload = CPUOffloadPolicy(pin_memory=self.root_device.type == "cuda")
        return {
            "mesh": self.device_mesh["data_parallel"],
            # Weights are gathered in half precision, but gradients are never summed in it.
            "mp_policy": MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32),
            "offload_policy": offload if self.cpu_offload else OffloadPolicy(),
        }

    def with_equal_passes(self, batch: Batch) -> Batch:
        """``batch`` with as many passes as the process with the most has, because all communicate in each pass."""
        kinds = ("responses", "translations", "prompts", "mismatched")
        own = torch.tensor([len(getattr(batch, kind)) for kind in kinds])
        most = own.clone()
        distributed.all_reduce(most, distributed.ReduceOp.MAX, group=self._cpu_group)
        filled: dict[str, Any] = {
            kind: (*getattr(batch, kind), *([_idle_pass(kind != "prompts")] * missing))
            for kind, missing in zip(kinds, (most - own).tolist(), strict=True)
        }
        return dataclasses.replace(batch, **filled)

    def in_step(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """``batches`` with equal passes. A process with fewer batches than another adds batches without examples."""
        own = iter(batches)
        while True:
            batch = next(own, None)
            left = torch.tensor([batch is not None])
            distributed.all_reduce(left, distributed.ReduceOp.MAX, group=self._cpu_group)
            if not left:
                return
            yield self.with_equal_passes(_NO_EXAMPLES if batch is None else batch)

    def agree_on_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Average the gradients of weights that are not split over the processes of a tensor-parallel group.

        All of these processes compute the same values. But a GPU may add in another order each time, so the copies of a
        weight would slowly drift apart.
        """
        if self.tensor_parallel_size == 1:
            return
        group = self.device_mesh["tensor_parallel"].get_group()
        for gradient in (parameter.grad for parameter in parameters):
            assert isinstance(gradient, DTensor | None)
            # Split weights are on a mesh of two dimensions. So are the biases of "rowwise" layers, which are not split.
            if gradient is not None and (gradient.device_mesh.ndim == 1 or gradient.placements[1].is_replicate()):
                part = gradient.to_local()
                distributed.all_reduce(part, group=group)
                part.div_(self.tensor_parallel_size)

    def clip_gradients(self, parameters: Iterable[Tensor], max_norm: float) -> None:
        """Scale all gradients so that their norm, over all parameters and processes, is ``max_norm`` at most."""
        # Split weights are on a mesh of two dimensions, others on a mesh of one. torch cannot add norms across meshes.
        groups: dict[Any, list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            if isinstance(parameter.grad, DTensor):
                groups[parameter.grad.device_mesh].append(parameter)
        norms = [get_total_norm([p.grad for p in group if p.grad is not None]) for group in groups.values()]
        total = get_total_norm([norm.full_tensor() for norm in norms if isinstance(norm, DTensor)])
        for group in groups.values():
            clip_grads_with_norm_(group, max_norm, total)

    # ---- checkpoints --------------------------------------------------------------------------------

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return Strategy.optimizer_state(self, optimizer)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        path = Path(self.broadcast(filepath))
        if self.sharded_checkpoints:
            checkpoint_format.save_folder(checkpoint, path)
        else:
            whole = checkpoint_format.gather(checkpoint, self.root_device, keep=self.is_global_zero)
            Strategy.save_checkpoint(self, whole, path, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return checkpoint_format.open_checkpoint(Path(self.broadcast(checkpoint_path)))

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        assert self.lightning_module is not None
        own, saved = self.lightning_module.state_dict(), checkpoint["state_dict"]
        checkpoint_format.load_into({key: own[key] for key in saved}, saved)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = checkpoint_format.sharded_like(parameters, saved["state"])
            optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})


def is_sharded(module: Any) -> bool:
    """Whether ``module`` is a unit of FSDP2."""
    return isinstance(module, FSDPModule)


def move(policy: Policy, device: torch.device) -> Policy:
    """``policy`` on ``device``. A sharded policy stays where it is."""
    return policy if is_sharded(policy) else policy.to(device)


def require_supported(strategy: str | Strategy) -> None:
    """Refuse strategies with which a training step would be wrong, or has not been tested.

    Raises:
        UserError: ``strategy`` is one of them.
    """
    name = strategy.rpartition(".")[2] if isinstance(strategy, str) else type(strategy).__name__
    if isinstance(strategy, str):
        supported = strategy == "auto" or strategy.startswith("ddp")
    else:
        supported = isinstance(strategy, FSDP2 | DDPStrategy | SingleDeviceStrategy)
    if supported:
        return
    if name == ModelParallelStrategy.__name__ or isinstance(strategy, ModelParallelStrategy):
        instead = "use --config strategy/fsdp2, which is FSDP2 with or without tensor parallelism"
    elif name in (FSDPStrategy.__name__, "fsdp", "fsdp_cpu_offload"):
        instead = "FSDP1 allows one forward pass per step, but a step has several; use --config strategy/fsdp2"
    elif "deepspeed" in name.lower():
        instead = (
            "FSDP2 shards the same way: for ZeRO-3 use --config strategy/fsdp2, "
            "for ZeRO-2 add --trainer.strategy.reshard_after_forward false"
        )
    else:
        instead = "use auto, ddp, or --config strategy/fsdp2"
    raise UserError("trainer.strategy", f"{name} is not supported; {instead}")


def materialize(module: nn.Module, device: torch.device) -> None:
    """Copy the parameters and buffers of ``module`` from process 0 to all processes, onto ``device``.

    On the other processes they may be on the ``meta`` device, because only their shapes are read. Tensors that are
    already sharded stay as they are.
    """
    replace_tensors(
        module, lambda tensor: tensor if isinstance(tensor, DTensor) else _from_process_zero(tensor, device)
    )


@torch.no_grad()
def _from_process_zero(tensor: Tensor, device: torch.device) -> Tensor:
    if distributed.get_rank() == 0:
        values = tensor.detach().to(device).contiguous()
    else:
        values = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    distributed.broadcast(values, src=0)
    return values


_NO_EXAMPLES = Batch((), torch.zeros(0, dtype=torch.int64), ("",), 0, (), (), Normalizers(0.0, 0.0, 0.0, 0.0, 0.0))


def _idle_pass(with_response: bool) -> TokenRows:
    """Rows that belong to no example. They are run, but their results are not used and their gradient is zero.

    They have a first position, so that all processes run the same parts of the model where logits are read there.
    """
    row = TokenSequence((0,), (0,) if with_response else (), 0, 0, NO_RESPONSE, leads=False, positions=1)
    return TokenRows.pad([row], 0)


def _is_part(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)
