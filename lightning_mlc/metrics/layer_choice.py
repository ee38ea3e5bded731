"""The layer whose hidden states cluster by prompt rather than by language."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_mlc.metrics.silhouette import silhouettes


@dataclass(frozen=True)
class LayerChoice:
    """Silhouettes at every layer, and the layer that they choose.

    Args:
        by_prompt: Silhouettes by prompt of K layers from 0 (the embeddings) on; NaN where undefined.
        by_language: Silhouettes by language of the same layers.
    """

    by_prompt: tuple[float, ...]
    by_language: tuple[float, ...]

    @classmethod
    def of(cls, states: Tensor, mask: Tensor) -> LayerChoice:
        """Measure hidden states.

        Args:
            states: (B, L, K, H) floating point: B prompts in L languages at K layers, the embeddings first.
            mask: (B, L) bool: False where a prompt does not exist in the language.
        """
        found = [silhouettes(states[:, :, layer], mask) for layer in range(states.shape[2])]
        return cls(tuple(float(each.by_prompt) for each in found), tuple(float(each.by_language) for each in found))

    @property
    def layer(self) -> int | None:
        """Index of the layer with the largest difference; None if it is undefined everywhere."""
        return choose_layer(self.by_prompt, self.by_language)

    @property
    def reason(self) -> str:
        """Why, in words."""
        if self.layer is None:
            return "silhouettes need two prompts or more, each in two languages or more"
        prompt, language = self.by_prompt[self.layer], self.by_language[self.layer]
        return f"silhouette by prompt {prompt:.3f}, by language {language:.3f}: the largest difference"


def choose_layer(by_prompt: Sequence[float], by_language: Sequence[float]) -> int | None:
    """Choose the layer whose states cluster most by prompt, compared with by language.

    It is the layer with the largest silhouette by prompt minus silhouette by language. Of layers with the same
    difference it is the last one. Layer 0 is never chosen: its states, the embeddings, are before any layer.

    Args:
        by_prompt: Silhouettes by prompt of the layers from 0 (the embeddings) on; NaN where undefined.
        by_language: Silhouettes by language of the same layers.

    Returns:
        The index of the layer. None if the difference is defined for no layer.
    """
    differences = [prompt - language for prompt, language in zip(by_prompt, by_language, strict=True)]
    defined = [layer for layer, value in enumerate(differences) if layer > 0 and not math.isnan(value)]
    return max(defined, key=lambda layer: (differences[layer], layer), default=None)
