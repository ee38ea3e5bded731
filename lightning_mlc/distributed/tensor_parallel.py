"""The linear layers of a decoder layer, split over processes that run the same examples.

The model's own plan in ``transformers`` says which layers are split, and how. They come in pairs (Megatron-LM, arXiv
1909.08053, section 3). The outputs of the first layer are split ("colwise"): each process computes some attention
heads, or some features of the feed-forward layer. The second layer takes them as its inputs and sums the results over
the processes ("rowwise"). Between pairs, every process has the whole hidden states, with the same values. All other
parts of the model (embeddings, norms, ``lm_head``) are whole on every process too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from lightning_mlc.errors import UserError

OPTION = "trainer.strategy.tensor_parallel_size"
STYLES: dict[str, type[ParallelStyle]] = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}
"""The supported ways to split, by their names in the plans of ``transformers``. Tensors are whole around each pair."""
DIVIDED = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
"""Entries of a model's configuration that the number of processes must divide."""


def plan_of(config: Any, size: int) -> dict[str, str]:
    """The plan by which ``size`` processes split the decoder layers of a model with ``config``.

    Returns:
        A key of ``STYLES`` for the name of each linear layer to split, within a decoder layer.

    Raises:
        UserError: They cannot be split, or this has not been tested.
    """
    config = config.get_text_config()
    name = config.model_type
    # Such as "layers.*.self_attn.q_proj". Entries without a number are outside of the layers, and stay whole.
    whole_plan: dict[str, str] = config.base_model_tp_plan or {}
    plan = {path.partition(".*.")[2]: style for path, style in whole_plan.items() if ".*." in path}
    if not plan:
        raise UserError(OPTION, f"transformers has no plan to split the layers of {name}; set it to 1")
    if unknown := [f"{path} ({style})" for path, style in plan.items() if style not in STYLES]:
        raise UserError(
            OPTION,
            f"the plan to split the layers of {name} has more than pairs of linear layers, such as {unknown[0]}, "
            "which is not supported; set it to 1",
        )
    for number in DIVIDED:
        count = getattr(config, number, None)
        if count is not None and count % size:
            raise UserError(
                OPTION, f"{size} does not divide the {number} of {name}, which is {count}; give a number that does"
            )
    return plan


def split(layer: nn.Module, plan: Mapping[str, str], mesh: DeviceMesh) -> None:
    """Split the linear layers in a decoder ``layer`` over ``mesh``, in place: each process keeps a part of the weights.

    All processes of the mesh must call it, with the same layer. The layer is run as before.

    Raises:
        UserError: The layer has other parameters between the linear layers of a pair.
    """
    styles = {name: STYLES[plan[name]]() for name, _ in layer.named_modules() if name in plan}
    # Between the two layers of a pair, a process has only a part of the features. A parameter there, such as that of a
    # query norm, would have another gradient on each process. Plans do not name all such parameters.
    blocks = tuple({name[: name.rfind(".") + 1] for name in styles})
    for name, _ in layer.named_parameters():
        owner, _, _ = name.rpartition(".")
        is_split = owner in styles and isinstance(layer.get_submodule(owner), nn.Linear)
        if name.startswith(blocks) and not is_split:
            raise UserError(
                OPTION,
                f"{type(layer).__name__} has the parameter {name} between the layers to split, "
                "which is not supported; set it to 1",
            )
    # Every process has all weights, so nothing is sent.
    parallelize_module(layer, mesh, styles, src_data_rank=None)
