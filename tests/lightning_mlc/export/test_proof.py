"""If an export differs from the trained model, this is detected, and the difference is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from lightning_mlc.errors import UserError
from lightning_mlc.export.generation_config import make_writable
from lightning_mlc.export.proof import prove
from lightning_mlc.models.merging import require_merged, shared_weight, trial_logits


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_what_was_written_is_what_is_there(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    model = loaded(folder)
    prove(model, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nextafter(weights["model.norm.weight"][3], torch.tensor(9.0))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"not the model that was trained: model\.norm\.weight is not the same"):
        prove(model, folder)


def test_a_configuration_that_computes_something_else_is_found(tmp_path: Path) -> None:
    """The weights are equal nevertheless."""
    folder = save_model(tmp_path / "model")
    model = loaded(folder)
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1.0'))
    with pytest.raises(UserError, match=r"all weights are the same, but logits differ by \d+%"):
        prove(model, folder)


@pytest.mark.parametrize(("target", "refused"), [("q_proj", False), ("lm_head", True)])
def test_adapters_on_a_weight_that_is_used_twice_cannot_be_merged(tmp_path: Path, target: str, refused: bool) -> None:
    base = loaded(save_model(tmp_path / "model"))  # the head is its embedding
    # Not with `add_lora`, which refuses such a target at the start of training.
    adapted: Any = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=[target]))
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    trained, shared = trial_logits(adapted), shared_weight(adapted)
    merged = adapted.merge_and_unload()
    if not refused:
        require_merged(merged, trained, shared)
        return
    with pytest.raises(UserError, match=r"embed_tokens\.weight is also lm_head\.weight") as found:
        require_merged(merged, trained, shared)
    assert len(str(found.value)) <= 300


def test_settings_without_effect_are_left_out_of_a_generation_configuration(tmp_path: Path) -> None:
    generation = GenerationConfig.from_dict({"do_sample": False, "temperature": 0.7, "top_p": 0.9, "eos_token_id": 3})
    with pytest.raises(ValueError, match="temperature"):
        generation.save_pretrained(tmp_path)
    make_writable(generation)
    generation.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == 3
    sampled = GenerationConfig(do_sample=True, temperature=0.7)
    make_writable(sampled)
    assert sampled.temperature == 0.7
