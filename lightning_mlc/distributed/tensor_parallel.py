"""The linear layers of a decoder layer, split over processes that run the same examples.

Which of them can be split, and how, is what a model's own plan in ``transformers`` says. Layers come in pairs
(Megatron-LM, arXiv 1909.08053, section 3). The first one's outputs are shared out ("colwise"): a process computes some
heads of attention, or some features of the feed-forward layer. The second one takes them as its inputs and adds up what
each process makes of its own ("rowwise"). Between the pairs every process has the whole hidden states, the same on
each, and so has all else that a model is made of: embeddings, norms, ``lm_head``.
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
"""What can be split, by its name in the plans of ``transformers``. Tensors are whole before and after each pair."""
SHARED_OUT = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
"""Numbers in a model's configuration of what processes share out."""


def plan_of(config: Any, size: int) -> dict[str, str]:
    """How ``size`` processes split the decoder layers of a model with ``config``: a style for each linear layer in one.

    Raises:
        UserError: They cannot, or are not known to.
    """
    config = config.get_text_config()
    name = config.model_type
    # As in "layers.*.self_attn.q_proj"; what has no number is outside of the layers, and stays whole.
    whole_plan: dict[str, str] = config.base_model_tp_plan or {}
    plan = {path.partition(".*.")[2]: style for path, style in whole_plan.items() if ".*." in path}
    if not plan:
        raise UserError(OPTION, f"transformers has no plan of how to split the layers of {name}; set it to 1")
    if unknown := [f"{path} ({style})" for path, style in plan.items() if style not in STYLES]:
        raise UserError(
            OPTION,
            f"the layers of {name} have more than pairs of linear layers to split, {unknown[0]}, "
            "which is not supported; set it to 1",
        )
    for number in SHARED_OUT:
        count = getattr(config, number, None)
        if count is not None and count % size:
            raise UserError(OPTION, f"{size} does not divide the {number} {count} of {name}; give a number that does")
    return plan


def split(layer: nn.Module, plan: Mapping[str, str], mesh: DeviceMesh) -> None:
    """Split the linear layers in a decoder ``layer`` over ``mesh``, in place: each process keeps a part of the weights.

    To be called by all processes of the mesh, which have the same layer. What runs it need not know.

    Raises:
        UserError: The layer has parameters that would meet a share of the features unprepared.
    """
    styles = {name: STYLES[plan[name]]() for name, _ in layer.named_modules() if name in plan}
    # Between the two of a pair is a part of the features. A parameter there, such as of a norm of queries, would have
    # another gradient on each process, and plans do not tell of all.
    blocks = tuple({name[: name.rfind(".") + 1] for name in styles})
    for name, _ in layer.named_parameters():
        owner, _, _ = name.rpartition(".")
        is_split = owner in styles and isinstance(layer.get_submodule(owner), nn.Linear)
        if name.startswith(blocks) and not is_split:
            raise UserError(
                OPTION,
                f"{type(layer).__name__} has parameters between linear layers to split, {name}, "
                "which is not supported; set it to 1",
            )
    # All have the weights at hand, so none is sent.
    parallelize_module(layer, mesh, styles, src_data_rank=None)
