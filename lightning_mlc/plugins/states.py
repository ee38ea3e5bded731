"""Hidden states at the ends of prompts, from a model that somebody else has wrapped."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from lightning_mlc.data.row_layout import Layout
from lightning_mlc.data.rows import TokenRows, TokenSequence
from lightning_mlc.errors import UserError, renamed
from lightning_mlc.models.layers import num_layers, resolve_layer
from lightning_mlc.models.parts import learnt_positions, token_embeddings
from lightning_mlc.models.policy import Policy
from lightning_mlc.models.self_check import self_check


class PromptStates:
    """Runs prompts through a model and returns the hidden states of one layer at their ends.

    A model that is whole on each process is run as in ``lightning-mlc fit``: without logits, up to the layer, and
    packed if that gives the same results. A model without an LM head is called on padded rows. So is a model whose
    weights are sharded (FSDP, DeepSpeed): as a whole, and always in one pass, because its processes wait for each other
    in each pass.

    Args:
        model: The model, as the trainer calls it: wrapped or not.
        layer: The layer, as in :class:`~lightning_mlc.consistency.settings.Consistency`.
        longest: Number of tokens of the longest prompt.
        pad_id: Token id of padding.

    Raises:
        UserError: The model cannot be run on prompts, or has no such layer.
    """

    def __init__(self, model: nn.Module, layer: int | float, longest: int, pad_id: int) -> None:
        self._pad_id = pad_id
        inner = unwrapped(model)
        causal_lm = transformers_model(inner)
        with renamed(("model.consistency.layer",), "layer"):
            self._layer = resolve_layer(layer, num_layers(causal_lm.config))
        self.layout = Layout()
        """How the prompts are laid out in rows."""
        self._policy: Policy | None = None
        self._sharded = is_sharded(model)
        if not self._sharded and _is_causal_lm(causal_lm):
            policy = Policy(inner)  # type: ignore[arg-type]
            with renamed(("model.name_or_path",), "model"):
                self.layout = self_check(policy, self._layer, longest, responses=False).layout
            self._policy = policy
        self._accepted = frozenset(inspect.signature(causal_lm.forward).parameters)

    @property
    def needs_rows(self) -> bool:
        """Whether each process has to run a pass, because the processes gather weights from each other."""
        return self._sharded

    def __call__(self, model: nn.Module, prompts: Sequence[TokenSequence], languages: int) -> tuple[Tensor, Tensor]:
        """Run prompts.

        Args:
            model: The same model as before.
            prompts: N prompts of B groups; ``example`` is the group.
            languages: L, the number of languages.

        Returns:
            (B, L, H) hidden states; 0 where a prompt does not exist in the language.
            (B, L) bool: whether it does.
        """
        device = next(model.parameters()).device
        # DDP would wait for the gradients of all weights, and not all have one here. Those of its model stay on the
        # process until the trainer's own backward pass, which averages both.
        called = model if self._sharded else unwrapped(model)
        blocks = [block.sent_to(device) for block in self._blocks(prompts)]
        states = torch.cat([self._states(called, block) for block in blocks])
        cell = torch.cat([block.example * languages + block.language for block in blocks])
        groups = prompts[-1].example + 1
        table = states.new_zeros(groups * languages, states.shape[1]).index_copy(0, cell, states)
        present = torch.zeros(groups * languages, dtype=torch.bool, device=device)
        present[cell] = True
        return table.view(groups, languages, -1), present.view(groups, languages)

    def _blocks(self, prompts: Sequence[TokenSequence]) -> tuple[TokenRows, ...]:
        if self._sharded:
            return (TokenRows.pad(prompts, self._pad_id),)
        return self.layout.blocks(prompts, self._pad_id)

    def _states(self, model: nn.Module, rows: TokenRows) -> Tensor:
        if self._policy is not None:
            states: Tensor | None = self._policy(rows, self._layer).states
            assert states is not None
            return states
        keywords: dict[str, Any] = {"use_cache": False} if "use_cache" in self._accepted else {}
        if "logits_to_keep" in self._accepted:
            keywords["logits_to_keep"] = 1
        output = model(
            input_ids=rows.input_ids, attention_mask=rows.attention_mask, output_hidden_states=True, **keywords
        )
        found: Tensor = output.hidden_states[self._layer]
        return found.flatten(0, 1).index_select(0, rows.prompt_end)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel and ``torch.compile``."""
    inner: Any = model
    while True:
        if isinstance(inner, nn.parallel.DistributedDataParallel):
            inner = inner.module
        elif hasattr(inner, "_orig_mod"):
            inner = inner._orig_mod
        else:
            found: nn.Module = inner
            return found


def is_sharded(model: nn.Module) -> bool:
    """Whether weights of ``model`` lie on several processes, so that only the wrapped model can be called."""
    wrappers = {kind.__name__ for module in (model, unwrapped(model)) for kind in type(module).__mro__}
    if wrappers & {"FullyShardedDataParallel", "DeepSpeedEngine"}:
        return True
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """Return the model of transformers inside ``model``.

    Raises:
        UserError: There is none, it is an encoder-decoder, it takes no text, or its adapters prepend virtual tokens.
    """
    inner: Any = unwrapped(model)
    for name in ("module", "_fsdp_wrapped_module"):  # DeepSpeed and FSDP1
        inner = getattr(inner, name, inner)
    configs = getattr(inner, "peft_config", None)
    if isinstance(configs, dict) and any(getattr(config, "is_prompt_learning", False) for config in configs.values()):
        raise UserError("model", "has prompt-learning adapters, which the hidden states would not reach; use LoRA")
    if not isinstance(inner, PreTrainedModel) and hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise UserError(
            "model", f"must be a model of transformers, with or without PEFT adapters, got {type(inner).__name__}"
        )
    if getattr(inner.config, "is_encoder_decoder", False):
        raise UserError("model", f"{type(inner).__name__} is an encoder-decoder; give a causal LM")
    if "input_ids" not in inspect.signature(inner.forward).parameters:
        raise UserError("model", f"{type(inner).__name__} takes no text; give a causal LM")
    return inner


def require_embeddings(model: nn.Module, longest: int, highest_token: int) -> None:
    """Refuse prompts for which a model has too few embeddings or positions. Says nothing of sharded models.

    Args:
        model: The model, wrapped or not.
        longest: Number of tokens of the longest prompt.
        highest_token: Highest token id of the prompts.

    Raises:
        UserError: It has too few.
    """
    if is_sharded(model):
        return
    inner = transformers_model(model)
    rows = token_embeddings(inner)
    if rows and highest_token >= rows:  # weights that DeepSpeed has divided have 0 rows
        raise UserError(
            "tokenizer",
            f"gives ids up to {highest_token}, but the model embeds {rows} tokens (0 to {rows - 1}); give the model's "
            "own tokenizer, or resize its embeddings",
        )
    places = learnt_positions(inner)
    if places and longest > places:
        raise UserError(
            "max_prompt_length",
            f"a prompt has {longest} tokens, but the model has learnt {places} positions; give {places}",
        )


def _is_causal_lm(model: PreTrainedModel) -> bool:
    return any(kind.__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for kind in type(model).__mro__) or (
        "ForCausalLM" in type(model).__name__ or "ForConditionalGeneration" in type(model).__name__
    )
