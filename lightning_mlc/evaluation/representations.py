"""How close the hidden states of a prompt's translations lie to one line, and what they cluster by, at every layer."""

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
from lightning_mlc.evaluation.systems.generation import Conversation, LocalModel, out_of_memory, plan_batches
from lightning_mlc.evaluation.systems.system import System
from lightning_mlc.metrics.layer_choice import LayerChoice
from lightning_mlc.progress.bars import track
from mlc_kernels import singular_values


@torch.inference_mode()
def prompt_states(
    local: LocalModel, conversations: Sequence[Conversation], batch_tokens: int, advance: Callable[[int], None]
) -> Tensor:
    """Hidden states at the end of each prompt, at every layer, from one forward pass per prompt.

    Args:
        local: The model, on its device.
        conversations: N prompts.
        batch_tokens: Maximum number of tokens in a batch.
        advance: Called after each batch with the number of its prompts.

    Returns:
        (N, K, H) float32 on the CPU: the embeddings, and the output of each layer, so that K = layers + 1. The last one
        comes after the final norm, as in ``output_hidden_states`` of transformers.
    """
    chat = local.chat
    prompts = [chat.prompt(messages, f"text {index + 1}")[0] for index, messages in enumerate(conversations)]
    takes_positions = "position_ids" in inspect.signature(local.model.base_model.forward).parameters
    states: list[Tensor | None] = [None] * len(prompts)
    for batch in plan_batches([len(prompt) for prompt in prompts], batch_tokens, 0):
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


def collinearity_by_layer(states: Tensor, mask: Tensor, center: bool) -> dict[str, Any]:
    """Collinearity at each layer, averaged over prompts.

    Args:
        states: (B, L, K, H): B prompts in L languages at K layers.
        mask: (B, L) bool, True where a prompt exists in that language.
        center: Whether to subtract each layer's mean over prompts and languages, whose direction all states share.

    Returns:
        Plain values: lists ``explained_variance`` and ``min_cosine`` (K), ``cosines`` (K, L, L), and ``spectrum``
        (K, L), which is the mean share of each squared singular value.
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


def compare_languages(
    system: System,
    local: LocalModel,
    asked: Sequence[tuple[Key, Conversation]],
    languages: Sequence[str],
    batch_tokens: int,
    console: Console,
) -> dict[str, Any]:
    """Collinearity at all layers of a local model, raw and centred, and after the extractor if it is a checkpoint.

    Args:
        system: The model.
        local: The same model, loaded.
        asked: Prompts, each in several languages.
        languages: BCP-47 codes, in the order of the results.
        batch_tokens: Maximum number of tokens in a batch.
        console: Where progress is shown.

    Returns:
        Plain values: ``languages``, ``prompts`` (the number of those in two or more languages), ``raw``, ``centred``,
        ``silhouettes`` with the layer that they choose (:func:`silhouettes_by_layer`) and, if the model has an
        extractor, ``extracted`` with its ``layer``.
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
        "raw": collinearity_by_layer(states, mask, center=False),
        "centred": collinearity_by_layer(states, mask, center=True),
        "silhouettes": silhouettes_by_layer(states, mask),
    }
    own = system.representation(states.shape[-1])
    if own is not None:
        layer, extractor = own
        found["extracted"] = collinearity_of_extracted(states, mask, extractor, layer) | {"layer": layer}
    return found


def silhouettes_by_layer(states: Tensor, mask: Tensor) -> dict[str, Any]:
    """Whether the states of each layer cluster by prompt or by language, and the layer that ``auto`` would take.

    Args:
        states: (B, L, K, H): B prompts in L languages at K layers.
        mask: (B, L) bool, True where a prompt exists in that language.

    Returns:
        Plain values: lists ``by_prompt`` and ``by_language`` (K), ``layer`` (an index into K, or None) and its
        ``reason``.
    """
    found = LayerChoice.of(states, mask)
    return {
        "by_prompt": list(found.by_prompt),
        "by_language": list(found.by_language),
        "layer": found.layer,
        "reason": found.reason,
    }


def collinearity_of_extracted(
    states: Tensor, mask: Tensor, extract: Callable[[Tensor], Tensor], layer: int
) -> dict[str, Any]:
    """Collinearity of one ``layer`` (index into K) after ``extract``, the extractor of a checkpoint."""
    with torch.inference_mode():
        return collinearity_by_layer(extract(states[:, :, layer].float())[:, :, None], mask, center=False)


def _mean(values: Tensor) -> float:
    return float(values.mean()) if len(values) else float("nan")
