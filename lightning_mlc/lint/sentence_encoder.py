"""Models of sentence embeddings, run with transformers alone.

Such a model is a folder, or a repository of the hub, in the form of sentence-transformers: ``modules.json`` names the
steps from a text to a vector. The steps that the usual multilingual models have are done here: ``Transformer``,
``Pooling`` (the first token, the mean, the maximum or the last token), ``Dense`` and ``Normalize``. Anything else is
refused, because vectors would be wrong without an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.utils.hub import cached_file

from lightning_mlc.errors import UserError, first_line
from lightning_mlc.evaluation.systems.local import choose_device
from lightning_mlc.lint.model_batches import MOST_TOKENS, device_memory, padded_batches, require_tokenizer_of, usable
from lightning_mlc.sources import ModelSource, from_pretrained

OPTION = "model.name_or_path"


def _first(states: Tensor, mask: Tensor) -> Tensor:
    return states[:, 0]


def _last(states: Tensor, mask: Tensor) -> Tensor:
    return states[torch.arange(len(states)), mask.sum(1) - 1]


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    weights = mask.unsqueeze(2).to(states.dtype)
    return (states * weights).sum(1) / weights.sum(1)


def _maximum(states: Tensor, mask: Tensor) -> Tensor:
    return states.masked_fill(mask.unsqueeze(2) == 0, -torch.inf).amax(1)


POOLINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": _first,
    "mean": _mean,
    "max": _maximum,
    "lasttoken": _last,
}
"""From states (N, T, H) and mask (N, T) to vectors (N, H). Padding is on the right; each row has a token."""
_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "lasttoken",
}


class SentenceEncoder:
    """From texts to vectors.

    Args:
        model: Gives the last hidden states.
        tokenizer: Its tokenizer.
        longest: Tokens of a text that are read.
        pooling: A name in :data:`POOLINGS`.
        dense: Further layers.
        prefix: A text that the model wants before each text.
    """

    def __init__(
        self, model: Any, tokenizer: Any, longest: int, pooling: str, dense: Sequence[nn.Module] = (), prefix: str = ""
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._longest = longest
        self._pool = POOLINGS[pooling]
        self._dense = dense
        self._prefix = prefix

    @classmethod
    def load(cls, source: ModelSource, device: str = "auto") -> SentenceEncoder:
        """Load a model.

        Args:
            source: A folder or an id of the hub.
            device: ``auto`` for an accelerator if there is one, or a torch device.

        Raises:
            UserError: There is no such model, or it has a step that is not known here.
        """
        where = choose_device(device)
        tokenizer, model, limits, pooling, dense = None, None, {}, None, []
        for module in _json(source, "modules.json"):
            kind, path = str(module.get("type")).rpartition(".")[2], str(module.get("path", ""))
            if kind == "Transformer":
                tokenizer = from_pretrained(AutoTokenizer.from_pretrained, source, "tokenizer", subfolder=path)
                model = _transformer(source, path)
                limits = _json(source, f"{path}/sentence_bert_config.json".lstrip("/"), required=False)
            elif kind == "Pooling":
                pooling = _pooling(source, _json(source, f"{path}/config.json"))
            elif kind == "Dense":
                dense.append(_dense(source, path))
            elif kind != "Normalize":  # vectors are normalised in any case
                raise UserError(OPTION, f"{source} has a step '{kind}' that is not supported; give another model")
        if model is None or tokenizer is None or pooling is None:
            raise UserError(OPTION, f"{source} lacks a Transformer or a Pooling in modules.json; give another model")
        require_tokenizer_of(model.config, tokenizer, source)
        if limits.get("do_lower_case"):
            raise UserError(OPTION, f"{source} lowers texts outside of its tokenizer; give another model")
        longest = min(int(limits.get("max_seq_length") or MOST_TOKENS), tokenizer.model_max_length, MOST_TOKENS)
        settings = _json(source, "config_sentence_transformers.json", required=False)
        prefix = (settings.get("prompts") or {}).get(settings.get("default_prompt_name") or "", "")
        with device_memory():
            layers = [layer.to(where) for layer in dense]
            return cls(model.eval().to(where), tokenizer, longest, pooling, layers, prefix)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Embed N texts.

        Returns:
            (N, H) float32 on the CPU, each of length 1. An unpaired surrogate counts as a question mark.
        """
        read = [self._prefix + usable(text) for text in texts]
        encoded = self._tokenizer(read, truncation=True, max_length=self._longest)
        found: list[Tensor] = [torch.empty(0)] * len(texts)
        for part, batch in padded_batches(self._tokenizer, encoded, self._model.device):
            with device_memory():
                states = self._model(**batch).last_hidden_state
            vectors = self._pool(states, batch["attention_mask"])
            for layer in self._dense:
                vectors = layer(vectors)
            for place, vector in zip(part, nn.functional.normalize(vectors.float(), dim=1).cpu(), strict=True):
                found[place] = vector
        return torch.stack(found)


def _transformer(source: ModelSource, path: str) -> Any:
    model, loading = from_pretrained(
        AutoModel.from_pretrained,
        source,
        "model of sentence embeddings",
        subfolder=path,
        dtype=torch.float32,
        output_loading_info=True,
    )
    # Many of these models were saved without BERT's pooler, which is not used here.
    if missing := sorted(key for key in loading["missing_keys"] if "pooler" not in key):
        raise UserError(OPTION, f"{source} lacks weights, such as {missing[0]}; give a complete model")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(OPTION, f"{source} has an encoder and a decoder, which is not supported; give another model")
    return model


def _pooling(source: ModelSource, config: dict[str, Any]) -> str:
    asked = [str(config["pooling_mode"])] if config.get("pooling_mode") else []
    asked = asked or [key for key, value in config.items() if key.startswith("pooling_mode_") and value is True]
    names = [_KEYS.get(key, key) for key in asked]
    if len(names) != 1 or names[0] not in POOLINGS:
        shown = " and ".join(names) or "nothing that is known"
        raise UserError(OPTION, f"{source} pools by {shown}, which is not supported; give another model")
    return names[0]


_ACTIVATIONS: dict[str, type[nn.Module]] = {"Identity": nn.Identity, "Tanh": nn.Tanh, "ReLU": nn.ReLU, "GELU": nn.GELU}


def _dense(source: ModelSource, path: str) -> nn.Module:
    config = _json(source, f"{path}/config.json")
    activation = str(config.get("activation_function", "torch.nn.modules.activation.Tanh")).rpartition(".")[2]
    if activation not in _ACTIVATIONS:
        raise UserError(OPTION, f"{source} has a layer with {activation}, which is not supported; give another model")
    if (file := _file(source, f"{path}/model.safetensors", required=False)) is not None:
        weights = load_file(file)
    else:
        weights = torch.load(str(_file(source, f"{path}/pytorch_model.bin")), map_location="cpu", weights_only=True)
    layer = nn.Linear(config["in_features"], config["out_features"], bias="linear.bias" in weights)
    layer.load_state_dict({key.removeprefix("linear."): value.float() for key, value in weights.items()})
    return nn.Sequential(layer, _ACTIVATIONS[activation]())


def _file(source: ModelSource, name: str, required: bool = True) -> Path | None:
    """A file of the model; None if it has none of that name and need not have one.

    Raises:
        UserError: A required file is missing, or the model cannot be reached.
    """
    location, keywords = source.resolve()
    try:
        return Path(str(cached_file(location, name, revision=keywords["revision"])))
    except OSError as error:
        if not required:
            return None
        raise UserError(
            OPTION,
            f"cannot read {name} of {source} ({first_line(error)}); give a model of sentence embeddings in the form of "
            "sentence-transformers, such as sentence-transformers/LaBSE",
        ) from error


def _json(source: ModelSource, name: str, required: bool = True) -> Any:
    """The content of a JSON file; empty if it is missing and need not be there."""
    file = _file(source, name, required)
    try:
        return {} if file is None else json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(OPTION, f"{name} of {source} is not JSON") from error
