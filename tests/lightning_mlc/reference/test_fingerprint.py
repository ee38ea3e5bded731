"""Which models count as the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from conftest import save_model
from transformers import AutoModelForCausalLM

from lightning_mlc.reference.fingerprint import describe_model, hash_of_weights

WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7, dtype=torch.bfloat16), "c": torch.zeros(0)}


def test_every_change_of_a_weight_is_seen() -> None:
    known = hash_of_weights(WEIGHTS)
    assert hash_of_weights({name: WEIGHTS[name].clone() for name in ("c", "b", "a")}) == known
    flipped = WEIGHTS["a"].clone()
    flipped[1, 2] = flipped[1, 2].nextafter(torch.tensor(9.0))
    changes = [
        {"a": flipped},
        {"a": WEIGHTS["a"].view(3, 2)},
        {"a": WEIGHTS["a"].double()},
        {"b": torch.tensor(7, dtype=torch.float16)},
        {"d": torch.zeros(1)},
        {"a": WEIGHTS["a"].t().contiguous().t() + 1},
    ]
    found = {known, *(hash_of_weights(WEIGHTS | change) for change in changes)}
    assert len(found) == len(changes) + 1
    assert hash_of_weights({"b": WEIGHTS["b"], "a": WEIGHTS["c"], "c": WEIGHTS["a"]}) != known


def test_memory_layout_does_not_matter() -> None:
    strided = WEIGHTS["a"].t().contiguous().t()
    assert not strided.is_contiguous()
    assert hash_of_weights({"a": strided}) == hash_of_weights({"a": WEIGHTS["a"]})


def test_the_hash_is_sha256_of_the_bytes() -> None:
    """Written by hand, so that its meaning cannot change unnoticed."""
    inner = hashlib.sha256(b"torch.float32 (2, 3)" + WEIGHTS["a"].numpy().tobytes()).hexdigest()
    assert hash_of_weights({"a": WEIGHTS["a"]}) == hashlib.sha256(f'[["a", "{inner}"]]'.encode()).hexdigest()


@pytest.mark.parametrize(
    "change", [{"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, {"rms_norm_eps": 1e-3}]
)
def test_the_same_weights_in_another_configuration_are_another_model(
    tiny_model: Path, tmp_path: Path, change: dict[str, object]
) -> None:
    known, moved, other = (
        describe_model(AutoModelForCausalLM.from_pretrained(folder), "32-true")
        for folder in (tiny_model, save_model(tmp_path / "moved"), save_model(tmp_path / "other", **change))
    )
    assert moved == known  # in any location
    assert {name for name in known if other[name] != known[name]} == {"configuration"}
