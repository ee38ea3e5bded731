"""How much memory a configuration takes on each GPU, without loading a weight or having a GPU.

What is kept from step to step is counted: weights, gradients, optimizer state, the reference. What a step itself needs
is found by running it, on the largest of the data's batches, with tensors that have shapes and no values
(PyTorch's fake tensors): the model's own forward and backward pass, whatever its architecture, packing, chunks of
logits, adapters and checkpointing included.
"""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_mlc.data.batches import Batch
from lightning_mlc.data.datamodule import MultilingualData
from lightning_mlc.data.row_layout import Layout
from lightning_mlc.distributed.sharding import FSDP2
from lightning_mlc.distributed.tensor_parallel import OPTION
from lightning_mlc.errors import UserError, first_line
from lightning_mlc.models.attention import packed_layout_of
from lightning_mlc.models.forward import run_batch
from lightning_mlc.models.layers import num_layers, resolve_layer
from lightning_mlc.models.loading import dtype_of
from lightning_mlc.models.policy import Policy, Shortcuts
from lightning_mlc.models.tensors import replace_tensors
from lightning_mlc.sources import load_config
from lightning_mlc.training.module import AlignmentModule

GB = 10**9
GPUS = {"24 GB": 24, "40 GB": 40, "80 GB": 80, "141 GB": 141}
"""Memory of common GPUs, in GB."""
RESERVED = 0.1
"""Share of a GPU that an estimate leaves to the driver, communication buffers and fragmentation."""
QUANTISED_BITS = {"nf4": 4.127, "int8": 8.0}
"""Bits of a weight, with its share of the scales: arXiv 2305.14314, section 3, "Double Quantization"."""
EVERY_SHORTCUT = Shortcuts(True, True, True)
"""What nearly all models take."""
IS_SO = False
"""Answer to a model that asks whether something is so of all values of a tensor, as recurrent ones ask whether a batch
has no padding, and then do less. The largest batch has some, as a rule."""
BATCHES = 500
"""Micro-batches that are looked at for the largest."""


@dataclass(frozen=True)
class Setup:
    """How a run divides its work, and in which precision it does it."""

    precision: str
    processes: int
    accumulate: int
    strategy: str
    """``single``, ``ddp`` or ``fsdp2``."""
    reshard_after_forward: bool = True
    cpu_offload: bool = False

    @property
    def shards(self) -> int:
        """Processes that weights, gradients and optimizer state are shared out over."""
        return self.processes if self.strategy == "fsdp2" else 1

    @property
    def gathers_half(self) -> bool:
        """Whether weights are gathered, and layers run with them, in bfloat16."""
        return self.strategy == "fsdp2" and self.precision == "bf16-mixed"


@dataclass(frozen=True)
class Estimate:
    """Bytes on each GPU."""

    parameters: int
    """Parameters of the model, not bytes."""
    trained: int
    """Those of them that are trained, and those of the extractor."""
    parts: Mapping[str, int]
    """What is in memory while gradients are computed."""
    optimizer_step: int
    """Bytes in memory while the optimizer runs."""

    @property
    def peak(self) -> int:
        """Most bytes that are in memory at once."""
        return max(sum(self.parts.values()), self.optimizer_step)

    def fits(self, gigabytes: float) -> bool:
        """Whether a GPU with so much memory is enough, some of which is kept free."""
        return self.peak <= gigabytes * GB * (1 - RESERVED)


def setup_of(trainer: Any) -> Setup:
    """What the options ``trainer`` of a configuration say; as many devices as there are is 1, or 8 under FSDP2.

    Raises:
        UserError: Layers are to be split, which shares out memory in ways that are not known here.
    """
    strategy = trainer.strategy
    sharded = isinstance(strategy, FSDP2)
    if sharded and strategy.tensor_parallel_size > 1:
        raise UserError(OPTION, "what layers that are split take is not known; set it to 1 for an estimate without it")
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
    """The micro-batch with the most tokens, padding included, among the first of an epoch."""
    largest: Batch = max(itertools.islice(data.train_dataloader(), BATCHES), key=cells)
    return largest


def cells(batch: Batch) -> int:
    """Tokens of ``batch``, padding included."""
    every = (*batch.responses, *batch.translations, *batch.prompts, *batch.mismatched)
    return sum(rows.input_ids.numel() for rows in every)


class CannotRun(UserError):
    """A model that cannot be run without values, in the way that was tried."""


@dataclass(frozen=True)
class Way:
    """How a model may be run."""

    layout: Layout
    shortcuts: Shortcuts

    def __str__(self) -> str:
        rows = "packed rows" if self.layout.packed else "padded rows"
        return rows if any(self.shortcuts) else f"{rows}, the plain way"


def ways(module: AlignmentModule) -> list[Way]:
    """How ``module``'s model may be run, the way that most are run in first.

    A run compares results to find out (:mod:`lightning_mlc.models.self_check`). Without values all that shows is
    whether a way works at all.
    """
    packed = packed_layout_of(load_config(module.source), module.builder.attn_implementation or "sdpa")
    found = [] if packed is None or module.builder.packing is False else [Way(packed, EVERY_SHORTCUT)]
    if found and module.builder.packing:
        return found
    return [*found, Way(Layout(), EVERY_SHORTCUT), Way(Layout(), Shortcuts())]


def estimate_largest(module: AlignmentModule, data: MultilingualData, setup: Setup) -> tuple[Estimate, Batch, Way]:
    """What ``module``'s configuration takes on the largest batch of ``data``, that batch, and how it is run.

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
            problem = error  # that of the plain way is the model's own
    assert problem is not None
    raise problem


def estimate(module: AlignmentModule, batch: Batch, setup: Setup, shortcuts: Shortcuts = EVERY_SHORTCUT) -> Estimate:
    """What ``module``'s configuration takes when it is trained on ``batch``.

    ``shortcuts`` are those that its model takes, if it has a decoder to take them with.

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
        # Gradients that the pass makes are in its peak, of which they are told apart here.
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
    """Bytes of the weights of ``policy``, quantised ones among them."""
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
    """Whether a reference model of its own is in memory."""
    return module.uses_reference and module.reference.mode == "online" and module.lora is None


def _extractor_size(module: AlignmentModule, policy: Policy) -> int:
    settings = module.consistency
    if not settings.needs.representations or settings.extractor != "linear":
        return 0
    width = int(policy.causal_lm.config.get_text_config().hidden_size)
    return (width + settings.extractor_bias) * settings.extractor_dim


def optimizer_bytes(optimizer: Callable[[Any], torch.optim.Optimizer]) -> int:
    """Bytes of state that ``optimizer`` keeps for each float32 parameter, found by a step on a few."""
    parameter = nn.Parameter(torch.zeros(1024))
    parameter.grad = torch.zeros_like(parameter)
    made = optimizer([parameter])
    made.step()
    tensors = [leaf for leaf in tree_leaves(made.state[parameter]) if isinstance(leaf, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors) // parameter.numel()


# ---- what a step needs ------------------------------------------------------------------------------


def _step_bytes(module: AlignmentModule, policy: Policy, batch: Batch, setup: Setup, makes_gradients: bool) -> int:
    """Most bytes that a forward and backward pass over ``batch`` have in memory at once, beside the weights.

    Gradients are in it if the pass ``makes_gradients``; else they are there already, or go to other processes.
    """
    needs = module.consistency.needs
    layer = resolve_layer(module.consistency.layer, num_layers(policy.causal_lm.config))
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
                    rows = batch if module.consistency.terms else batch.without_translations()
                    if _keeps_reference(module):
                        with torch.no_grad():
                            run_batch(policy, dataclasses.replace(rows, prompts=()), pool=needs.pooled_states)
                    grid = run_batch(policy, rows, layer if needs.representations else None, needs.pooled_states)
                    results = [grid.logps, grid.states, grid.pooled]
                    loss = torch.stack([part.float().sum() for part in results if part is not None]).sum()
                loss.backward()  # type: ignore[no-untyped-call]
    except UserError:
        raise
    except DataDependentOutputException as error:
        raise CannotRun(
            "estimate",
            f"{type(policy.causal_lm).__name__} decides by values what it computes, and an estimate has none; run "
            "`fit` with --trainer.max_steps 1 instead, whose report/summary.json says how much memory it took",
        ) from error
    except Exception as error:  # foreign code, which may look at values that are not there
        raise CannotRun(
            "estimate",
            f"{type(policy.causal_lm).__name__} cannot be run without values "
            f"({first_line(error)}); its memory is not known",
        ) from error
    return count.peak


def _fake(tensor: Tensor, gathers_half: bool) -> Tensor:
    half = gathers_half and isinstance(tensor, nn.Parameter)
    return torch.empty(tensor.shape, dtype=torch.bfloat16 if half else tensor.dtype, device="cpu")


def _grouped_product(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """A tensor as ``torch.nn.functional.grouped_mm`` makes of ``a`` and ``b``, the product of all experts at once.

    Without values torch refuses all dtypes but bfloat16, though the product itself takes float32.
    """
    rows, columns = a.shape[-2], b.shape[-1]
    groups = [len(offs)] if offs is not None and a.ndim == b.ndim == 2 else list(a.shape[:-2]) if b.ndim == 3 else []
    return a.new_empty([*groups, rows, columns], dtype=out_dtype or a.dtype)


class _Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that operations make, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return IS_SO
        before = {self._key(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        run = _grouped_product if function is torch.ops.aten._grouped_mm.default else function
        result = run(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and self._key(tensor) not in before | self._seen:
                self._add(tensor.untyped_storage())
        return result

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return int(tensor.untyped_storage()._cdata)

    def _add(self, storage: Any) -> None:
        key, size = int(storage._cdata), int(storage.nbytes())
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


@contextmanager
def counting() -> Iterator[_Count]:
    """Counts what operations inside the context allocate."""
    with _Count() as count:
        yield count


def _gathered_bytes(policy: Policy, setup: Setup) -> int:
    """Under FSDP2, bytes of the weights gathered while a layer runs, and of gradients on their way out of it."""
    if setup.strategy != "fsdp2":
        return 0
    width = 2 if setup.gathers_half else dtype_of(setup.precision).itemsize
    layers = [list(layer.parameters()) for layer in policy.layers]
    sizes = [sum(parameter.numel() for parameter in layer) for layer in layers]
    trained = [sum(parameter.numel() for parameter in layer if parameter.requires_grad) for layer in layers]
    in_layers = {id(parameter) for layer in layers for parameter in layer}
    rest = [parameter for parameter in policy.parameters() if id(parameter) not in in_layers]
    # The next layer's weights are on their way while one runs; without resharding all stay.
    held = 2 * max(sizes) if setup.reshard_after_forward else sum(sizes)
    gathered = held + sum(parameter.numel() for parameter in rest)
    # The rest's gradients are kept until the pass ends; a layer's are there as computed and, in float32, as sent.
    sent = sum(parameter.numel() for parameter in rest if parameter.requires_grad)
    return (gathered + sent) * width + max(trained) * (width + 4)
