"""Models of quality estimation: they score a translation from its source, without a reference.

Such a model is a regression that transformers has a class for: ``AutoModelForSequenceClassification`` with one label,
which reads source and translation as a pair of texts. MonoTransQuest (Ranasinghe et al. 2020,
https://aclanthology.org/2020.coling-main.445) is of this form: the source comes first, and the score is the output
itself. Anything else is refused, because a score of another model would be a number without meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedConfig

from lightning_mlc.errors import UserError
from lightning_mlc.evaluation.systems.local import choose_device
from lightning_mlc.lint.model_batches import MOST_TOKENS, device_memory, padded_batches, require_tokenizer_of, usable
from lightning_mlc.sources import ModelSource, from_pretrained, load_config, load_tokenizer

OPTION = "model.name_or_path"
REMEDY = "give a model of quality estimation, such as TransQuest/monotransquest-da-multilingual@refs/pr/2"
KIND = "ForSequenceClassification"
"""How names of classes end that make one vector of a text, or of a pair of texts."""


class QualityModel:
    """From pairs of a source and a translation to scores.

    Args:
        model: A classifier of transformers with one label.
        tokenizer: Its tokenizer.
        longest: Tokens of a pair that are read. The longer text of a longer pair is cut first.
    """

    def __init__(self, model: Any, tokenizer: Any, longest: int) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._longest = longest

    @classmethod
    def load(cls, source: ModelSource, device: str = "auto") -> QualityModel:
        """Load a model in float32. Only weights in safetensors are read, and no code of its repository is run.

        Args:
            source: A folder or an id of the hub.
            device: ``auto`` for an accelerator if there is one, or a torch device.

        Raises:
            UserError: There is no such model, or it is of another kind.
        """
        where = choose_device(device)
        if source.is_gguf:
            raise UserError(OPTION, f"{source} is a GGUF file, and those hold chat models; {REMEDY}")
        config = _regression(source)
        tokenizer = load_tokenizer(source)
        require_tokenizer_of(config, tokenizer, source)
        if tokenizer.num_special_tokens_to_add(pair=True) <= tokenizer.num_special_tokens_to_add(pair=False):
            raise UserError(
                OPTION, f"the tokenizer of {source} puts nothing between a source and its translation; {REMEDY}"
            )
        model, loading = from_pretrained(
            AutoModelForSequenceClassification.from_pretrained,
            source,
            "model of quality estimation",
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
        )
        if missing := sorted(loading["missing_keys"]):
            raise UserError(OPTION, f"{source} lacks weights, such as {missing[0]}; give a complete model")
        with device_memory():
            model.eval().to(where)
        return cls(model, tokenizer, min(tokenizer.model_max_length, _positions(model), MOST_TOKENS))

    @torch.inference_mode()
    def scores(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Score N pairs of a source and a translation.

        Returns:
            The output of the model for each pair, on the model's own scale. An unpaired surrogate counts as a
            question mark.
        """
        sources, translations = ([usable(text) for text in side] for side in zip(*pairs, strict=True))
        encoded = self._tokenizer(sources, translations, truncation="longest_first", max_length=self._longest)
        found = [0.0] * len(pairs)
        for part, batch in padded_batches(self._tokenizer, encoded, self._model.device):
            with device_memory():
                logits = self._model(**batch).logits
            for place, score in zip(part, logits.squeeze(1).tolist(), strict=True):
                found[place] = score
        return found


def _regression(source: ModelSource) -> PreTrainedConfig:
    """The configuration of a model. Others than regressions are refused before their weights are downloaded.

    Raises:
        UserError: The configuration names no sequence classifier, or more labels than one.
    """
    config = load_config(source)
    kinds = config.architectures or []
    if not any(kind.endswith(KIND) for kind in kinds):
        what = f"is a {kinds[0]}" if kinds else "names no class in its configuration"
        raise UserError(OPTION, f"{source} {what} and estimates no quality; {REMEDY}")
    if config.num_labels != 1:
        raise UserError(OPTION, f"{source} has {config.num_labels} labels, and a score is one label; {REMEDY}")
    return config


def _positions(model: nn.Module) -> int:
    """The longest input that the model's table of positions has room for; without a table, there is no limit."""
    for name, table in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(table, nn.Embedding):
            # Models like RoBERTa count positions from the one after that of padding.
            return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)
    return MOST_TOKENS
