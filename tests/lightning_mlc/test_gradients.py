"""The gradient of an optimizer step, whatever it is cut into."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import example_rows, write_jsonl
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_mlc.consistency import MLC
from lightning_mlc.data import MultilingualData
from lightning_mlc.module import AlignmentModule
from lightning_mlc.objectives import CPO, DPO, ORPO, SFT, Objective, SimPO, Sum


class Recorder(AlignmentModule):
    """Keeps the gradient of every optimizer step, and how many rows were run without a response."""

    gradients: list[dict[str, Tensor]]
    prompt_rows: int

    def on_fit_start(self) -> None:
        self.gradients = []
        self.prompt_rows = 0
        assert self.policy is not None
        self.policy.register_forward_hook(self._count)

    def _count(self, _module: Any, inputs: tuple[Any, ...], _output: Any) -> None:
        self.prompt_rows += len(inputs[0]) if inputs[0].longest_response == 0 else 0

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        self.gradients.append({n: p.grad.clone() for n, p in self.named_parameters() if p.grad is not None})


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


def ragged_rows() -> list[dict[str, Any]]:
    """Rows that differ in all that a wrong mean would weigh wrongly: length, languages."""
    rows = example_rows(9)
    for number, row in enumerate(rows):
        row["chosen"] += " Really." * number
        if number % 3 == 0:
            row["prompt"] = {"en": row["prompt"]["en"]}
        elif number % 3 == 1:
            row["prompt"]["zh"] = None
    return rows


def train(
    model: Path, data_file: Path, objective: Objective, mlc: MLC, cut: tuple[int, int] = (2, 2), steps: int = 2
) -> Recorder:
    torch.manual_seed(0)
    module = Recorder(str(model), objective, mlc, optimizer=sgd)
    data = MultilingualData(str(data_file), val_share=0.0, batch_size=cut[0], name_or_path=str(model))
    Trainer(
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=cut[1],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, data)
    return module


OBJECTIVES: dict[str, Objective] = {
    "sft": SFT(),
    "dpo": DPO(),
    # At a smaller beta its gradient is so large that steps at this rate multiply the rounding of those before.
    "ipo": DPO(beta=1.0, loss="ipo", rpo_alpha=0.5),
    "orpo": ORPO(),
    "simpo": SimPO(),
    "cpo": CPO(),
    "sum": Sum([SFT(), DPO(), ORPO()], [0.5, 1.0, 2.0]),
}


@pytest.mark.parametrize(
    ("objective", "center"),
    [*((objective, False) for objective in OBJECTIVES.values()), (SFT(), True), (DPO(), True)],
    ids=[*OBJECTIVES, "sft centred", "dpo centred"],
)
def test_cutting_a_batch_changes_no_gradient(
    tiny_model: Path, tmp_path: Path, objective: Objective, center: bool
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ragged_rows())
    # Three steps: the last of them, of one example in nine, is an incomplete window.
    mlc = MLC(weight=2.0, center=center)
    runs = [train(tiny_model, path, objective, mlc, cut, steps=3) for cut in ((1, 4), (2, 2), (4, 1))]
    assert len(runs[0].gradients) == 3
    for other in runs[1:]:
        for expected, found in zip(runs[0].gradients, other.gradients, strict=True):
            assert expected.keys() == found.keys()
            for name, gradient in expected.items():
                # float32 sums in another order; later steps also carry the earlier ones' rounding.
                torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_loss_is_the_objective_plus_weighted_mlc(tiny_model: Path, tmp_path: Path) -> None:
    """Gradients are linear in the terms: that of weight 2 is that of 0 plus twice the difference to 1."""
    path = write_jsonl(tmp_path / "a.jsonl", ragged_rows())
    none, one, two = (train(tiny_model, path, DPO(), MLC(weight=w), steps=1).gradients[0] for w in (0.0, 1.0, 2.0))
    name = "policy.model.model.layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(two[name] - none[name], 2 * (one[name] - none[name]), rtol=1e-3, atol=1e-6)
    assert (one[name] - none[name]).norm() > 1e-3 * none[name].norm()
    assert "consistency.extractor.weight" in one
    assert not any(key.startswith("consistency") for key in none)


def test_a_sum_s_gradient_is_the_sum_of_the_parts_own(tiny_model: Path, tmp_path: Path) -> None:
    """Over ragged rows, where a mean over examples and one over tokens differ."""
    path = write_jsonl(tmp_path / "a.jsonl", ragged_rows())
    off = MLC(weight=0.0)
    parts: list[Objective] = [DPO(), SFT()]
    name = "policy.model.model.layers.1.mlp.up_proj.weight"
    dpo, sft, both = (
        train(tiny_model, path, objective, off, steps=1).gradients[0][name]
        for objective in (*parts, Sum(parts, [1.0, 0.25]))
    )
    # float32 sums in another order.
    torch.testing.assert_close(both, dpo + 0.25 * sft, rtol=1e-3, atol=1e-6)


def test_logits_in_many_chunks_change_no_gradient(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ragged_rows())
    whole = train(tiny_model, path, DPO(), MLC(), steps=1).gradients[0]
    monkeypatch.setattr("lightning_mlc.models.policy.CHUNK_ELEMENTS", 4096)  # 15 tokens
    chunked = train(tiny_model, path, DPO(), MLC(), steps=1).gradients[0]
    for name, gradient in whole.items():
        # float32 sums in another order.
        torch.testing.assert_close(chunked[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_weight_zero_runs_no_translation(tiny_model: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ragged_rows())
    assert train(tiny_model, path, DPO(), MLC(weight=0)).prompt_rows == 0
    assert train(tiny_model, path, DPO(), MLC(weight=1)).prompt_rows > 0


def test_every_second_step(tiny_model: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", example_rows(8))
    every = train(tiny_model, path, DPO(), MLC(), cut=(1, 2), steps=4)
    second = train(tiny_model, path, DPO(), MLC(every_n_steps=2), cut=(1, 2), steps=4)
    assert every.prompt_rows == 2 * second.prompt_rows == 16
    moved = ["consistency.extractor.weight" in gradients for gradients in second.gradients]
    assert moved == [True, False, True, False]  # no gradient, so that momentum cannot move it either


@pytest.mark.parametrize("objective", [SFT(), ORPO(), SimPO(), CPO(), Sum([SFT(), ORPO()])])
def test_what_needs_no_reference_loads_none(tiny_model: Path, tmp_path: Path, objective: Objective) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", example_rows(4))
    assert train(tiny_model, path, objective, MLC(), steps=1)._reference is None


def test_reference_is_frozen_hidden_and_in_eval_mode(tiny_model: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", example_rows(4))
    module = train(tiny_model, path, DPO(), MLC())
    reference = module._reference
    assert reference is not None
    assert module.policy is not None
    assert module.policy.training
    assert not reference.policy.training
    assert not any(key.startswith(("_reference", "reference")) for key in module.state_dict())
    initial = Recorder(str(module.source), DPO())
    initial.trainer = module.trainer
    fresh = initial._load_policy().state_dict()
    for key, value in reference.policy.state_dict().items():
        assert torch.equal(value, fresh[key]), key
    assert not torch.equal(module.policy.state_dict()["model.lm_head.weight"], fresh["model.lm_head.weight"])
