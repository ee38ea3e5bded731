"""The layer whose hidden states are compared, and its choice where ``model.consistency.layer`` is ``auto``.

The choice is made once, when the model of a new run is loaded. From then on the run has an integer, which its
checkpoints keep: a run that resumes takes it from there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from lightning_mlc.checkpoints.format import open_checkpoint
from lightning_mlc.checkpoints.provenance import Provenance
from lightning_mlc.consistency import Consistency
from lightning_mlc.data.datamodule import MultilingualData
from lightning_mlc.data.rows import NO_RESPONSE, TokenSequence
from lightning_mlc.data.sampling import MicroBatch, spread
from lightning_mlc.data.tokenised import TokenisedExample
from lightning_mlc.distributed.sharding import FSDP2
from lightning_mlc.errors import UserError, first_line
from lightning_mlc.lightning_internals import checkpoint_to_load
from lightning_mlc.metrics import LayerChoice
from lightning_mlc.models.compiling import uncompiled
from lightning_mlc.models.layers import AUTO, Layer, num_layers, resolve_layer
from lightning_mlc.models.policy import Policy
from lightning_mlc.models.self_check import Checked, restored_hooks
from lightning_mlc.processes import raise_together
from lightning_mlc.progress.bars import say, track
from lightning_mlc.training.building import PolicyBuilder

OPTION = "model.consistency.layer"
PROMPTS = 64
"""Most prompts that the choice is made on, each in all of its languages."""
BLOCK_TOKENS = 1024
"""Most tokens in a pass, unless one prompt has more. The states of all layers are in memory at once."""

logger = logging.getLogger("lightning_mlc")


def layer_of_run(layer: Layer, depth: int, trainer: Trainer, stage: str) -> int | None:
    """The index of the layer that ``layer`` names in a run.

    Args:
        layer: ``model.consistency.layer``.
        depth: Number of decoder layers.
        trainer: Knows the checkpoint that the run begins with. Its layer is that of the run if ``layer`` is ``auto``.
        stage: ``fit``, ``validate``, ``test`` or ``predict``.

    Returns:
        An index from 0 to ``depth``. None: it is to be chosen (:func:`try_out`).

    Raises:
        UserError: The model has no such layer, or nothing can choose one.
    """
    if layer != AUTO:
        return resolve_layer(layer, depth)
    path = checkpoint_to_load(trainer)
    if path is not None:
        index = _layer_of_checkpoint(path, depth)
        say(f"layer: {index} of {depth} (the checkpoint's)")
        return index
    if stage == "predict":  # needs no hidden states
        return depth
    if stage != "fit":
        raise UserError(OPTION, f"is {AUTO}, which fit chooses; give the number of a layer, or a checkpoint")
    return None


def _layer_of_checkpoint(path: Path, depth: int) -> int:
    stored: Any = (Provenance.read(open_checkpoint(path)).representation or {}).get("layer")
    try:
        return resolve_layer(stored, depth)
    except (UserError, TypeError) as error:
        raise UserError(
            "ckpt_path",
            f"the checkpoint was trained on layer {stored}, which this model of {depth} layers does not have; give the "
            f"model that it was trained from, or a number for {OPTION}",
        ) from error


class Tried(NamedTuple):
    """A model that was tried, and the layer that terms compare."""

    checked: Checked
    """How the model is run."""
    consistency: Consistency
    """The settings, in which ``layer`` is a number."""
    layer: int
    """Index of the layer."""


def try_out(
    builder: PolicyBuilder, policy: Policy, consistency: Consistency, layer: int | None, trainer: Trainer
) -> Tried:
    """Try a model that was just loaded, and choose the layer if it is not known yet. All processes call it.

    The ways to run the model that give the right results are set in ``policy`` and in the data.

    Args:
        builder: Loaded the model.
        policy: The model.
        consistency: The consistency terms.
        layer: Index of the layer; None chooses it.
        trainer: Knows data, device and processes.

    Raises:
        UserError: The model cannot be run, or no layer can be chosen.
    """
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    strategy = trainer.strategy
    sharding = strategy if isinstance(strategy, FSDP2) else None
    longest = data.extent().longest_row
    if layer is None:
        with _warnings_later():
            last = num_layers(policy.causal_lm.config)
            data.layout = builder.try_out(policy, last, longest, trainer, sharding).layout
        layer = _choose_together(policy, data, trainer)
    checked = builder.try_out(policy, layer, longest, trainer, sharding)
    data.layout = checked.layout
    if consistency.layer == AUTO:
        consistency = replace(consistency, layer=layer)
    return Tried(checked, consistency, layer)


@contextmanager
def _warnings_later() -> Iterator[None]:
    """Keep warnings about the model back. It is tried again with the layer that is chosen, and they come then."""
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _choose_together(policy: Policy, data: MultilingualData, trainer: Trainer) -> int:
    """The choice of process 0, which alone may have the weights. It says so in one line."""
    layer, error = None, None
    if trainer.is_global_zero:
        try:
            # Random numbers drawn here must not change the run that follows.
            with isolate_rng(), torch.device("cpu"):
                layer = choose(policy, data, shown=trainer.progress_bar_callback is not None)
        except UserError as found:
            error = found
        except torch.OutOfMemoryError as found:
            error = UserError(OPTION, f"there is no memory to choose a layer ({first_line(found)}); give its number")
    raise_together(error)
    layer = trainer.strategy.broadcast(layer)
    assert layer is not None
    return layer


def choose(policy: Policy, data: MultilingualData, shown: bool = True) -> int:
    """Choose the layer by the hidden states of training prompts (:class:`~lightning_mlc.metrics.LayerChoice`).

    Args:
        policy: The initial model, after :func:`~lightning_mlc.models.self_check.self_check`.
        data: The data, set up.
        shown: Whether to show progress.

    Returns:
        The index of the layer, from 1 on.

    Raises:
        UserError: Silhouettes are undefined in every layer, or a layer has several states for each token.
    """
    examples = prompts_to_measure(data)
    states, mask = states_of_prompts(policy, examples, data, shown)
    choice = LayerChoice.of(states, mask)
    if choice.layer is None:
        raise UserError(
            OPTION,
            f"is {AUTO}, but the training data is too little to choose by: {choice.reason}; give the number of a layer",
        )
    languages = int(mask.any(0).sum())
    say(
        f"layer: {choice.layer} of {states.shape[2] - 1} ({choice.reason}, on {len(examples)} training prompts in "
        f"{languages} languages)"
    )
    return choice.layer


def prompts_to_measure(data: MultilingualData) -> list[TokenisedExample]:
    """At most ``PROMPTS`` different training prompts in two or more languages, from the whole of the data."""
    sizes = data.sizes("train")
    taken = spread(np.flatnonzero(sizes.groups), PROMPTS)
    if not taken:
        return []

    def uncollated(examples: Sequence[TokenisedExample], *_: Any) -> Any:
        return examples

    table: Any = data.loader("train", [], uncollated).dataset
    examples: list[TokenisedExample] = table[MicroBatch(tuple(taken), sizes.totals(taken))]
    # Several responses to one prompt are several examples, whose equal states would be no clusters.
    return list({example["same_prompt"]: example for example in reversed(examples)}.values())[::-1]


@torch.no_grad()
def states_of_prompts(
    policy: Policy, examples: Sequence[TokenisedExample], data: MultilingualData, shown: bool = True
) -> tuple[Tensor, Tensor]:
    """Run prompts in evaluation mode.

    Args:
        policy: The model.
        examples: B examples, of which only the prompts are run.
        data: Its layout, and its L languages.
        shown: Whether to show progress.

    Returns:
        (B, L, K, H) float32 on the CPU: hidden states at the ends of the prompts, of the embeddings and of each layer.
        (B, L) bool: whether a prompt exists in the language.
    """
    rows = [
        TokenSequence(prompt, (), index, language, NO_RESPONSE)
        for index, example in enumerate(examples)
        for language, prompt in zip(example["languages"], example["prompts"], strict=True)
    ]
    depth = num_layers(policy.causal_lm.config)
    mask = torch.zeros(len(examples), len(data.languages), dtype=torch.bool)
    states = torch.zeros(*mask.shape, depth + 1, 0)
    training = [module for module in policy.modules() if module.training]
    policy.eval()
    try:
        with (
            uncompiled(),
            restored_hooks(policy.causal_lm),
            track("choosing the layer", len(rows), "prompts", shown=shown) as work,
        ):
            for block in data.layout.blocks(rows, data.pad_id, max_tokens=BLOCK_TOKENS):
                found = policy.layer_states(block.to(policy.causal_lm.device), range(depth + 1)).float().cpu()
                if not states.shape[3]:
                    states = found.new_zeros(*states.shape[:3], found.shape[2])
                states[block.example, block.language] = found
                mask[block.example, block.language] = True
                work.advance(len(block))
    finally:
        for module in training:
            module.training = True
    return states, mask
