"""A Hugging Face causal LM, as the training step uses it.

One pass over token rows returns the log-probabilities of their response tokens and, on request, the hidden state of
one layer at the end of each prompt. It computes nothing else: logits exist only for response tokens, one chunk at a
time, and rows of prompts alone run neither ``lm_head`` nor the layers above the requested one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_mlc.data.rows import TokenRows
from lightning_mlc.errors import UserError
from lightning_mlc.models.attention import attention_arguments
from lightning_mlc.models.compiling import compile_layers, uncompiled
from lightning_mlc.models.greedy import generate_greedily
from lightning_mlc.models.layers import num_layers, require_one_state
from lightning_mlc.models.logprobs import CHUNK_ELEMENTS, logps_of, next_logits, token_logps
from lightning_mlc.models.parts import find_decoder, find_layers, submodule
from lightning_mlc.models.tensors import precision_kept

if TYPE_CHECKING:
    from peft import PeftModel


class Shortcuts(NamedTuple):
    """Cheaper ways to run a model. Each is off until it is known to give the same results as the plain way.

    :func:`~lightning_mlc.models.self_check.self_check` finds out which ones do.
    """

    hooks: bool = False
    """Capture hidden states with hooks. Plain way: ask the model for the hidden states of all layers."""
    two_parts: bool = False
    """Run the decoder, then the head for response tokens only. Plain way: compute the logits of all tokens."""
    early_end: bool = False
    """End a pass over prompts alone at the requested layer. Plain way: run all layers."""


class RowOutputs(NamedTuple):
    """Results of one pass over N sequences."""

    logps: Tensor
    """(N,) float32 (float64 for a float64 model): summed log-probability of the response's tokens; 0 without one."""
    tokens: Tensor
    """(N,) float32: number of response tokens."""
    states: Tensor | None
    """(N, H): hidden state of the requested layer at the last prompt token."""
    pooled: Tensor | None = None
    """(N, H) float32 (float64 for a float64 model): state after the final norm, averaged over the sequence."""
    next_logits: Tensor | None = None
    """(P, V), in the precision of the forward pass: logits of the next token at the first positions
    (``TokenRows.first``)."""


class Policy(nn.Module):
    """Runs a causal LM on token rows.

    Args:
        model: Any causal LM of ``transformers``, or a ``peft`` model around one.
    """

    def __init__(self, model: PreTrainedModel | PeftModel) -> None:
        super().__init__()
        self.model = model
        self._accepted = frozenset(inspect.signature(self.causal_lm.forward).parameters)
        self.decoder_name = find_decoder(self.causal_lm)
        """Name of the LM's module that turns tokens into hidden states, if it is a single module."""
        self.shortcuts = Shortcuts()
        """The shortcuts that are on; at first none, because none has been tried."""
        self.layer_returns = 0
        """How many values a layer returns in a tuple, hidden states first; 0 if it returns the states without one."""
        self._compiled = False

    @property
    def causal_lm(self) -> PreTrainedModel:
        """The causal LM itself, without the wrapper of ``peft``."""
        model: Any = self.model
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        assert isinstance(inner, PreTrainedModel)
        return inner

    @property
    def decoder(self) -> nn.Module | None:
        """The LM's module that turns tokens into hidden states, if it is a single module."""
        return None if self.decoder_name is None else submodule(self.causal_lm, self.decoder_name)

    def compile_layers(self) -> None:
        """Compile the decoder layers in place. Copies of this policy compile theirs too."""
        compile_layers(self._layers()[2])
        self._compiled = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        if self._compiled:  # torch does not copy compiled code
            self.compile_layers()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert the model, but keep the dtypes that must not change (Lightning converts everything)."""
        with precision_kept(self):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, rows: TokenRows, layer: int | None = None, pool: bool = False, positions: int = 0) -> RowOutputs:
        """Run token rows.

        Args:
            rows: N sequences, all with a response or all without one, on the model's device.
            layer: Index of the hidden states to return (0: embeddings, ..., n: after the final norm). Prompts alone
                run up to this layer only. None: no states.
            pool: Whether to return ``RowOutputs.pooled`` for rows with responses.
            positions: Return ``RowOutputs.next_logits`` for the first ``positions`` of the positions that the rows
                have. 0: none.
        """
        pooled = at_first = None
        first = rows.first[: rows.num_first(positions)]
        if rows.longest_response == 0 and not len(first):
            states = None if layer is None else self._states_only(rows, layer)
            logps = torch.zeros(len(rows), device=rows.input_ids.device)
        else:
            depth = num_layers(self.causal_lm.config)
            wanted = [*([] if layer is None else [layer]), *([depth] if pool else [])]
            logps, at_first, found = self._with_logits(rows, wanted, first)
            states = None if layer is None else found[layer]
            pooled = _mean_by_sequence(found[depth], rows) if pool else None
        if states is not None:
            # Gathered here, not in a hook: gradient checkpointing runs hooks again in the backward pass, where they
            # must add no operation.
            states = states.flatten(0, 1).index_select(0, rows.prompt_end)
        return RowOutputs(logps, rows.response_tokens.float(), states, pooled, at_first)

    def _with_logits(
        self, rows: TokenRows, wanted: Sequence[int], first: Tensor
    ) -> tuple[Tensor, Tensor | None, dict[int, Tensor]]:
        """Run all layers and the head.

        Args:
            rows: N sequences in R rows of T tokens.
            wanted: Layers whose hidden states to return.
            first: (P,) int64, where in the flattened rows logits are needed as they are.

        Returns:
            (N,) log-probabilities of the responses, (P, V) logits, and the hidden states (R, T, H) by layer.
        """
        scores = rows.longest_response > 0
        at_first: Tensor | None = None
        logps = torch.zeros(len(rows), device=rows.input_ids.device)
        if self.shortcuts.two_parts:
            output, found = self._run(self._required_decoder(), rows, wanted)
            hidden = output[0].flatten(0, 1)
            if scores:
                predicting = hidden.index_select(0, rows.predictor)
                logps = token_logps(self.causal_lm, self.decoder_name, predicting, _labels(rows), CHUNK_ELEMENTS)
            if len(first):
                at_first = next_logits(self.causal_lm, self.decoder_name, hidden.index_select(0, first))
        else:
            output, found = self._run(self.model, rows, wanted)
            logits = output.logits.flatten(0, 1)
            if scores:
                logps = logps_of(logits.index_select(0, rows.predictor), _labels(rows))
            at_first = logits.index_select(0, first) if len(first) else None
        return _sum_by_sequence(logps, rows) if scores else logps, at_first, found

    def layer_states(self, rows: TokenRows, layers: Sequence[int]) -> Tensor:
        """Run prompts, and return the hidden states of several layers at their ends.

        Args:
            rows: N prompts without responses, on the model's device.
            layers: Indices of K layers, as in :meth:`forward`.

        Returns:
            (N, K, H).

        Raises:
            UserError: A layer has several states for each token.
        """
        _, found = self._run(self.decoder or self.model, rows, layers)
        for layer in layers:
            require_one_state(found[layer], layer, type(self.causal_lm).__name__)
        return torch.stack([found[layer].flatten(0, 1).index_select(0, rows.prompt_end) for layer in layers], dim=1)

    def generate(
        self, rows: TokenRows, max_new_tokens: int, ends: list[int], pad: int | None, together: bool
    ) -> Tensor:
        """Generate responses; see :func:`~lightning_mlc.models.greedy.generate_greedily`."""
        # Generation calls the layers in other ways than training, and would compile them again for each length.
        with uncompiled() if self._compiled else nullcontext():
            return generate_greedily(self.causal_lm, rows, max_new_tokens, ends, pad, together)

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's layers."""
        return self._layers()[2]

    def _required_decoder(self) -> nn.Module:
        decoder = self.decoder
        assert decoder is not None, "without a decoder no shortcut is on"
        return decoder

    def _run(self, module: nn.Module, rows: TokenRows, wanted: Sequence[int] = ()) -> tuple[Any, dict[int, Tensor]]:
        """Run ``module`` (the LM or its decoder). Return its output and the hidden states (R, T, H) of some layers."""
        keywords = attention_arguments(self.causal_lm.config, rows, self.causal_lm.dtype)
        if "position_ids" in self._accepted:
            keywords["position_ids"] = rows.position_ids
        if not wanted or self.shortcuts.hooks:
            with self._capture(wanted) as found:
                output = module(input_ids=rows.input_ids, use_cache=False, **keywords)
            return output, found
        output = module(input_ids=rows.input_ids, use_cache=False, output_hidden_states=True, **keywords)
        return output, {layer: output.hidden_states[layer] for layer in wanted}

    @contextmanager
    def _capture(self, wanted: Sequence[int]) -> Iterator[dict[int, Tensor]]:
        """Collect the hidden states of ``wanted`` layers during the forward pass inside the context."""
        captured: dict[int, Tensor] = {}
        handles = []
        for layer in wanted:

            def keep_input(_module: nn.Module, inputs: Any, keywords: dict[str, Any], layer: int = layer) -> None:
                if layer not in captured:
                    captured[layer] = inputs[0] if inputs else keywords["hidden_states"]

            def keep_output(_module: nn.Module, _inputs: Any, output: Any, layer: int = layer) -> None:
                captured[layer] = output[0]

            if layer == num_layers(self.causal_lm.config):
                # The output of the decoder: after the last layer and the final norm.
                handles.append(self._required_decoder().register_forward_hook(keep_output))
            else:
                # The input of the next layer. This is also right for models that scale their embeddings.
                handles.append(self.layers[layer].register_forward_pre_hook(keep_input, with_kwargs=True))
        try:
            yield captured
        finally:
            for handle in handles:
                handle.remove()

    def _states_only(self, rows: TokenRows, layer: int) -> Tensor:
        """(R, T, H): hidden states of ``layer``. The pass computes no logits, and ends at the layer if it can."""
        if not self.shortcuts.early_end or layer == num_layers(self.causal_lm.config):
            _, found = self._run(self.decoder or self.model, rows, [layer])
            return found[layer]
        owner, name, layers = self._layers()
        end = _End(layers[layer], self.layer_returns)
        setattr(owner, name, nn.ModuleList([*layers[:layer], end]))
        try:
            self._run(self._required_decoder(), rows)
        finally:
            setattr(owner, name, layers)
        if end.states is None:
            raise RuntimeError("the model does not run the layers of its list of layers")
        return end.states

    def _layers(self) -> tuple[nn.Module, str, nn.ModuleList]:
        """The module that owns the list of decoder layers, the list's name in it, and the list."""
        depth, decoder = num_layers(self.causal_lm.config), self.decoder
        found = None if decoder is None else find_layers(decoder, depth)
        if found is None:
            raise UserError(
                "model.name_or_path",
                f"cannot find the {depth} layers of {type(self.causal_lm).__name__}; "
                "leave model.compile at false and trainer.strategy at auto or ddp",
            )
        return found


class _End(nn.Module):
    """Replaces the first layer that is not needed, and keeps its input."""

    def __init__(self, layer: nn.Module, returns: int) -> None:
        super().__init__()
        self._replaced = (layer,)  # in a tuple, so that it is not registered as a child
        self._returns = returns
        self.states: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        # Some decoders read the type of a layer before they run it.
        return getattr(self.__dict__["_replaced"][0], name)

    def forward(self, hidden_states: Tensor, *_arguments: Any, **_keywords: Any) -> Any:
        self.states = hidden_states
        if self._returns == 0:
            return hidden_states
        return (hidden_states, *[None] * (self._returns - 1))


def _labels(rows: TokenRows) -> Tensor:
    """(M,) int64: the response tokens of all sequences."""
    return rows.input_ids.flatten().index_select(0, rows.response)


def _sum_by_sequence(values: Tensor, rows: TokenRows) -> Tensor:
    """(N,): sums over each sequence of ``values`` (M,), one for each response token."""
    # Arranged in a table first, because sums by index have no fixed order on a GPU.
    table = values.new_zeros(len(rows) * rows.longest_response)
    return table.index_copy(0, rows.response_cell, values).view(len(rows), -1).sum(1)


def _mean_by_sequence(hidden: Tensor, rows: TokenRows) -> Tensor:
    """(N, H): means of ``hidden`` (R, T, H) over the tokens of each sequence, prompt and response."""
    place = torch.arange(rows.input_ids.numel(), device=hidden.device)
    end = rows.prompt_end[:, None]
    start = end - rows.position_ids.flatten()[end]
    belongs = (start <= place) & (place <= end)
    belongs[rows.response_cell // rows.longest_response, rows.response] = True
    # Padding may hold anything, even NaN. The sum is a product in full precision, because sums by index have no fixed
    # order on a GPU.
    wide = torch.where(rows.attention_mask[:, :, None] == 1, hidden, 0.0).flatten(0, 1)
    wide = wide.to(torch.promote_types(hidden.dtype, torch.float32))
    with torch.autocast(hidden.device.type, enabled=False):
        return belongs.to(wide.dtype) @ wide / belongs.sum(1, keepdim=True)
