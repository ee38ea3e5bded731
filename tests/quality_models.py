"""Tiny models of quality estimation on disk: random ones, and one whose scores are known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast, XLMRobertaConfig
from transformers import XLMRobertaForSequenceClassification as XLMRoberta

START, PAD, END = 0, 1, 2
POSITIONS = 128
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "initializer_range": 0.5,  # so that scores of different pairs differ
    "pad_token_id": PAD,
    "num_labels": 1,
}


def pair_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """One token for each byte, and pairs as BERT or XLM-R has them."""
    tokens = ["<s>", "<pad>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocab = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pairs = {"bert": "<s>:0 $A:0 </s>:0 $B:1 </s>:1", "xlm-roberta": "<s> $A </s> </s> $B </s>"}
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair=pairs[kind], special_tokens=[("<s>", START), ("</s>", END)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        cls_token="<s>",
        pad_token="<pad>",
        sep_token="</s>",
        eos_token="</s>",
        model_input_names=["input_ids", *(["token_type_ids"] if kind == "bert" else []), "attention_mask"],
    )


def save_quality_model(folder: Path, kind: str = "xlm-roberta", **changes: Any) -> Path:
    """A random model with one label, of the architecture ``bert`` or ``xlm-roberta``, with its tokenizer."""
    torch.manual_seed(0)
    tokenizer = pair_tokenizer(kind)
    options = {"vocab_size": len(tokenizer), **SIZES, **changes}
    if kind == "bert":
        model: Any = BertForSequenceClassification(BertConfig(max_position_embeddings=POSITIONS, **options))
    else:
        # Positions begin behind that of padding, as in the published models: 514 for 512 tokens.
        config = XLMRobertaConfig(max_position_embeddings=POSITIONS + PAD + 1, type_vocab_size=1, **options)
        model = XLMRoberta(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_counting_model(folder: Path, better: float = 1.0) -> Path:
    """A BERT with set weights that expects as many ``b`` in the translation as there are ``a`` in the source.

    Its score is :func:`counted` for ``better=1``, and larger for worse translations for ``better=-1``. A vector has
    four components. Those of ``a`` and ``b`` are 1 and -1 in the first; all have mean 0 and variance 1, which the norm
    leaves as they are. The attention is a mean over all tokens, the intermediate layer takes its absolute value.
    """
    tokenizer = pair_tokenizer("bert")
    root = math.sqrt(2)
    config = BertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=2,
        hidden_act="relu",
        layer_norm_eps=1e-12,
        pad_token_id=PAD,
        num_labels=1,
    )
    model: Any = BertForSequenceClassification(config)
    first, both = torch.tensor([1.0, 0, 0, 0]), torch.tensor([1.0, -1, 0, 0])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.fill_(1.0 if name.endswith("LayerNorm.weight") else 0.0)
        words = model.bert.embeddings.word_embeddings.weight
        words[:] = torch.tensor([0.0, 0, root, -root])
        words[tokenizer.convert_tokens_to_ids("a")] = torch.tensor([1.0, -1, 1, -1])
        words[tokenizer.convert_tokens_to_ids("b")] = torch.tensor([-1.0, 1, 1, -1])
        layer = model.bert.encoder.layer[0]
        layer.attention.self.value.weight[0] = first
        layer.attention.output.dense.weight[:, 0] = both
        layer.intermediate.dense.weight[:] = torch.stack([first, -first])
        layer.output.dense.weight[:] = torch.tensor([[0.0, 0], [0, 0], [-1, -1], [1, 1]])
        model.bert.pooler.dense.weight[:] = torch.eye(4)
        model.classifier.weight[:] = torch.tensor([[0.0, 0, better, 0]])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def counted(source: str, translation: str) -> float:
    """The score that the model of :func:`save_counting_model` has for a pair, written out in numbers."""
    mean = (source.count("a") - translation.count("b")) / (len(source) + len(translation) + 3)
    apart = abs(mean) / math.sqrt(1 + mean**2 / 2)  # after the first norm
    kept = math.sqrt(2) / math.sqrt(1 + mean**2 / 2) - apart
    return math.tanh(kept / math.sqrt((apart**2 + kept**2) / 2))
