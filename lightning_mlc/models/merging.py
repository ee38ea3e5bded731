"""Check that a model with merged LoRA adapters is still the model that was trained."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from lightning_mlc.errors import UserError, first_line

logger = logging.getLogger(__name__)

TRIAL = (2, 12)
"""Number of sequences, and of tokens in each, of the pass that both models run."""

ROUNDING = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest allowed distance of logits, as a share of their deviation from their mean (Frobenius norms).

Merging rounds each weight once, by a relative 6e-8 in float32, 5e-4 in float16 and 4e-3 in bfloat16. A few dozen layers
increase this error by a factor of ten to about a hundred. Wrong weights give distances of 0.1 to 1.
"""


def trial_logits(model: Any) -> Tensor | None:
    """Run a causal LM on fixed tokens.

    Args:
        model: The model, on any device.

    Returns:
        (N, T, V) float32 logits on the CPU. None: the model cannot be run on its device, and a warning was logged.
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
    """Compute the distance of two tensors of the same shape. NaN equals NaN.

    Args:
        found: The tensor to check.
        right: The expected tensor.

    Returns:
        The distance as a share of the deviation of ``right`` from its mean (Frobenius norms).
    """
    found, right = found.nan_to_num(), right.nan_to_num()
    return float((found - right).norm() / (right - right.mean()).norm().clamp_min(1e-30))


def require_merged(merged: Any, trained: Tensor | None, shared: str | None) -> None:
    """Compare a model after merging with its logits before.

    Args:
        merged: The model after merging.
        trained: Result of :func:`trial_logits` before merging.
        shared: Result of :func:`shared_weight` before merging.

    Raises:
        UserError: The logits differ by more than rounding.
    """
    found = None if trained is None else trial_logits(merged)
    if trained is None or found is None:
        return
    distance = apart(found, trained)
    if not distance <= ROUNDING[merged.dtype]:
        why = "" if shared is None else f"; {shared}, and both change when one is merged"
        raise UserError(
            "--ckpt_path",
            f"the adapters cannot be merged: with merged weights, logits differ from the trained model's by "
            f"{distance:.0%}{why}; nothing is written; write the adapters alone with --adapters",
        )


def shared_weight(adapted: Any) -> str | None:
    """Find a weight that has an adapter and is used in two places of the model.

    Args:
        adapted: A model with adapters.

    Returns:
        A sentence with both names. None: no such weight exists.
    """
    names: dict[int, list[str]] = {}
    for name, parameter in adapted.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name.replace("base_model.model.", "").replace(".base_layer", ""))
    under = {
        # If an adapter covers all experts at once, the parameter has another name.
        id(getattr(module.get_base_layer(), getattr(module, "parameter_name", "weight")))
        for module in adapted.modules()
        if hasattr(module, "base_layer") and module.lora_A
    }
    twice = next((found for key, found in names.items() if key in under and len(found) > 1), None)
    return None if twice is None else f"{twice[0]} is also {twice[1]}"
