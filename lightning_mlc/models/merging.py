"""LoRA adapters merged into their base: whether the model is still the one that was trained."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from lightning_mlc.errors import UserError, first_line

logger = logging.getLogger(__name__)

TRIAL = (2, 12)
"""Sequences and tokens of the pass that both models make."""

ROUNDING = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""How far logits may lie apart, as a share of their deviation from their mean (Frobenius norms).

Merging rounds each weight once: by 6e-8 of it in float32, 5e-4 in float16, 4e-3 in bfloat16. Through a few dozen layers
that has grown by ten to some hundred times at most; weights that are not those that were trained err by 0.1 to 1.
"""


def trial_logits(model: Any) -> Tensor | None:
    """(N, T, V) float32 logits of the causal LM ``model`` for tokens that are always the same, on the CPU.

    None where the model cannot be run on its device, which is told.
    """
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    count = TRIAL[0] * TRIAL[1]
    ids = (torch.arange(1, count + 1) * 7919 % vocabulary).reshape(TRIAL).to(model.device)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits: Tensor = model(input_ids=ids, use_cache=False).logits.float().cpu()
    except (RuntimeError, NotImplementedError, ImportError, TypeError) as error:
        logger.warning("export: the model cannot be run here (%s), so its logits were not compared", first_line(error))
        return None
    finally:
        model.train(was_training)
    return logits


def apart(found: Tensor, right: Tensor) -> float:
    """How far ``found`` lies from ``right``, as a share of the latter's deviation from its mean; NaN equals NaN."""
    found, right = found.nan_to_num(), right.nan_to_num()
    return float((found - right).norm() / (right - right.mean()).norm().clamp_min(1e-30))


def require_merged(merged: Any, trained: Tensor | None, shared: str | None) -> None:
    """Compare ``merged`` with the logits of the model whose adapters were merged, ``trained``.

    Args:
        merged: The model without adapters.
        trained: Of :func:`trial_logits`.
        shared: What :func:`shared_weight` found before.

    Raises:
        UserError: They differ by more than rounding.
    """
    found = None if trained is None else trial_logits(merged)
    if trained is None or found is None:
        return
    distance = apart(found, trained)
    if not distance <= ROUNDING[merged.dtype]:
        why = "" if shared is None else f"; {shared}, and both change when one is merged"
        raise UserError(
            "--ckpt_path",
            f"merged into the weights, the adapters are not the model that was trained: logits differ by "
            f"{distance:.0%}{why}; nothing is written; write the adapters alone with --adapters",
        )


def shared_weight(adapted: Any) -> str | None:
    """Says of a weight under an adapter that it stands in two places of ``adapted``; None if there is none."""
    names: dict[int, list[str]] = {}
    for name, parameter in adapted.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name.replace("base_model.model.", "").replace(".base_layer", ""))
    under = {
        # Of all experts together an adapter has a parameter of another name.
        id(getattr(module.get_base_layer(), getattr(module, "parameter_name", "weight")))
        for module in adapted.modules()
        if hasattr(module, "base_layer") and module.lora_A
    }
    twice = next((found for key, found in names.items() if key in under and len(found) > 1), None)
    return None if twice is None else f"{twice[0]} is also {twice[1]}"
