"""What a model's passes cost in floating-point operations, by formula.

Counted is what the model asks for, whatever way it is computed: no padding, nothing that is computed again
(activations under gradient checkpointing, chunks of logits), and attention in full, without halving it for the
tokens that a causal mask hides. That is how model FLOPs utilization is defined (PaLM, arXiv 2204.02311,
appendix B), and makes figures comparable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lightning_mlc.models.attention import LAYER_TYPES
from lightning_mlc.models.parts import num_layers


@dataclass(frozen=True)
class Pass:
    """Size of a pass through a model."""

    tokens: float
    """Tokens of all sequences."""
    length: float
    """Tokens of a sequence. Where they differ, their mean gives a little less than there is."""
    head_tokens: float = 0
    """Tokens whose logits are computed."""
    layers: int | None = None
    """Decoder layers that are run; None for all."""


@dataclass(frozen=True)
class ModelFlops:
    """Floating-point operations of the passes of one model; a multiplication and an addition are two.

    Left out is what is not a product with a weight or of attention: norms, activations, rotations, softmax, the
    look-up of embeddings; also the extractor and the losses, which see few vectors.
    """

    layers: int
    """Number of decoder layers."""
    weights: float
    """Weights that a token is multiplied with in one layer (on average, where layers differ)."""
    trained_weights: float
    """Those of them that are trained."""
    attention: int
    """Width of the queries of one layer, all heads together."""
    head_weights: int
    """Weights of ``lm_head``."""
    trained_head_weights: int
    """The same if they are trained, else 0."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelFlops | None:
        """Those of a causal LM, with adapters in it or without; of a mixture's experts, those that a token visits.

        None where the formula does not hold: its layers are not all of attention, or differ in their width.
        """
        config = model.config.get_text_config()
        width = _attention_width(config)
        if width is None:
            return None
        weights = trained = 0.0
        lm: Any = model
        for module in lm.get_decoder().modules():
            if isinstance(module, nn.Embedding):
                continue
            for name, parameter in module.named_parameters(recurse=False):
                count = float(parameter.numel())
                if isinstance(module, nn.Linear) and name == "weight":
                    count = module.in_features * module.out_features  # quantized weights are stored in other shapes
                elif parameter.ndim == 3 and (visited := getattr(config, "num_experts_per_tok", None)):
                    count *= visited / parameter.shape[0]
                elif parameter.ndim < 2:
                    continue
                weights += count
                trained += count * parameter.requires_grad
        depth = num_layers(config)
        head = lm.get_output_embeddings().weight
        return cls(
            layers=depth,
            weights=weights / depth,
            trained_weights=trained / depth,
            attention=width,
            head_weights=head.numel(),
            trained_head_weights=head.numel() if head.requires_grad else 0,
        )

    def forward(self, size: Pass) -> float:
        """Operations of a forward pass: products with weights, queries with keys, scores with values."""
        in_layer = self.weights + 2 * size.length * self.attention
        return 2 * (size.tokens * in_layer * self._layers(size) + size.head_tokens * self.head_weights)

    def backward(self, size: Pass) -> float:
        """Operations of its backward pass: a product for the gradient of each input and of each trained weight."""
        in_layer = self.weights + self.trained_weights + 4 * size.length * self.attention
        head = self.head_weights + self.trained_head_weights
        return 2 * (size.tokens * in_layer * self._layers(size) + size.head_tokens * head)

    def _layers(self, size: Pass) -> int:
        return self.layers if size.layers is None else size.layers


def _attention_width(config: Any) -> int | None:
    """Width of the queries of each layer, all heads together; None if layers differ or have other parts."""
    heads = getattr(config, "num_attention_heads", None)
    kinds = getattr(config, "layer_types", None) or ()
    # Layers of their own: states of Mamba and the like beside or instead of attention, heads that differ by layer.
    others = any(key.startswith(("mamba", "ssm", "lru", "linear_", "global_head_dim")) for key in vars(config))
    if not isinstance(heads, int) or others or not set(kinds) <= {*LAYER_TYPES, "chunked_attention"}:
        return None
    try:
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
    except Exception:  # of transformers: layers have one each, and none in common
        return None
    return heads * head if isinstance(head, int) else None
