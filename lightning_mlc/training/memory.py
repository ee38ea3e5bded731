"""Estimate the memory that a configuration needs on each GPU, without loading weights and without a GPU.

Memory that is kept from step to step is counted: weights, gradients, optimizer state, the reference. The memory of a
step is found by running one on the largest batch of the data, with PyTorch's fake tensors, which have shapes but no
values. This is the model's own forward and backward pass, so it works for any architecture, and includes packing,
chunks of logits, adapters and checkpointing.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._pytree import tree_leaves

from lightning_mlc.consistency import Observed
from lightning_mlc.data.batches import Batch
from lightning_mlc.data.datamodule import MultilingualData
from lightning_mlc.data.row_layout import Layout
from lightning_mlc.distributed.sharding import FSDP2
from lightning_mlc.distributed.tensor_parallel import OPTION
from lightning_mlc.errors import UserError, first_line
from lightning_mlc.models.attention import packed_layout_of
from lightning_mlc.models.forward import run_batch
from lightning_mlc.models.layers import highest_layer, num_layers
from lightning_mlc.models.loading import dtype_of
from lightning_mlc.models.policy import Policy, Shortcuts
from lightning_mlc.models.tensors import replace_tensors
from lightning_mlc.reference.online import rows_to_score
from lightning_mlc.sources import load_config
from lightning_mlc.training.live_bytes import counting
from lightning_mlc.training.module import AlignmentModule

GB = 10**9
GPUS = {"24 GB": 24, "40 GB": 40, "80 GB": 80, "141 GB": 141}
"""Memory of common GPUs, in GB."""
RESERVED = 0.1
"""Share of a GPU that is kept free for the driver, communication buffers and fragmentation."""
QUANTISED_BITS = {"nf4": 4.127, "int8": 8.0}
"""Bits per weight, including the scales: arXiv 2305.14314, section 3, "Double Quantization"."""
EVERY_SHORTCUT = Shortcuts(True, True, True)
"""The shortcuts that nearly all models allow."""
BATCHES = 500
"""The number of micro-batches from which the largest is taken."""


@dataclass(frozen=True)
class Setup:
    """How a run divides its work among processes, and its precision."""

    precision: str
    processes: int
    accumulate: int
    strategy: str
    """``single``, ``ddp`` or ``fsdp2``."""
    reshard_after_forward: bool = True
    cpu_offload: bool = False

    @property
    def shards(self) -> int:
        """The number of processes that weights, gradients and optimizer state are sharded over."""
        return self.processes if self.strategy == "fsdp2" else 1

    @property
    def gathers_half(self) -> bool:
        """Whether weights are gathered in bfloat16, in which layers then run."""
        return self.strategy == "fsdp2" and self.precision == "bf16-mixed"


@dataclass(frozen=True)
class Estimate:
    """Bytes on each GPU."""

    parameters: int
    """Parameters of the model, not bytes."""
    trained: int
    """Trained parameters, including those of the extractor."""
    parts: Mapping[str, int]
    """Bytes in memory while gradients are computed, by their use."""
    optimizer_step: int
    """Bytes in memory while the optimizer runs."""

    @property
    def peak(self) -> int:
        """The most bytes that are in memory at once."""
        return max(sum(self.parts.values()), self.optimizer_step)

    def fits(self, gigabytes: float) -> bool:
        """Whether a GPU with that many ``gigabytes`` is enough, if the share ``RESERVED`` is kept free."""
        return self.peak <= gigabytes * GB * (1 - RESERVED)


def setup_of(trainer: Any) -> Setup:
    """The setup that the options ``trainer`` of a configuration describe.

    If they give no number of devices, it is 1, or 8 with FSDP2.

    Raises:
        UserError: The configuration splits layers, for which there is no estimate.
    """
    strategy = trainer.strategy
    sharded = isinstance(strategy, FSDP2)
    if sharded and strategy.tensor_parallel_size > 1:
        raise UserError(
            OPTION, "the memory of split layers cannot be estimated; set it to 1 for an estimate without it"
        )
    devices = trainer.devices
    if isinstance(devices, list):
        count = len(devices)
    elif str(devices).lstrip("-").isdigit() and int(devices) > 0:
        count = int(devices)
    else:
        count = 8 if sharded else 1
    processes = count * int(trainer.num_nodes)
    return Setup(
        precision=str(trainer.precision or "32-true"),
        processes=processes,
        accumulate=int(trainer.accumulate_grad_batches),
        strategy="fsdp2" if sharded else "ddp" if processes > 1 else "single",
        reshard_after_forward=strategy.reshard_after_forward if sharded else True,
        cpu_offload=strategy.cpu_offload if sharded else False,
    )


def largest_batch(data: MultilingualData) -> Batch:
    """The micro-batch with the most tokens, including padding, among the first of an epoch."""
    largest: Batch = max(itertools.islice(data.train_dataloader(), BATCHES), key=cells)
    return largest


def cells(batch: Batch) -> int:
    """Tokens of ``batch``, including padding."""
    every = (*batch.responses, *batch.translations, *batch.prompts, *batch.mismatched)
    return sum(rows.input_ids.numel() for rows in every)


class CannotRun(UserError):
    """The model cannot be run without values in the way that was tried."""


@dataclass(frozen=True)
class Way:
    """A way to run a model."""

    layout: Layout
    shortcuts: Shortcuts

    def __str__(self) -> str:
        rows = "packed rows" if self.layout.packed else "padded rows"
        return rows if any(self.shortcuts) else f"{rows}, the plain way"


def ways(module: AlignmentModule) -> list[Way]:
    """The ways in which the model of ``module`` may be run. The way of most models comes first.

    ``fit`` compares results to choose a way (:mod:`lightning_mlc.models.self_check`). Without values, one can only see
    whether a way works at all.
    """
    packed = packed_layout_of(load_config(module.source), module.builder.attn_implementation or "sdpa")
    found = [] if packed is None or module.builder.packing is False else [Way(packed, EVERY_SHORTCUT)]
    if found and module.builder.packing:
        return found
    return [*found, Way(Layout(), EVERY_SHORTCUT), Way(Layout(), Shortcuts())]


def estimate_largest(module: AlignmentModule, data: MultilingualData, setup: Setup) -> tuple[Estimate, Batch, Way]:
    """Estimate the memory of ``module``'s configuration on the largest batch of ``data``.

    Returns:
        The estimate, that batch, and the way in which the model is run.

    Raises:
        CannotRun: The model cannot be run without values in any way.
    """
    problem: CannotRun | None = None
    for way in ways(module):
        data.layout = way.layout
        batch = largest_batch(data)
        try:
            return estimate(module, batch, setup, way.shortcuts), batch, way
        except CannotRun as error:
            problem = error  # the last one is of the plain way, so the model itself is the reason
    assert problem is not None
    raise problem


def estimate(module: AlignmentModule, batch: Batch, setup: Setup, shortcuts: Shortcuts = EVERY_SHORTCUT) -> Estimate:
    """Estimate the memory of ``module``'s configuration when it is trained on ``batch``.

    ``shortcuts`` are those of the model, if it has a decoder that can take them.

    Raises:
        CannotRun: The model cannot be run without values.
    """
    policy = _without_weights(module, setup.precision)
    if policy.decoder is not None:
        policy.shortcuts = shortcuts
    extractor = _extractor_size(module, policy)
    master = dtype_of(setup.precision).itemsize
    total = sum(parameter.numel() for parameter in policy.parameters())
    trained = sum(parameter.numel() for parameter in policy.parameters() if parameter.requires_grad) + extractor
    weights = _stored_bytes(module, policy) + extractor * master
    gradients = trained * master
    gathered = _gathered_bytes(policy, setup)

    makes_gradients = setup.shards == 1 and setup.accumulate == 1
    step = _step_bytes(module, policy, batch, setup, makes_gradients)
    here = 0 if setup.cpu_offload else 1
    parts = {
        "weights": here * weights // setup.shards,
        "gradients": here * gradients // setup.shards,
        "optimizer state": here * trained * optimizer_bytes(module.optimizer_callable) // setup.shards,
        "reference": here * (weights - extractor * master) // setup.shards if _keeps_reference(module) else 0,
        # If the pass creates gradients, they are part of its peak, but have an entry of their own.
        "activations": max(0, step - gradients) if makes_gradients else step,
        "buckets of gradients": gradients if setup.strategy == "ddp" else 0,
        "gathered weights": gathered,
    }
    kept = sum(value for name, value in parts.items() if name not in ("activations", "gathered weights"))
    # On a GPU, PyTorch's optimizers work on all weights at once, with an intermediate result of their size.
    at_step = kept + here * gradients // setup.shards
    return Estimate(total, trained, {name: value for name, value in parts.items() if value}, at_step)


def _without_weights(module: AlignmentModule, precision: str) -> Policy:
    lora = None if module.lora is None else dataclasses.replace(module.lora, quantize=None)
    builder = dataclasses.replace(module.builder, lora=lora)
    return builder.wrap(builder.load(precision, torch.device("cpu"), weights=False))


def _stored_bytes(module: AlignmentModule, policy: Policy) -> int:
    """Bytes of the weights of ``policy``, some of which may be quantised."""
    form = None if module.lora is None else module.lora.quantize
    quantised: set[int] = set()
    if form is not None:
        linear = (layer for part in policy.layers for layer in part.modules() if isinstance(layer, nn.Linear))
        quantised = {id(layer.weight) for layer in linear if not layer.weight.requires_grad}
    bits = 0.0
    for parameter in policy.parameters():
        width = QUANTISED_BITS[form] if form is not None and id(parameter) in quantised else 8 * parameter.itemsize
        bits += parameter.numel() * width
    return int(bits / 8)


def _keeps_reference(module: AlignmentModule) -> bool:
    """Whether a separate reference model is in memory."""
    return module.uses_reference and module.reference.mode == "online" and module.lora is None


def _extractor_size(module: AlignmentModule, policy: Policy) -> int:
    settings = module.consistency
    if not settings.needs.representations or settings.extractor != "linear":
        return 0
    width = int(policy.causal_lm.config.get_text_config().hidden_size)
    return (width + settings.extractor_bias) * settings.extractor_dim


def optimizer_bytes(optimizer: Callable[[Any], torch.optim.Optimizer]) -> int:
    """Bytes of state that ``optimizer`` keeps per float32 parameter, found by a step on a small tensor."""
    parameter = nn.Parameter(torch.zeros(1024))
    parameter.grad = torch.zeros_like(parameter)
    made = optimizer([parameter])
    made.step()
    tensors = [leaf for leaf in tree_leaves(made.state[parameter]) if isinstance(leaf, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors) // parameter.numel()


# ---- the memory of a step ---------------------------------------------------------------------------


def _step_bytes(module: AlignmentModule, policy: Policy, batch: Batch, setup: Setup, makes_gradients: bool) -> int:
    """The most bytes that a forward and backward pass over ``batch`` has in memory at once, without the weights.

    Gradients are included if the pass ``makes_gradients``. Otherwise they exist already, or go to other processes.
    """
    autocast: Any = nullcontext()
    if setup.precision.endswith("-mixed") and not setup.gathers_half:
        half = torch.bfloat16 if setup.precision == "bf16-mixed" else torch.float16
        autocast = torch.autocast("cpu", dtype=half)
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            replace_tensors(policy, lambda tensor: _fake(tensor, setup.gathers_half))
            if not makes_gradients:
                for parameter in policy.parameters():
                    parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
            with counting() as count:
                with autocast:
                    loss = _loss(module, policy, batch)
                loss.backward()  # type: ignore[no-untyped-call]
    except UserError:
        raise
    except DataDependentOutputException as error:
        raise CannotRun(
            "estimate",
            f"{type(policy.causal_lm).__name__} computes different things for different values, and an estimate has no "
            "values; run `fit` with --trainer.max_steps 1 instead, and read the memory from report/summary.json",
        ) from error
    except Exception as error:  # the model's code may read values, which do not exist here
        raise CannotRun(
            "estimate",
            f"{type(policy.causal_lm).__name__} cannot be run without values "
            f"({first_line(error)}), so its memory cannot be estimated",
        ) from error
    return count.peak


def _loss(module: AlignmentModule, policy: Policy, batch: Batch) -> Tensor:
    """The forward pass of a step, and a loss that needs all of its results."""
    consistency, needs = module.consistency, module.consistency.needs
    layer = highest_layer(consistency.layer, num_layers(policy.causal_lm.config))
    rows = batch if consistency.terms else batch.without_translations()
    reference = None
    if _keeps_reference(module) or needs.reference_next_tokens:
        scored = rows_to_score(rows, needs)
        with torch.no_grad():
            at_layer = layer if needs.reference_states else None
            reference = run_batch(policy, scored, at_layer, needs.pooled_states, needs.reference_next_tokens)
    at_layer = layer if needs.representations else None
    grid = run_batch(policy, rows, at_layer, needs.pooled_states, needs.positions)
    # Terms that compare distributions make tensors of the size of logits.
    observed = Observed(grid, reference, None, batch.source, batch.is_ordinary)
    compared = [term.losses(observed) for term in consistency.terms if term.needs.positions]
    results = [grid.logps, grid.states, grid.pooled, *compared]
    return torch.stack([part.float().sum() for part in results if part is not None]).sum()


def _fake(tensor: Tensor, gathers_half: bool) -> Tensor:
    half = gathers_half and isinstance(tensor, nn.Parameter)
    return torch.empty(tensor.shape, dtype=torch.bfloat16 if half else tensor.dtype, device="cpu")


def _gathered_bytes(policy: Policy, setup: Setup) -> int:
    """With FSDP2: bytes of the weights that are gathered while a layer runs, and of the gradients that it sends."""
    if setup.strategy != "fsdp2":
        return 0
    width = 2 if setup.gathers_half else dtype_of(setup.precision).itemsize
    layers = [list(layer.parameters()) for layer in policy.layers]
    sizes = [sum(parameter.numel() for parameter in layer) for layer in layers]
    trained = [sum(parameter.numel() for parameter in layer if parameter.requires_grad) for layer in layers]
    in_layers = {id(parameter) for layer in layers for parameter in layer}
    rest = [parameter for parameter in policy.parameters() if id(parameter) not in in_layers]
    # While a layer runs, the next layer's weights are gathered. Without resharding all layers stay.
    held = 2 * max(sizes) if setup.reshard_after_forward else sum(sizes)
    gathered = held + sum(parameter.numel() for parameter in rest)
    # Gradients of the rest are kept until the pass ends. Those of a layer exist as computed and, in float32, as sent.
    sent = sum(parameter.numel() for parameter in rest if parameter.requires_grad)
    return (gathered + sent) * width + max(trained) * (width + 4)
