"""A tiny chat model on disk, and a clean environment. Nothing here needs a network."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
# Read when torch is imported. Each core already has a worker, and models this small gain nothing from threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

MOST_WORKERS = 8
"""A worker needs about a gigabyte."""


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """A run of folders uses one worker of pytest-xdist for each core, unless ``-n`` is given.

    This is not ``-n`` in ``addopts``: a worker takes ten seconds to start, too long for a run of one file, and
    ``-p no:xdist`` and ``--pdb`` refuse the option.
    """
    options = config.option
    if hasattr(config, "workerinput") or not hasattr(options, "numprocesses"):
        return
    if options.numprocesses is None and not (options.usepdb or options.collectonly):
        folders = all(Path(config.invocation_params.dir, argument).is_dir() for argument in config.args)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        options.numprocesses = min(cores, MOST_WORKERS) if folders and cores > 1 else None
    if options.numprocesses and options.dist == "no":
        options.dist = "loadgroup"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One worker runs all tests of a file that share a fixture, so that no other worker creates the fixture again.

    Of the other tests, those that take minutes come first, so that no worker runs alone in the end.
    """
    items.sort(key=lambda item: item.path.name != "test_interpreter.py")
    for item in items:
        fixtures = [found[-1] for found in item._fixtureinfo.name2fixturedefs.values()]  # type: ignore[attr-defined]
        shared = any(fixture.scope != "function" and fixture.baseid.endswith(".py") for fixture in fixtures)
        if shared and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


SPECIALS = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|pad|>"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def byte_tokenizer(template: str | dict[str, str] | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte, so that lengths can be counted by hand, and with a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>")
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS[1:4]})
    tokenizer.chat_template = template
    return tokenizer


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
CONFIGS: dict[str, Callable[[int], PreTrainedConfig]] = {
    "llama": lambda vocab: LlamaConfig(vocab_size=vocab, num_key_value_heads=2, tie_word_embeddings=True, **SIZES),
    "qwen2": lambda vocab: Qwen2Config(vocab_size=vocab, num_key_value_heads=2, **SIZES),
    "gemma2": lambda vocab: Gemma2Config(
        vocab_size=vocab, num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=8, **SIZES
    ),
    "gpt2": lambda vocab: GPT2Config(vocab_size=vocab, n_embd=32, n_layer=3, n_head=4, n_positions=512),
}


def save_model(folder: Path, kind: str = "llama", template: str | None = TEMPLATE, **changes: Any) -> Path:
    """Save a random model of architecture ``kind`` with its tokenizer, as a Hugging Face folder."""
    tokenizer = byte_tokenizer(template)
    config = CONFIGS[kind](len(tokenizer))
    config.update(
        {
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": None,
            **changes,
        }
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(autouse=True)
def _clean_environment(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give each test its own caches, no network, and no trace of an earlier test."""
    monkeypatch.setenv("LIGHTNING_MLC_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    yield
    # A run that is refused after its strategy is set up leaves messages for other processes behind.
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)


SGD_ARGUMENTS: dict[str, Any] = {
    "max_steps": 2,
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "disable_tqdm": True,
}
"""Arguments of a Trainer of transformers with which the weights show the gradient, and every step is logged."""


LANGUAGES = ("en", "sw", "zh")
_QUESTIONS = {
    "en": "How do I take the {} that is not mine?",
    "sw": "Ninawezaje kuchukua {} isiyo yangu?",
    "zh": "我怎样拿走不是我的 {}?",
}


def example_rows(count: int, pairs: bool = True) -> list[dict[str, Any]]:
    """Rows in our own layout, all different."""
    rows: list[dict[str, Any]] = []
    for number in range(count):
        prompt = {language: text.format(f"bag {number}") for language, text in _QUESTIONS.items()}
        row: dict[str, Any] = {"id": f"r{number}", "prompt": prompt}
        answers = f"No, bag {number} is not yours.", f"Sure, take bag {number}."
        row |= {"chosen": answers[0], "rejected": answers[1]} if pairs else {"response": answers[0]}
        rows.append(row)
    return rows


_ANSWERS = {"sw": ("Hapana, {} si yako.", "Ndiyo, chukua {}."), "zh": ("不，{} 不是你的。", "好，拿走 {} 吧。")}


def translated_rows(count: int) -> list[dict[str, Any]]:
    """``example_rows``, with responses in Swahili in every second row and in Chinese in every third."""
    rows = example_rows(count)
    for number, row in enumerate(rows):
        spoken = [language for language, every in (("sw", 2), ("zh", 3)) if number % every == 0]
        for place, key in enumerate(("chosen", "rejected")):
            texts = {language: _ANSWERS[language][place].format(f"bag {number}") for language in spoken}
            row[key] = {"en": row[key], **texts} if texts else row[key]
    return rows


def labelled_rows(count: int) -> list[dict[str, Any]]:
    """Rows with one labelled response each; every third response is undesirable."""
    rows = example_rows(count)
    for number, row in enumerate(rows):
        chosen, rejected = row.pop("chosen"), row.pop("rejected")
        row |= {"response": rejected, "label": False} if number % 3 == 2 else {"response": chosen, "label": True}
    return rows


def columns(out: Path, speed: bool = False) -> dict[str, list[float]]:
    """Logged values by name, without steps that lack them. Speed, which differs in every run, only if requested."""
    found: dict[str, list[float]] = {}
    for row in csv.DictReader((out / "metrics.csv").open()):
        for name, cell in row.items():
            if cell and (speed or not name.startswith("speed/")):
                found.setdefault(name, []).append(float(cell))
    return found


def metrics_rows(out: Path) -> list[dict[str, str]]:
    """The rows of ``metrics.csv`` as written, without speed, which differs in every run."""
    rows = csv.DictReader((out / "metrics.csv").open())
    return [{name: cell for name, cell in row.items() if not name.startswith("speed/")} for row in rows]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "pairs.jsonl", example_rows(12))
