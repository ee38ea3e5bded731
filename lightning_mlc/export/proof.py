"""Check that an export wrote the model that was trained: load it again and compare, before it becomes final."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_mlc.errors import UserError
from lightning_mlc.models.loading import load_causal_lm
from lightning_mlc.models.lora import LoRA, quiet_peft
from lightning_mlc.models.merging import ROUNDING, apart, trial_logits
from lightning_mlc.sources import ModelSource

logger = logging.getLogger(__name__)


def prove(model: Any, folder: Path, trust_remote_code: bool = False) -> None:
    """Load ``folder`` as a user would, and compare it with the trained model.

    Weights must be equal to the last bit. Logits must be equal up to rounding, because the address of a weight in
    memory can change how a product is rounded. Logits also depend on buffers, configuration and code.

    Args:
        model: The trained model, a causal LM of transformers without adapters.
        folder: The folder that was written.
        trust_remote_code: Whether to run Python code from the model's repository.

    Raises:
        UserError: They differ.
    """
    again = load_causal_lm(ModelSource(str(folder), trust_remote_code=trust_remote_code), model.dtype)
    _require_same_weights(again.state_dict(), model.state_dict())
    _require_same_logits(again, trial_logits(model), model.dtype)


def prove_adapters(model: Any, folder: Path, lora: LoRA, source: ModelSource, dtype: torch.dtype) -> None:
    """Load the base model again with the adapters in ``folder``, and compare it with the trained model.

    Args:
        model: The trained model with its adapters.
        folder: The folder that was written.
        lora: Settings of the adapters.
        source: The base model.
        dtype: Dtype of the base model's weights (quantised: of its products).

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


def _require_same_weights(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    missing = sorted(found.keys() ^ right.keys())
    # Dtypes can differ, because transformers keeps some weights in float32.
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
        f"the exported model, loaded again, is not the model that was trained: {how}; the export is deleted; "
        "please report the model's architecture",
    )
