"""Whether what an export wrote is the model that was trained: it is loaded again and compared, before it is final."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from lightning_mlc.errors import UserError, first_line
from lightning_mlc.models.loading import ModelSource, load_causal_lm
from lightning_mlc.models.lora import LoRA, quiet_peft

logger = logging.getLogger(__name__)

TRIAL = (2, 12)
"""Sequences and tokens of the pass that both models make."""

ROUNDING = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""How far logits may lie apart, as a share of their deviation from their mean (Frobenius norms).

Merging rounds each weight once: by 6e-8 of it in float32, 5e-4 in float16, 4e-3 in bfloat16. Through a few dozen layers
that has grown by ten to some hundred times at most; weights that are not those that were trained err by 0.1 to 1.
"""

_INERT = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_OF_BEAMS = ("early_stopping", "length_penalty")


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


def prove(model: Any, folder: Path, trust_remote_code: bool = False) -> None:
    """Compare the whole ``model`` with what ``folder`` holds, loaded as a user would.

    Weights are compared to the last bit. Logits are compared to rounding, because a product may be rounded otherwise
    where the weights lie elsewhere in memory; they show what is no weight: buffers, configuration, code.

    Raises:
        UserError: They differ.
    """
    again = load_causal_lm(ModelSource(str(folder), trust_remote_code=trust_remote_code), model.dtype)
    _require_same_weights(again.state_dict(), model.state_dict())
    _require_same_logits(again, trial_logits(model), model.dtype)


def prove_adapters(model: Any, folder: Path, lora: LoRA, source: ModelSource, dtype: torch.dtype) -> None:
    """Compare the adapted ``model`` with its base, loaded anew, under the adapters in ``folder``.

    Raises:
        UserError: They differ.
    """
    from peft import PeftModel, get_peft_model_state_dict

    base: Any = lora.load_base(source, dtype, model.device)
    with quiet_peft():
        again: Any = PeftModel.from_pretrained(base, folder)
    found, right = (get_peft_model_state_dict(adapted, save_embedding_layers=False) for adapted in (again, model))
    _require_same_weights(found, right)
    _require_same_logits(again, trial_logits(model), dtype)


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


def make_writable(generation: GenerationConfig) -> None:
    """Remove from ``generation`` what has no effect and what transformers therefore refuses to write.

    Published models have a temperature beside ``do_sample: false``, for example.

    Raises:
        UserError: It cannot be written for another reason.
    """
    if _is_writable(generation):
        return
    if not generation.do_sample:
        for name in _INERT:
            setattr(generation, name, None)
    if (generation.num_beams or 1) == 1:
        for name in _OF_BEAMS:
            setattr(generation, name, None)
    if generation.pad_token_id is not None and generation.pad_token_id < 0:
        generation.pad_token_id = None
    try:
        generation.validate(strict=True)
    except ValueError as error:
        raise UserError(
            "ckpt_path",
            f"the model's generation configuration cannot be written ({first_line(error)}); mend it in the folder that "
            "the model was trained from, and train again",
        ) from error


def _is_writable(generation: GenerationConfig) -> bool:
    try:
        generation.validate(strict=True)
    except ValueError:
        return False
    return True


def _require_same_weights(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    missing = sorted(found.keys() ^ right.keys())
    # A dtype may differ where transformers keeps some weights in float32.
    wrong = missing or [
        name
        for name, value in right.items()
        if found[name].shape != value.shape
        or not torch.equal(found[name].to(value.device, value.dtype).nan_to_num(), value.nan_to_num())
    ]
    if wrong:
        more = f" and {len(wrong) - 2} more" if len(wrong) > 2 else ""
        raise _differs(f"{', '.join(wrong[:2])}{more} {'is' if len(wrong) == 1 else 'are'} not the same")


def _require_same_logits(again: Any, trained: Tensor | None, dtype: torch.dtype) -> None:
    found = None if trained is None else trial_logits(again)
    if trained is None or found is None:
        return
    distance = apart(found, trained)
    if not distance <= ROUNDING[dtype]:
        raise _differs(f"all weights are the same, but logits differ by {distance:.0%}")


def _differs(how: str) -> UserError:
    return UserError(
        "--ckpt_path",
        f"what was written and loaded again is not the model that was trained: {how}; nothing is kept; "
        "please report the model's architecture",
    )
