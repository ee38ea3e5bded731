"""Adapters on a model in 4 or 8 bits."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import columns, example_rows, save_model, write_jsonl
from transformers import AutoModelForCausalLM

from lightning_mlc.cli import main
from lightning_mlc.commands.training import run
from lightning_mlc.data.rows import CHOSEN, REJECTED, TokenRows, TokenSequence
from lightning_mlc.models.lora import LoRA, add_lora
from lightning_mlc.models.policy import Policy
from lightning_mlc.sources import ModelSource

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
CPU = torch.device("cpu")
ROWS = TokenRows.pad(
    [TokenSequence((1, 2, 3), (4, 5), 0, 0, CHOSEN), TokenSequence((1, 2, 3), (6,), 0, 0, REJECTED)], pad_id=0
)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Sizes for which bitsandbytes has fast paths, which are more likely to have faults.
    return save_model(tmp_path_factory.mktemp("quantized") / "model", hidden_size=64, intermediate_size=96, head_dim=16)


def fit(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    options = {
        "out": out,
        "model.name_or_path": model,
        "data.train_path": data,
        "data.val_share": 0.25,
        "trainer.accelerator": "cpu",
        "trainer.precision": "bf16-mixed",  # the dtype of products with quantised weights; auto may differ
        "trainer.max_steps": 3,
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "model.lora.r": 4,
    }
    return ["fit", *(f"--{name}={value}" for name, value in options.items()), *more]


@needs_bitsandbytes
@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_a_pass_in_evaluation_mode_changes_no_gradient(model_folder: Path, form: Any) -> None:
    """Validation runs before training, and after it bitsandbytes would leave 4-bit weights without a gradient."""
    gradients = []
    for validated in (False, True):
        torch.manual_seed(0)
        lora = LoRA(r=4, quantize=form)
        policy = Policy(add_lora(lora.load_base(ModelSource(str(model_folder)), torch.float32, CPU), lora))
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:  # zero at first, so that no gradient would reach the adapters below
                torch.nn.init.normal_(parameter, std=0.1)
        if validated:
            policy.eval()
            with torch.no_grad():
                policy(ROWS, 2)
        policy.train()
        policy(ROWS).logps.sum().backward()
        gradients.append({n: p.grad for n, p in policy.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == 3 * 7 * 2  # layers, linear maps in a layer, matrices of an adapter
    for name in gradients[0]:
        assert torch.equal(gradients[0][name], gradients[1][name]), name


@needs_bitsandbytes
def test_linear_layers_take_four_bits_and_little_more(model_folder: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    found: Any = LoRA(quantize="nf4").load_base(ModelSource(str(model_folder)), torch.bfloat16, CPU)
    assert found.lm_head.weight.dtype == found.model.norm.weight.dtype == torch.bfloat16
    weight = found.model.layers[1].mlp.up_proj.weight
    expected = whole.model.layers[1].mlp.up_proj.weight.detach()
    assert weight.numel() * weight.element_size() == expected.numel() // 2
    restored = found.dequantize(torch.float32).model.layers[1].mlp.up_proj.weight.detach()
    # Neighbouring values of NF4 (arXiv 2305.14314, appendix E) differ by at most 0.304 times the largest weight of 64.
    largest = expected.view(-1, 64).abs().amax(1, keepdim=True)
    error = (restored - expected).view(-1, 64).abs() / largest
    assert 0.05 < float(error.max()) < 0.304 / 2 + 0.02  # the scale has 8 bits


@needs_bitsandbytes
@pytest.mark.parametrize("form", ["nf4", "int8"])
@pytest.mark.slow
def test_from_training_to_an_ordinary_model(
    model_folder: Path, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_jsonl(tmp_path / "pairs.jsonl", example_rows(12))
    options = [f"--model.lora.quantize={form}", "--model.optimizer=AdamW", "--model.optimizer.lr=1e-2"]
    out = tmp_path / "out"
    run(fit(model_folder, data, out, *options, "--trainer.max_steps=2"))
    cli = run(fit(model_folder, data, out, *options, "--ckpt_path=last"))
    summary = json.loads((out / "report" / "summary.json").read_text())
    # The reference is the quantised model itself.
    assert summary["before"]["val/rewards/margins/en"] == 0
    assert summary["before"]["val/loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert summary["after"]["val/rewards/margins/en"] != 0
    checkpoint = out / "checkpoints" / "last.ckpt"
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all("lora" in key or key.startswith("representation") for key in saved)

    # A model that did not exist before training: the dequantised weights with the adapters merged into them.
    assert main(["export", "--ckpt_path", str(checkpoint), "--out", str(tmp_path / "hf")]) == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")
    assert {parameter.dtype for parameter in exported.parameters()} == {torch.float32}
    ids = torch.tensor([list(b"How do I")])
    trained = cli.model.policy.model.eval()
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = [model(ids).logits.float() for model in (exported, trained, base)]
    difference, learned = (float((logits[i] - logits[1]).norm() / logits[1].norm()) for i in (0, 2))
    # bfloat16 products of sums instead of sums of products as in training; int8 also rounds the inputs of a layer.
    assert difference < 0.02 < learned

    # Only the adapters, for the model as it was trained: the same sums of the same products.
    capsys.readouterr()
    assert main(["export", "--ckpt_path", str(checkpoint), "--out", str(tmp_path / "peft"), "--adapters"]) == 0
    assert "AutoPeftModelForCausalLM" in capsys.readouterr().out
    assert not (tmp_path / "peft" / "model.safetensors").exists()
    from peft import PeftModel

    lora = LoRA(quantize=form)  # type: ignore[arg-type]
    fresh = lora.load_base(ModelSource(str(model_folder)), torch.bfloat16, CPU)
    loaded: Any = PeftModel.from_pretrained(fresh, str(tmp_path / "peft")).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loaded(ids).logits.float(), logits[1])


@needs_bitsandbytes
@pytest.mark.slow
def test_adapters_on_a_model_that_is_stored_quantised(model_folder: Path, tmp_path: Path) -> None:
    stored = tmp_path / "stored"
    quantized: Any = LoRA(quantize="nf4").load_base(ModelSource(str(model_folder)), torch.bfloat16, CPU)
    quantized.save_pretrained(stored)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (stored / name).write_bytes((model_folder / name).read_bytes())
    data = write_jsonl(tmp_path / "pairs.jsonl", example_rows(12))
    run(fit(stored, data, tmp_path / "out"))
    assert all(map(math.isfinite, columns(tmp_path / "out")["train/loss"]))
    checkpoint = tmp_path / "out" / "checkpoints" / "last.ckpt"
    assert main(["export", "--ckpt_path", str(checkpoint), "--out", str(tmp_path / "hf")]) == 0
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())


@pytest.mark.slow
def test_adapters_are_exported_alone_without_quantisation_too(
    tiny_model: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from peft import PeftModel

    cli = run(fit(tiny_model, pairs_file, tmp_path / "out", "--model.optimizer=AdamW", "--model.optimizer.lr=1e-2"))
    checkpoint = tmp_path / "out" / "checkpoints" / "last.ckpt"
    assert main(["export", "--ckpt_path", str(checkpoint), "--out", str(tmp_path / "peft"), "--adapters"]) == 0
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16)
    loaded: Any = PeftModel.from_pretrained(base, str(tmp_path / "peft")).eval()
    ids = torch.tensor([list(b"How do I")])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loaded(ids).logits, cli.model.policy.model.eval()(ids).logits)
    # The checkpoint of a full model has none.
    run([item for item in fit(tiny_model, pairs_file, tmp_path / "whole") if "lora" not in item])
    checkpoint = tmp_path / "whole" / "checkpoints" / "last.ckpt"
    assert main(["export", "--ckpt_path", str(checkpoint), "--out", str(tmp_path / "none"), "--adapters"]) == 2
    assert "--adapters: the checkpoint has no adapters" in capsys.readouterr().err


def test_what_is_refused_before_the_model_is_loaded(
    tiny_model: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    stored = tmp_path / "stored"
    stored.mkdir()
    for file in tiny_model.iterdir():
        if file.name != "model.safetensors":
            (stored / file.name).write_bytes(file.read_bytes())
    config = json.loads((stored / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (stored / "config.json").write_text(json.dumps(config))
    nf4, whole = "--model.lora.quantize=nf4", "--model.lora=null"
    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: True)
    cases = [
        (tiny_model, [nf4, "--trainer.precision=64-true"], "model.lora.quantize: bitsandbytes has no float64"),
        (stored, [nf4], "is stored quantised; remove model.lora.quantize"),
        (stored, [whole], "is stored quantised, and such weights cannot be trained; set model.lora"),
        (
            tiny_model,
            ["--model.compile=true", "--model.lora.quantize=int8"],
            "model.compile: int8 products cannot be compiled",
        ),
    ]
    for model, more, message in cases:
        assert main(fit(model, pairs_file, tmp_path / "out", *more)) == 2, message
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
        assert not (tmp_path / "out" / "config.yaml").exists(), message
