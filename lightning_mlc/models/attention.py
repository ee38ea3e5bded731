"""Packed rows for each attention implementation of transformers: the layout it runs best, and the mask it takes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from transformers import PreTrainedConfig, PreTrainedModel

from lightning_mlc.data.layout import Layout
from lightning_mlc.data.rows import CHOSEN, NO_RESPONSE, REJECTED, Packing, Row, TokenRows

if TYPE_CHECKING:
    from lightning_mlc.models.policy import Policy

logger = logging.getLogger("lightning_mlc")

LAYER_TYPES = {"full_attention", "sliding_attention"}
"""What a layer may be for packed sequences not to see each other. Recurrent layers, say, take no mask."""


def packed_layout(implementation: str) -> Layout | None:
    """How to pack rows for ``implementation`` (``model.attn_implementation``); None where it is not known how."""
    if implementation.startswith("flash_attention"):
        # Takes the ends of sequences, and no mask that would let two responses see one prompt.
        return Layout(packed=True, share_prompts=False, one_row=True)
    if implementation == "flex_attention":
        return Layout(packed=True, one_row=True)
    if implementation in ("sdpa", "eager"):
        return Layout(packed=True)
    return None


def attention_arguments(config: PreTrainedConfig, rows: TokenRows, dtype: torch.dtype) -> dict[str, Any]:
    """What a decoder with ``config`` and weights in ``dtype`` is told about which tokens of ``rows`` see which."""
    packing = rows.packing
    if packing is None:
        return {"attention_mask": rows.attention_mask}
    implementation = str(config._attn_implementation)
    if implementation.startswith("flash_attention"):
        ends = {"cu_seq_lens_q": packing.boundaries, "cu_seq_lens_k": packing.boundaries}
        return {"attention_mask": None, **ends, "max_length_q": packing.longest, "max_length_k": packing.longest}
    windows = _windows(config, packing.longest)
    masks = {window: _mask(implementation, rows, packing, window, dtype) for window in set(windows.values())}
    if len(masks) == 1:
        return {"attention_mask": next(iter(masks.values()))}
    # Models whose layers differ take a mask for each of their types.
    return {"attention_mask": {kind: masks[window] for kind, window in windows.items()}}


def _windows(config: PreTrainedConfig, longest: int) -> dict[str, int | None]:
    """How far back the layers of each type see, None for to the beginning."""
    config = config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if window is not None and window >= longest:
        window = None
    types = getattr(config, "layer_types", None)
    if types is None:
        return {"every layer": window if getattr(config, "use_sliding_window", True) else None}
    return {kind: window if kind == "sliding_attention" else None for kind in types}


def _mask(implementation: str, rows: TokenRows, packing: Packing, window: int | None, dtype: torch.dtype) -> Any:
    segment, prompt, position = packing.segment, packing.prompt, rows.position_ids

    def sees(row: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = segment[row, key] == segment[row, query]
        found = (query >= key) & (own | (segment[row, key] == prompt[row, query]))
        if window is None:
            return found
        return found & (position[row, query] - position[row, key] < window)

    count, width = rows.input_ids.shape
    if implementation == "flex_attention":
        return create_block_mask(sees, count, None, width, width, device=str(segment.device))
    index = torch.arange(width, device=segment.device)
    row = torch.arange(count, device=segment.device)[:, None, None]
    mask = sees(row, row, index[:, None], index)[:, None]
    if implementation == "eager":
        return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    return mask


@torch.no_grad()
def packing_agrees(policy: Policy) -> bool:
    """Whether ``policy`` gives packed sequences what it gives each in a padded row.

    Tried on a few tokens, in evaluation mode. Where it does not, or cannot run them, the reason is logged.
    """
    model: PreTrainedModel = policy.causal_lm
    layout = packed_layout(str(model.config._attn_implementation))
    types = set(getattr(model.config.get_text_config(), "layer_types", None) or LAYER_TYPES)
    if layout is None or not types <= LAYER_TYPES:
        reason = f"attention {model.config._attn_implementation}, layers {', '.join(sorted(types))}"
    elif model.device.type != "cpu" or layout.one_row:
        # Flash and flex attention run on a GPU only, where the model is not yet; transformers documents both.
        return True
    else:
        reason = _disagreement(policy, layout)
    if reason:
        logger.warning("%s cannot run packed rows (%s): rows are padded", type(model).__name__, reason)
    return not reason


def _disagreement(policy: Policy, layout: Layout) -> str:
    rows = [
        Row((7, 8, 9), (10, 11, 12), 0, 0, CHOSEN),
        Row((7, 8, 9), (13, 14), 0, 0, REJECTED, leads=False),
        Row((15, 16, 17, 18), (), 0, 1, NO_RESPONSE),
        Row((19, 20), (21,), 1, 0, CHOSEN),
    ]
    was_training = policy.training
    policy.eval()
    last = int(policy.causal_lm.config.get_text_config().num_hidden_layers)
    try:
        differences = []
        for block in layout.blocks(rows, 0):
            found = policy(block, last)
            for index, place in enumerate(zip(block.example.tolist(), block.kind.tolist(), strict=True)):
                row = next(row for row in rows if (row.example, row.kind) == place)
                alone = policy(TokenRows.pad([row], 0), last)
                for packed, padded in ((found.states[index], alone.states[0]), (found.logps[index], alone.logps[0])):
                    differences.append(float((packed - padded).norm() / padded.norm().clamp(min=1e-6)))
    except Exception as error:  # foreign code, which may stumble over a mask in any way
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    finally:
        policy.train(was_training)
    # Rounding adds up over the layers; tokens that see what they should not change far more.
    bound = 8 * torch.finfo(next(policy.parameters()).dtype).eps
    worst = max(differences)
    return "" if worst <= max(bound, 1e-4) else f"results differ by {worst:.2g} of their size"
