"""Memory estimates: they match counts by hand, and nothing is loaded."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import save_model
from families.architectures import FAMILIES
from families.trial import make_model
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from transformers import AutoModelForCausalLM

from lightning_mlc.cli import main
from lightning_mlc.consistency import MLC, Consistency, SelfDistillation
from lightning_mlc.data.batches import Batch
from lightning_mlc.data.datamodule import MultilingualData
from lightning_mlc.data.row_plan import RowPlan
from lightning_mlc.errors import UserError
from lightning_mlc.models.lora import LoRA
from lightning_mlc.objectives import DPO, SFT
from lightning_mlc.reference import ReferenceSettings
from lightning_mlc.training.live_bytes import counting
from lightning_mlc.training.memory import (
    Estimate,
    Setup,
    Way,
    estimate,
    estimate_largest,
    largest_batch,
    optimizer_bytes,
    ways,
)
from lightning_mlc.training.module import AlignmentModule


def test_tensors_count_while_they_live() -> None:
    x = torch.ones(1000)
    with counting() as count:
        y = x.exp()  # 4000 bytes
        z = y.view(10, 100)  # no memory of its own
        w = z.half()  # 2000
        assert count.live == 6000
        del y, z
        assert count.live == 2000
        x.add_(1)
        assert count.live == 2000
        w = w.float()  # 4000, and 2000 fewer afterwards
    assert (count.live, count.peak) == (4000, 6000)


def test_a_backward_pass_counts_what_it_keeps_and_makes() -> None:
    weight = nn.Parameter(torch.ones(100, 100))
    with counting() as count:
        hidden = torch.ones(10, 100) @ weight  # 4000 for the ones, which are kept, and 4000
        loss = hidden.sum()  # 4
        del hidden
        assert count.live == 4004
        loss.backward()
    assert weight.grad is not None
    # The ones, the loss and the gradient of the loss. The gradient of the product is a view of the latter.
    assert count.peak >= 4000 + 4 + 4 + 40_000
    assert count.peak <= 4000 + 4 + 4 + 40_000 + 4000


@pytest.mark.parametrize(
    ("optimizer", "size"),
    [
        (torch.optim.AdamW, 8),
        (torch.optim.Adagrad, 4),
        (lambda parameters: torch.optim.SGD(parameters, lr=0.1), 0),
        (lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9), 4),
    ],
)
def test_state_of_an_optimizer(optimizer: type[torch.optim.Optimizer], size: int) -> None:
    assert optimizer_bytes(optimizer) == size


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A model folder without weights, and the model's number of parameters."""
    folder = save_model(tmp_path_factory.mktemp("bare") / "model", "qwen2")
    count = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
    for file in folder.glob("*.safetensors"):
        file.unlink()
    return folder, count


@pytest.fixture(scope="module")
def batch(bare: tuple[Path, int], tmp_path_factory: pytest.TempPathFactory) -> Batch:
    cache = str(tmp_path_factory.mktemp("cache"))
    data = MultilingualData("sample", batch_size=2, name_or_path=str(bare[0]), cache_dir=cache)
    data.prepare_data()
    data.setup("fit")
    return largest_batch(data)


def estimated(bare: tuple[Path, int], batch: Batch, setup: Setup, **options: Any) -> Estimate:
    options = {"optimizer": torch.optim.AdamW, "consistency": Consistency(extractor="none"), **options}
    return estimate(AlignmentModule(str(bare[0]), options.pop("objective", DPO()), **options), batch, setup)


ONE = Setup("32-true", processes=1, accumulate=1, strategy="single")


@pytest.mark.slow
def test_what_is_kept_is_counted(bare: tuple[Path, int], batch: Batch) -> None:
    size = 4 * bare[1]
    one = dict(estimated(bare, batch, ONE).parts)
    assert one.pop("activations") > 0
    assert one == {"weights": size, "gradients": size, "optimizer state": 2 * size, "reference": size}
    two = estimated(bare, batch, replace(ONE, processes=2, strategy="ddp")).parts
    assert two["weights"] == two["buckets of gradients"] == size
    kept = estimated(bare, batch, replace(ONE, precision="bf16-true")).parts
    assert kept["weights"] == kept["gradients"] == size // 2
    sft = estimated(bare, batch, ONE, objective=SFT()).parts
    assert "reference" not in sft
    scores = estimated(bare, batch, ONE, reference=ReferenceSettings(mode="precomputed")).parts
    assert "reference" not in scores


@pytest.mark.slow
def test_shards_are_counted(bare: tuple[Path, int], batch: Batch) -> None:
    size = 4 * bare[1]
    setup = replace(ONE, processes=4, strategy="fsdp2")
    sharded = estimated(bare, batch, setup).parts
    assert (sharded["weights"], sharded["optimizer state"]) == (size // 4, size // 2)
    kept = estimated(bare, batch, replace(setup, reshard_after_forward=False)).parts
    assert kept["gathered weights"] > sharded["gathered weights"]
    offloaded = estimated(bare, batch, replace(setup, cpu_offload=True)).parts
    assert set(offloaded) == {"activations", "gathered weights"}


def test_adapters_alone_have_gradients(bare: tuple[Path, int], batch: Batch) -> None:
    pytest.importorskip("peft")
    found = estimated(bare, batch, ONE, lora=LoRA(r=4, target_modules=["q_proj"]))
    # 3 layers, from 32 features to 4 and from 4 to 32.
    assert found.trained == 3 * (32 * 4 + 4 * 32)
    assert found.parameters == bare[1] + found.trained
    assert found.parts["optimizer state"] == 2 * found.parts["gradients"] == 2 * 4 * found.trained
    assert "reference" not in found.parts


@pytest.mark.slow
def test_activations_grow_and_shrink_as_they_do(bare: tuple[Path, int], batch: Batch) -> None:
    def activations(**options: Any) -> int:
        return estimated(bare, batch, ONE, **options).parts["activations"]

    whole = activations()
    assert activations(gradient_checkpointing=True) < 0.7 * whole
    assert activations(consistency=Consistency(mlc=MLC(weight=0))) < 0.8 * whole
    # A state after the first of three layers: the translations' share of the other two layers is saved.
    assert activations(consistency=Consistency(layer=1, extractor="none")) < 0.9 * whole


def test_logits_at_the_compared_positions_are_counted(tmp_path: Path) -> None:
    """Of a vocabulary so large that nothing else counts: those kept, and their gradient."""
    vocabulary = 200_000
    folder = save_model(tmp_path / "wide", "qwen2", vocab_size=vocabulary)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    data = MultilingualData("sample", batch_size=2, name_or_path=str(folder), cache_dir=str(tmp_path / "cache"))
    data.prepare_data()
    data.setup("fit")

    def activations(positions: int) -> int:
        consistency = Consistency(mlc=MLC(weight=0), self_distillation=SelfDistillation(weight=1, positions=positions))
        module = AlignmentModule(str(folder), None, consistency, optimizer=torch.optim.AdamW)
        data.plan_rows(module.losses.row_plan)
        # With several processes, gradients of weights have an entry of their own.
        return estimate(module, largest_batch(data), replace(ONE, accumulate=2)).parts["activations"]

    data.plan_rows(RowPlan(positions=1))
    batch = largest_batch(data)
    prompts = sum(rows.num_first(1) for rows in (*batch.responses, *batch.prompts))
    added = activations(9) - activations(1)
    assert 2 * 8 * prompts * 4 * vocabulary <= added <= 6 * 8 * prompts * 4 * vocabulary


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("Mixtral", "packed rows"),
        ("BLOOM", "padded rows"),
        pytest.param("GPT-Neo", "padded rows", marks=pytest.mark.slow),
        pytest.param("Mamba 2", "padded rows", marks=pytest.mark.slow),
        pytest.param("Falcon-H1", "padded rows", marks=pytest.mark.slow),
    ],
)
def test_what_trains_has_an_estimate(name: str, how: str, tmp_path: Path) -> None:
    """A mixture of experts, models that accept no mask of packed rows, and models that check for padding."""
    found, module, batch, way, folder = estimated_family(name, tmp_path)
    assert str(way) == how
    assert found == estimate(module, batch, ONE, way.shortcuts)
    count = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(folder).parameters())
    assert (found.parameters, found.parts["gradients"]) == (count, 4 * count)
    assert found.parts["activations"] > 0


def test_a_mask_without_values_has_padding_and_a_number_without_value_is_none() -> None:
    """In the way in which recurrent models check, which drop the mask if all of it is 1."""
    with FakeTensorMode(), counting():
        mask = torch.ones(2, 3)
        assert not torch.all(mask == 1)
        with pytest.raises(DataDependentOutputException):
            int(mask.sum())


def test_what_decides_by_values_is_refused_in_a_line_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="JetMoeForCausalLM computes different things") as told:
        estimated_family("JetMoE", tmp_path)
    assert "`fit` with --trainer.max_steps 1" in str(told.value)
    assert len(str(told.value)) < 300


def estimated_family(name: str, tmp_path: Path) -> tuple[Estimate, AlignmentModule, Batch, Way, Path]:
    family = next(family for family in FAMILIES if family.name == name)
    folder = make_model(family, tmp_path / "model")
    data = MultilingualData("sample", batch_size=1, name_or_path=str(folder), cache_dir=str(tmp_path / "cache"))
    data.prepare_data()
    data.setup("fit")
    module = AlignmentModule(str(folder), DPO(), Consistency(extractor="none"), optimizer=torch.optim.AdamW)
    found, batch, way = estimate_largest(module, data, ONE)
    return found, module, batch, way, folder


def test_products_of_all_experts_have_the_size_that_they_have() -> None:
    offsets = torch.tensor([2, 5], dtype=torch.int32)
    wide, deep = torch.ones(5, 16), torch.ones(2, 16, 32)
    for a, b in ((wide, deep), (wide.T, torch.ones(5, 32))):
        expected = torch._grouped_mm(a, b, offs=offsets)
        with counting() as count:
            found = torch._grouped_mm(a, b, offs=offsets)
        assert (found.shape, found.dtype, count.live) == (expected.shape, expected.dtype, 4 * expected.numel())


def test_packing_that_is_asked_for_is_not_given_up(bare: tuple[Path, int]) -> None:
    def found(packing: bool | None) -> list[str]:
        return [str(way) for way in ways(AlignmentModule(str(bare[0]), DPO(), packing=packing))]

    assert found(None) == ["packed rows", "padded rows", "padded rows, the plain way"]
    assert found(True) == ["packed rows"]
    assert found(False) == ["padded rows", "padded rows, the plain way"]


def test_the_command_reads_no_weights(bare: tuple[Path, int], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--config=dpo_mlc", "--config=strategy/fsdp2", f"--model.name_or_path={bare[0]}"]
    assert main(["estimate", *words, "--trainer.devices=4"]) == 0
    shown = capsys.readouterr().out
    assert "4 processes, fsdp2, bf16-mixed" in shown
    assert re.search(r"^while gradients are computed +\d+\.\d\d$", shown, flags=re.M)
    assert "fits, with 10% kept free: 24 GB, 40 GB, 80 GB, 141 GB" in shown
    assert main(["estimate", "--config=dpo_mlc", "--model.name_or_path=/nowhere"]) == 2
    assert main(["estimate", *words, "--trainer.strategy=deepspeed"]) == 2
