"""How close to one line the translations of a prompt lie, at every layer, from one pass over each prompt."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from lightning_mlc.consistency.measures import collinearity, pair_cosines
from lightning_mlc.data.rows import NO_RESPONSE, TokenRows, TokenSequence
from lightning_mlc.evaluation.journal import Key
from lightning_mlc.evaluation.systems.generation import Conversation, LocalModel, out_of_memory, plan
from lightning_mlc.evaluation.systems.system import System
from lightning_mlc.progress.bars import track
from mlc_kernels import singular_values


@torch.inference_mode()
def prompt_states(
    local: LocalModel, conversations: Sequence[Conversation], batch_tokens: int, advance: Callable[[int], None]
) -> Tensor:
    """(N, K, H) hidden states at the end of each prompt: embeddings, then after each layer, K = layers + 1.

    The last is after the final norm, as in ``output_hidden_states`` of transformers. Float32 on the CPU.
    ``advance`` is told how many prompts a batch has had.
    """
    chat = local.chat
    prompts = [chat.prompt(messages, f"text {index + 1}")[0] for index, messages in enumerate(conversations)]
    takes_positions = "position_ids" in inspect.signature(local.model.base_model.forward).parameters
    states: list[Tensor | None] = [None] * len(prompts)
    for batch in plan([len(prompt) for prompt in prompts], batch_tokens, 0):
        rows = TokenRows.pad(
            [TokenSequence(prompts[index], (), 0, 0, NO_RESPONSE) for index in batch],
            int(chat.tokenizer.pad_token_id or 0),
        ).to(local.device)
        with out_of_memory():
            outputs = local.model.base_model(
                input_ids=rows.input_ids,
                attention_mask=rows.attention_mask,
                **({"position_ids": rows.position_ids} if takes_positions else {}),
                use_cache=False,
                output_hidden_states=True,
            )
        ends = torch.stack(
            [layer.flatten(0, 1)[rows.prompt_end].float().cpu() for layer in outputs.hidden_states], dim=1
        )
        for place, index in enumerate(batch):
            states[index] = ends[place]
        advance(len(batch))
    return torch.stack([state for state in states if state is not None])


def sweep(states: Tensor, mask: Tensor, center: bool) -> dict[str, Any]:
    """Collinearity of each layer, averaged over prompts.

    Args:
        states: (B, L, K, H): B prompts in L languages at K layers.
        mask: (B, L) bool, which are there.
        center: Subtract each layer's mean over prompts and languages, the direction that all of them share.

    Returns:
        Plain values: ``explained_variance`` and ``min_cosine`` (K), ``cosines`` (K, L, L) and ``spectrum`` (K, L),
        the mean share of each squared singular value.
    """
    found: dict[str, Any] = {"explained_variance": [], "min_cosine": [], "cosines": [], "spectrum": []}
    for layer in range(states.shape[2]):
        rows = states[:, :, layer].double()
        if center:
            rows = rows - rows[mask].mean(0)
        measures = collinearity(rows, mask)
        cosines, usable = pair_cosines(rows, mask)
        together = (usable[:, :, None] & usable[:, None, :]).double()
        squares = singular_values(rows, mask).square()
        valid = measures["valid"]
        found["explained_variance"].append(_mean(measures["explained_variance"][valid]))
        found["min_cosine"].append(_mean(measures["min_cosine"][valid]))
        found["cosines"].append((((cosines * together).sum(0)) / together.sum(0)).tolist())
        shares = squares[valid] / squares[valid].sum(1, keepdim=True)
        found["spectrum"].append(shares.mean(0).tolist())
    return found


def compare(
    system: System,
    local: LocalModel,
    asked: Sequence[tuple[Key, Conversation]],
    languages: Sequence[str],
    batch_tokens: int,
    console: Console,
) -> dict[str, Any]:
    """The sweep over all layers of a local model, raw and centred, and of a checkpoint after its extractor.

    Args:
        system: The model.
        local: The same, loaded.
        asked: Prompts, each in several languages.
        languages: BCP-47 codes, in the order of the results.
        batch_tokens: Most tokens of a batch.
        console: Where progress is shown.

    Returns:
        Plain values: ``languages``, ``prompts`` (with two or more languages), ``raw``, ``centred`` and, where there
        is one, ``extracted`` with its ``layer``.
    """
    with track(f"{system.label}: hidden states", len(asked), "prompts", console=console) as progress:
        flat = prompt_states(local, [text for _, text in asked], batch_tokens, progress.advance)
    rows = {place: index for index, place in enumerate(dict.fromkeys((key.set, key.id) for key, _ in asked))}
    columns = {language: index for index, language in enumerate(languages)}
    states = flat.new_zeros(len(rows), len(languages), *flat.shape[1:])
    mask = torch.zeros(states.shape[:2], dtype=torch.bool)
    for (key, _), state in zip(asked, flat, strict=True):
        place = rows[key.set, key.id], columns[key.language]
        states[place] = state
        mask[place] = True
    found = {
        "languages": list(languages),
        "prompts": int((mask.sum(1) >= 2).sum()),
        "raw": sweep(states, mask, center=False),
        "centred": sweep(states, mask, center=True),
    }
    own = system.representation(states.shape[-1])
    if own is not None:
        layer, extractor = own
        found["extracted"] = extracted(states, mask, extractor, layer) | {"layer": layer}
    return found


def extracted(states: Tensor, mask: Tensor, extract: Callable[[Tensor], Tensor], layer: int) -> dict[str, Any]:
    """The same of one ``layer`` (index into K) after a checkpoint's extractor."""
    with torch.inference_mode():
        return sweep(extract(states[:, :, layer].float())[:, :, None], mask, center=False)


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else float("nan")
