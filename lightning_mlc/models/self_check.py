"""A model just loaded is tried: does it give in our way of running it what it gives in the plain way?

The plain way is that of ``transformers``: each sequence alone, without padding, all layers, all logits, and
``output_hidden_states``. Ours packs sequences into rows, runs decoder and head one after the other, takes hidden
states where they pass, and ends early. Whether that is the same depends on the code of each model, so it is not
believed but compared: log-probabilities of responses and hidden states at the ends of prompts, on a few dozen tokens
(more where the model has windows, see :func:`trial_length`). What differs is run the plain way, and one line says so.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from lightning_mlc.data.row_layout import Layout
from lightning_mlc.data.rows import CHOSEN, NO_RESPONSE, REJECTED, Row
from lightning_mlc.errors import UserError, first_line
from lightning_mlc.models.attention import LAYER_TYPES, packed_layout_of
from lightning_mlc.models.compiling import uncompiled
from lightning_mlc.models.logprobs import head_of
from lightning_mlc.models.parts import num_layers
from lightning_mlc.models.policy import Policy, Shortcuts
from lightning_mlc.models.trials import difference, tolerance_of, trial_tokens

logger = logging.getLogger("lightning_mlc")

_CERTAIN = 3.0
"""What has no plain way to fall back to, and is refused, must differ by more: rounding may change a token's expert."""
LONGEST_TRIAL = 8192
"""Tokens. Rows are not packed where they could be longer than a window that is as long as this or longer."""
WINDOW_NAMES = ("window", "chunk", "block_size", "local_att", "floor_scale")
"""Parts of the names of configuration keys that say how far tokens see, or after how many something changes."""


@dataclass(frozen=True)
class Checked:
    """What was found out about a model. Processes that share it out have it from one of them."""

    layout: Layout
    """How its rows are laid out."""
    shortcuts: Shortcuts
    layer_returns: int
    """See :class:`~lightning_mlc.models.policy.Policy`."""
    width: int
    """Width of the hidden states that were asked for."""

    def apply(self, policy: Policy) -> None:
        """Let ``policy``, of the same model, do what was found to be right."""
        policy.shortcuts, policy.layer_returns = self.shortcuts, self.layer_returns


def windows(config: PreTrainedConfig) -> list[int]:
    """Every number of tokens that a key of ``config`` names as a window, a chunk or the like, in order."""

    def numbers(value: Any, named: bool) -> Iterator[int]:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                yield from numbers(inner, named or any(name in str(key) for name in WINDOW_NAMES))
        elif isinstance(value, list | tuple):
            for inner in value:
                yield from numbers(inner, named)
        elif named and isinstance(value, int) and not isinstance(value, bool) and value > 1:
            yield value

    return sorted(set(numbers(config.get_text_config().to_dict(), named=False)))


def trial_length(config: PreTrainedConfig, longest: int | None) -> int:
    """Tokens that the longest sequence of the trial has to exceed.

    A window, or a chunk, that a row of the run cannot exceed changes nothing: all tokens of the row are in it. So it
    is enough to exceed those that are shorter than the run's ``longest`` row (None: of any length), and the trial
    costs less than one step on such rows.
    """
    bound = LONGEST_TRIAL if longest is None else min(longest, LONGEST_TRIAL)
    return max((window for window in windows(config) if window < bound), default=0)


@torch.no_grad()
def self_check(
    policy: Policy, layer: int | None = None, longest: int | None = None, packing: bool | None = None
) -> Checked:
    """Try ``policy`` in evaluation mode, let it take the shortcuts that give the same, and say how to lay out rows.

    Args:
        policy: A model with its weights, on the device it can be run on.
        layer: The layer whose hidden states are needed; None for the last.
        longest: Most tokens that a row of the run has, None if that is not known.
        packing: Whether to pack rows; None to do so where it gives the same.

    Raises:
        UserError: The model cannot be run at all, its tokens see those after them, padding changes its results, or
            ``packing`` is asked for and does.
    """
    training = [module for module in policy.modules() if module.training]
    policy.eval()
    try:
        with uncompiled(), _hooks_as_they_were(policy.causal_lm):
            trial = _Trial(policy, layer, longest)
            checked = trial.run(packing)
    finally:
        for module in training:
            module.training = True
    checked.apply(policy)
    return checked


class _Plain(NamedTuple):
    """What the plain way gives for one sequence, in float64 on the model's device."""

    logp: Tensor
    """() log-probability of the response."""
    next: Tensor
    """(V,) logits after the prompt."""
    state: Tensor
    """(H,) hidden state at the end of the prompt, of the layer asked for."""
    mean: Tensor
    """(H,) mean over all tokens of the last hidden states."""


class _Trial:
    def __init__(self, policy: Policy, layer: int | None, longest: int | None) -> None:
        self.policy = policy
        self.model = policy.causal_lm
        self.name = type(self.model).__name__
        self.longest = longest
        self.depth = num_layers(self.model.config)
        self.layer = self.depth if layer is None else layer
        # Without an interest in hidden states, a model that does not give them is fine.
        self.states_matter = layer is not None
        self.rows = trial_rows(self.model.config, trial_length(self.model.config, longest))
        self.returns = 0
        self.embedded: Tensor | None = None
        self.after_first: Tensor | None = None
        """What the first layer was given, and what it gave."""
        self.sample: tuple[Tensor, Tensor] | None = None
        """Last hidden states (1, T, H) and logits (1, T, V) at some tokens of one sequence."""
        self.tolerance = tolerance_of(self.model)
        self.plain = {(row.example, row.language, row.kind): self._alone(row) for row in self.rows}

    # ---- the plain way --------------------------------------------------------------------------------

    def _alone(self, row: Row) -> _Plain:
        ids = torch.tensor([[*row.prompt, *row.response]], device=self.model.device)
        try:
            with self._watching_first_layer():
                output = self.model(input_ids=ids, use_cache=False, output_hidden_states=True)
        except Exception as error:  # foreign code
            raise UserError(
                "model.name_or_path",
                f"{self.name} cannot be run on a short text "
                f"({type(error).__name__}: {first_line(error)}); give another",
            ) from error
        end = len(row.prompt) - 1
        logits, response = output.logits[0, end:-1], ids[0, len(row.prompt) :]
        # In float64 all would be large.
        parts = zip(torch.split(logits, 256), torch.split(response, 256), strict=True)
        logps = [part.double().log_softmax(-1).gather(1, labels[:, None]).sum() for part, labels in parts]
        states = self._states(output)
        if row.kind == REJECTED:  # a short one
            self.sample = states[-1][:, end:], output.logits[:, end:]
        if self.states_matter and states[self.layer].ndim != 3:
            raise UserError(
                "model.consistency.layer",
                f"layer {self.layer} of {self.name} has {states[self.layer].shape[-2]} hidden states for each token; "
                "set it to -1, after the last layer, where they are one",
            )
        logp = torch.stack(logps).sum()
        return _Plain(logp, logits[0].double(), states[self.layer][0, end].double(), states[-1][0].double().mean(0))

    def _states(self, output: Any) -> Sequence[Tensor]:
        states = getattr(output, "hidden_states", None)
        if states is not None and len(states) == self.depth + 1:
            if self.embedded is not None and self.after_first is not None and torch.equal(states[0], self.after_first):
                # Mamba and RWKV leave out the embeddings, and give the last layer's states with and without norm.
                return [self.embedded, *states[:-2], states[-1]]
            return list(states)
        if self.states_matter:
            count = "no" if states is None else str(len(states))
            raise UserError(
                "model.name_or_path",
                f"{self.name} gives {count} hidden states for its {self.depth} layers, "
                "so those that consistency terms need are not known; give another model",
            )
        return [output.logits] * (self.depth + 1)

    @contextmanager
    def _watching_first_layer(self) -> Iterator[None]:
        """Note what it is given, and how many values it returns: the end of a shorter pass returns as many."""
        try:
            first = self.policy.layers[0]
        except UserError:
            yield
            return

        def note(_module: Any, inputs: Any, keywords: dict[str, Any], output: Any) -> None:
            self.returns = len(output) if isinstance(output, tuple | list) else 0
            self.embedded = inputs[0] if inputs else keywords.get("hidden_states")
            self.after_first = output[0] if isinstance(output, tuple | list) else output

        handle = first.register_forward_hook(note, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _require_causal(self) -> None:
        """Two sequences that begin alike: the logits at the end of what they share."""
        first, second = (self.plain[0, 0, kind].next for kind in (CHOSEN, REJECTED))
        if not (first.isfinite().all() and second.isfinite().all()):
            raise UserError(
                "model.name_or_path",
                f"the logits of {self.name} are not finite: its weights are damaged, or too large for "
                f"{str(self.model.dtype).removeprefix('torch.')}",
            )
        if (share := difference(first, second)) > _CERTAIN * self.tolerance:
            raise UserError(
                "model.name_or_path",
                f"tokens of {self.name} see those after them (the logits after a prompt change with the response by "
                f"{share:.1g} of their size): it is an encoder; give a causal language model",
            )

    # ---- ours -----------------------------------------------------------------------------------------

    def run(self, packing: bool | None) -> Checked:
        self._require_causal()
        packed, why_not = self._packed_layout(packing)
        everything = Shortcuts(True, True, True) if self.policy.decoder is not None else Shortcuts(hooks=False)
        if packed is not None and not self._difference(packed, everything):
            return self._checked(packed, everything)
        return self._piece_by_piece(packing, packed, why_not)

    def _packed_layout(self, packing: bool | None) -> tuple[Layout | None, str]:
        """How rows would be packed; or None, and why they are not."""
        if packing is False:
            return None, ""
        implementation = str(self.model.config._attn_implementation)
        layout = packed_layout_of(self.model.config, implementation)
        if layout is None:
            types = set(getattr(self.model.config.get_text_config(), "layer_types", None) or LAYER_TYPES)
            return None, f"attention {implementation}, layers {', '.join(sorted(types))}"
        longest = None if layout.one_row else self.longest
        beyond = [w for w in windows(self.model.config) if w >= LONGEST_TRIAL and (longest is None or w < longest)]
        known = getattr(self.model.config.get_text_config(), "sliding_window", None)
        if any(window != known for window in beyond):
            return None, f"a window of {beyond[0]} tokens, longer than is tried"
        return layout, ""

    def _piece_by_piece(self, packing: bool | None, packed: Layout | None, why_not: str) -> Checked:
        """The padded plain way, and then whatever can be added to it."""
        layout, shortcuts = Layout(), Shortcuts()
        difference = self._difference(layout, shortcuts, _CERTAIN * self.tolerance)
        if difference and self.policy.decoder is not None:
            shortcuts = Shortcuts(hooks=True)
            difference = self._difference(layout, shortcuts, _CERTAIN * self.tolerance)
        if difference:
            raise UserError(
                "model.name_or_path",
                f"padding changes what {self.name} gives ({difference}), so batches cannot be run; give another model",
            )
        reasons: dict[str, str] = {}
        if self.policy.decoder is not None:
            for name in Shortcuts._fields:
                tried = shortcuts._replace(**{name: True})
                if difference := self._difference(layout, tried):
                    reasons[name] = difference
                else:
                    shortcuts = tried
        else:
            reasons = dict.fromkeys(Shortcuts._fields, "no module has its layers")
        if packed is not None:
            why_not = self._difference(packed, shortcuts)
            layout = layout if why_not else packed
        self._tell(reasons, why_not)
        if packing and not layout.packed:
            raise UserError("model.packing", f"{self.name} cannot run packed rows ({why_not}); set it to null or false")
        return self._checked(layout, shortcuts)

    def _tell(self, reasons: Mapping[str, str], why_not_packed: str) -> None:
        consequences = {
            "hooks": "hidden states are taken from those of all layers, which takes more memory",
            "two_parts": "the logits of all tokens are made at once, which takes more memory",
            "early_end": "prompts alone run all layers, which takes more time",
        }
        if why_not_packed:
            logger.warning("%s cannot run packed rows (%s): rows are padded", self.name, why_not_packed)
        for name, reason in reasons.items():
            logger.warning("%s is run the plain way (%s): %s", self.name, reason, consequences[name])

    def _checked(self, layout: Layout, shortcuts: Shortcuts) -> Checked:
        width = int(next(iter(self.plain.values())).state.shape[-1])
        return Checked(layout, shortcuts, self.returns, width)

    def _difference(self, layout: Layout, shortcuts: Shortcuts, tolerance: float | None = None) -> str:
        """In words, how ``layout`` run with ``shortcuts`` differs from the plain way; empty if it does not."""
        self.policy.shortcuts, self.policy.layer_returns = shortcuts, self.returns
        prompts = [Row(row.prompt, (), row.example, row.language, NO_RESPONSE) for row in self.rows if row.leads]
        try:
            answers = layout.blocks(self.rows, 0)
            alone = layout.blocks(prompts, 0) if self.states_matter else ()
            worst = {"log-probabilities": 0.0, "hidden states": 0.0, "logits": 0.0}
            if shortcuts.two_parts:
                self._compare_head(worst)
            for block in (*answers, *alone):
                block = block.to(self.model.device)
                wanted = self.layer if self.states_matter else None
                found = self.policy(block, wanted, pool=self.states_matter and block.longest_response > 0)
                for index, place in enumerate(_places(block)):
                    expected = self._expected(place)
                    if block.longest_response:
                        _note(worst, "log-probabilities", found.logps[index], expected.logp)
                    if found.states is not None:
                        _note(worst, "hidden states", found.states[index], expected.state)
                    if found.pooled is not None:
                        _note(worst, "hidden states", found.pooled[index], expected.mean)
        except Exception as error:  # foreign code, which may stumble over a mask or a missing part in any way
            return f"{type(error).__name__}: {first_line(error)}"[:160]
        finally:
            self.policy.shortcuts = Shortcuts()
        name, difference = max(worst.items(), key=lambda item: item[1])
        return f"{name} differ by {difference:.1g} of their size" if difference > (tolerance or self.tolerance) else ""

    def _compare_head(self, worst: dict[str, float]) -> None:
        name = self.policy.decoder_name
        assert name is not None
        assert self.sample is not None
        states, logits = self.sample
        found = head_of(self.model, name)(inputs_embeds=states, use_cache=False).logits
        _note(worst, "logits", found, logits.double())

    def _expected(self, place: tuple[int, int, int]) -> _Plain:
        example, language, kind = place
        return self.plain[example, language, CHOSEN if kind == NO_RESPONSE else kind]


def trial_rows(config: PreTrainedConfig, exceed: int) -> list[Row]:
    """Three prompts, one of them with two responses: unequal in length, one sequence of more than ``exceed`` tokens."""
    tokens = trial_tokens(config)

    def take(count: int) -> tuple[int, ...]:
        return tuple(itertools.islice(tokens, count))

    # The first two are as long together as the last two, and the first prompt is as long as the others together: packed
    # rows make one block, with no padding. What takes time is to read the weights, once for each pass.
    first = take(5)
    return [
        Row(first, take(max(5, exceed)), 0, 0, CHOSEN),
        Row(first, take(3), 0, 0, REJECTED, leads=False),
        Row(take(3), take(4), 1, 0, CHOSEN),
        Row(take(2), take(4), 1, 1, CHOSEN),
    ]


def _places(block: Any) -> list[tuple[int, int, int]]:
    return list(zip(block.example.tolist(), block.language.tolist(), block.kind.tolist(), strict=True))


def _note(worst: dict[str, float], name: str, found: Tensor, expected: Tensor) -> None:
    worst[name] = max(worst[name], difference(found, expected))


@contextmanager
def _hooks_as_they_were(model: PreTrainedModel) -> Iterator[None]:
    """Remove, in the end, the hooks that ``output_hidden_states`` leaves in a model, which slow a compiled one down."""
    flag = "_output_capturing_hooks_installed"
    before = [(module, module._forward_hooks.copy(), flag in module.__dict__) for module in model.modules()]
    try:
        yield
    finally:
        for module, hooks, installed in before:
            for key in module._forward_hooks.keys() - hooks.keys():
                del module._forward_hooks[key]
            if not installed:
                module.__dict__.pop(flag, None)
