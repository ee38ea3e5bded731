"""Formulas for the floating-point operations of a model's passes.

They count the operations that the model defines, however it is run: without padding, without values that are computed
twice (activations under gradient checkpointing, chunks of logits), and with full attention, although a causal mask
hides half of it. This is the definition of model FLOPs utilization (PaLM, arXiv 2204.02311, appendix B), so that the
figures can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lightning_mlc.models.attention import LAYER_TYPES
from lightning_mlc.models.layers import num_layers


@dataclass(frozen=True)
class Pass:
    """Size of one pass through a model."""

    tokens: float
    """Number of tokens of all sequences."""
    length: float
    """Number of tokens of a sequence. With the mean of unequal lengths, attention is counted a little too low."""
    head_tokens: float = 0
    """Number of tokens whose logits are computed."""
    layers: int | None = None
    """Number of decoder layers that are run. None: all."""


@dataclass(frozen=True)
class ModelFlops:
    """Floating-point operations of the passes of one model. A multiplication and an addition count as two.

    Only products with weights and the products of attention are counted. Norms, activations, rotations, softmax and the
    look-up of embeddings are left out, and so are the extractor and the losses, which process few vectors.
    """

    layers: int
    """Number of decoder layers."""
    weights: float
    """Number of weights that a token is multiplied with in one layer: the mean over layers."""
    trained_weights: float
    """How many of them are trained."""
    attention: int
    """Width of the queries of one layer, all heads together."""
    head_weights: int
    """Number of weights of ``lm_head``."""
    trained_head_weights: int
    """``head_weights`` if they are trained, else 0."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> ModelFlops | None:
        """Count the weights of a model. In a mixture of experts, only the experts of one token count.

        Args:
            model: A causal LM, with or without adapters.

        Returns:
            None if the formulas do not hold: some layers have no attention, or layers differ in width.
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
                    count = module.in_features * module.out_features  # quantised weights have another shape
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
        """Return the operations of a forward pass: products with weights, of queries and keys, of scores and values."""
        in_layer = self.weights + 2 * size.length * self.attention
        return 2 * (size.tokens * in_layer * self._layers(size) + size.head_tokens * self.head_weights)

    def backward(self, size: Pass) -> float:
        """Return the operations of a backward pass: one product for each input's and each trained weight's gradient."""
        in_layer = self.weights + self.trained_weights + 4 * size.length * self.attention
        head = self.head_weights + self.trained_head_weights
        return 2 * (size.tokens * in_layer * self._layers(size) + size.head_tokens * head)

    def _layers(self, size: Pass) -> int:
        return self.layers if size.layers is None else size.layers


def _attention_width(config: Any) -> int | None:
    """Width of the queries of each layer, all heads together. None if layers differ or have other parts."""
    heads = getattr(config, "num_attention_heads", None)
    kinds = getattr(config, "layer_types", None) or ()
    # These keys mean: recurrent layers such as Mamba, with or without attention; or head sizes that differ by layer.
    others = any(key.startswith(("mamba", "ssm", "lru", "linear_", "global_head_dim")) for key in vars(config))
    if not isinstance(heads, int) or others or not set(kinds) <= {*LAYER_TYPES, "chunked_attention"}:
        return None
    try:
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
    except Exception:  # transformers raises if layers have different values
        return None
    return heads * head if isinstance(head, int) else None
