"""The tensors that gradient checkpointing keeps are kept in CPU memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoModelForCausalLM

from lightning_mlc.data.rows import CHOSEN, REJECTED, TokenRows, TokenSequence
from lightning_mlc.models.loading import enable_checkpointing
from lightning_mlc.models.policy import Policy

ROWS = TokenRows.pad(
    [TokenSequence((1, 2, 3), (4, 5), 0, 0, CHOSEN), TokenSequence((1, 2, 3), (6,), 0, 0, REJECTED)], pad_id=0
)


def gradients(model: Any, offload: bool, rows: TokenRows = ROWS) -> list[torch.Tensor]:
    """Gradients of all parameters, computed with `model.activation_offload`."""
    enable_checkpointing(model, offload)
    policy = Policy(model).train()
    policy.zero_grad()
    out = policy(rows.to(model.device), 2)
    assert out.states is not None
    (out.logps.sum() + out.states.square().sum()).backward()
    return [parameter.grad.clone() for parameter in policy.parameters() if parameter.grad is not None]


def test_the_input_of_each_layer_is_offloaded_and_nothing_else(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU there is no pinned memory to offload to, so other CPU memory takes its place."""
    offloaded: list[tuple[int, ...]] = []

    class SaveElsewhere(saved_tensors_hooks):
        def __init__(self, pin_memory: bool, device_type: str) -> None:
            assert pin_memory

            def pack(tensor: torch.Tensor) -> torch.Tensor:
                if tensor.numel():  # transformers 5.17 saves empty tensors too
                    offloaded.append(tuple(tensor.shape))
                return tensor.clone()

            super().__init__(pack, lambda tensor: tensor)

    monkeypatch.setattr("transformers.modeling_utils.save_on_cpu", SaveElsewhere)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    kept = gradients(model, offload=False)
    assert offloaded == []
    moved = gradients(model, offload=True)
    assert offloaded == [(2, 5, 32)] * 3  # rows, tokens and width of the model, for each of its layers
    assert all(torch.equal(*pair) for pair in zip(kept, moved, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_takes_less_memory_there_for_the_same_gradients(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).cuda()
    long = TokenRows.pad([TokenSequence(tuple(range(200)) * 20, (4, 5), 0, 0, CHOSEN)], pad_id=0)
    results, peaks = [], []
    for offload in (False, True):
        torch.cuda.reset_peak_memory_stats()
        results.append(gradients(model, offload, long))
        peaks.append(torch.cuda.max_memory_allocated())
    for kept, moved in zip(*results, strict=True):
        torch.testing.assert_close(moved, kept)  # sums on a GPU have no fixed order
    assert peaks[1] < peaks[0]
