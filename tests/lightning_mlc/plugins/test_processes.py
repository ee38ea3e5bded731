"""Two processes with ``add_mlc`` train what one process does, in DDP and FSDP2."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import save_model
from trainer_runs import Run, Trained, run, run_on_two

pytest.importorskip("trl")

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("processes")]

SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", "learning_rate": 1e-3}
TWICE = {"gradient_accumulation_steps": 2}

DDP_RUNS = [
    Run("ddp"),
    Run("ddp_used", options={"ddp_find_unused_parameters": False}),
    Run("ddp_unused", options={"ddp_find_unused_parameters": True}),
    Run("ddp_accumulated", batch=2, options=TWICE),
    Run("ddp_accumulated_unused", batch=2, options={**TWICE, "ddp_find_unused_parameters": True}),
    Run("ddp_checkpointing", options={"gradient_checkpointing": True}),
    Run("ddp_linear_clipped", mlc={"extractor": "linear"}, options={"max_grad_norm": 1.0}),
    Run("ddp_linear_accumulated", batch=2, mlc={"extractor": "linear"}, options={**TWICE, "max_grad_norm": 1.0}),
    Run("ddp_linear_one_prompt", mlc={"extractor": "linear", "prompts_per_step": 1}),
    Run("ddp_linear_every_second_step", mlc={"extractor": "linear", "prompts_per_step": 1, "every_n_steps": 2}),
    Run("ddp_centred", mlc={"center": True}),
    Run("ddp_centred_accumulated", batch=2, mlc={"center": True}, options=TWICE),
    Run("ddp_one_prompt", mlc={"prompts_per_step": 1}),
    Run("ddp_three_prompts", mlc={"prompts_per_step": 3}),
    Run("ddp_every_second_step", mlc={"every_n_steps": 2}),
    # The second step of the epoch has one micro-batch instead of two.
    Run("ddp_incomplete", options=TWICE),
    Run("ddp_reward", trainer="Reward"),
    Run("ddp_reward_used", trainer="Reward", options={"ddp_find_unused_parameters": False}),
    Run("ddp_reward_unused", trainer="Reward", options={"ddp_find_unused_parameters": True}),
    Run("ddp_reward_uneven", trainer="Reward", uneven=True, mlc={"prompts_per_step": 2, "seed": 1}),
    Run("plain_tokens", trainer="plain", options={"average_tokens_across_devices": True}),
    Run("plain_tokens_accumulated", trainer="plain", batch=2, options={**TWICE, "average_tokens_across_devices": True}),
]
FSDP_RUNS = [
    Run("fsdp", sharded=True),
    Run("fsdp_accumulated", batch=2, options=TWICE, sharded=True),
    Run("fsdp_incomplete", options=TWICE, sharded=True),
    Run("fsdp_one_prompt", sharded=True, mlc={"prompts_per_step": 1}),
    Run("fsdp_centred", sharded=True, mlc={"center": True}),
    # After the first step, one process has a prompt of even and the other one of uneven lengths.
    Run("fsdp_uneven", sharded=True, uneven=True, mlc={"prompts_per_step": 2, "seed": 1}),
    Run("fsdp_plain", trainer="plain", options={"average_tokens_across_devices": True}, sharded=True),
]
UNINTERRUPTED = [
    Run("ddp_saving", options=SAVING),
    Run("ddp_saving_linear", options=SAVING, mlc={"extractor": "linear", "center": True}),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), pad_token_id=260)


@pytest.fixture(scope="module")
def on_two(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """All runs on two processes, those that resume among them."""
    scratch = tmp_path_factory.mktemp("two")
    resumed = []
    for case in UNINTERRUPTED:
        with pytest.raises(AssertionError, match="SIGKILL"):
            run_on_two([replace(case, killed_after=3)], model, scratch / "killed")
        checkpoint = scratch / "killed" / case.name / "out" / "checkpoint-2"
        resumed.append(replace(case, name=f"{case.name}_resumed", resumed_from=str(checkpoint)))
    return run_on_two([*DDP_RUNS, *UNINTERRUPTED, *resumed, *FSDP_RUNS], model, scratch)


def on_one(case: Run, model: Path, scratch: Path) -> Trained:
    """The same rows and prompts in one process, a step at once."""
    options = {**case.options, "gradient_accumulation_steps": 1}
    batch = case.batch * case.options.get("gradient_accumulation_steps", 1)
    return run(replace(case, sharded=False, batch=batch, options=options), model, scratch)


@pytest.mark.parametrize("case", DDP_RUNS, ids=lambda case: case.name)
def test_ddp_is_one_process(case: Run, on_two: dict[str, Trained], model: Path, tmp_path: Path) -> None:
    two, one = on_two[case.name], on_one(case, model, tmp_path)
    torch.testing.assert_close(two.weights, one.weights, rtol=0, atol=1e-6)
    assert two.mlc.keys() == one.mlc.keys()
    for name, tensor in one.mlc.items():
        torch.testing.assert_close(two.mlc[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", FSDP_RUNS, ids=lambda case: case.name)
def test_fsdp_is_one_process(case: Run, on_two: dict[str, Trained], model: Path, tmp_path: Path) -> None:
    two, one = on_two[case.name], on_one(case, model, tmp_path)
    assert two.sharded
    assert (two.weights - one.weights).norm() < 1e-5 * one.weights.norm()
    torch.testing.assert_close(two.mlc, one.mlc, rtol=0, atol=1e-6)


@pytest.mark.parametrize("case", [*DDP_RUNS[:1], *FSDP_RUNS[:1]], ids=lambda case: case.name)
def test_logs_are_those_of_one_process(case: Run, on_two: dict[str, Trained], model: Path, tmp_path: Path) -> None:
    two, one = on_two[case.name].logs, on_one(case, model, tmp_path).logs
    names = ["loss", *(name for name in one[0] if name.startswith("mlc/"))]
    assert len(names) > 4
    for logged, expected in zip(two, one, strict=True):
        assert [logged[name] for name in names] == pytest.approx([expected[name] for name in names], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("case", UNINTERRUPTED, ids=lambda case: case.name)
def test_a_run_that_was_killed_resumes_bitwise(case: Run, on_two: dict[str, Trained]) -> None:
    whole, resumed = on_two[case.name], on_two[f"{case.name}_resumed"]
    assert torch.equal(resumed.weights, whole.weights)
    assert {name: tensor.tolist() for name, tensor in resumed.mlc.items()} == {
        name: tensor.tolist() for name, tensor in whole.mlc.items()
    }


def test_the_loss_and_clipping_matter(model: Path, tmp_path: Path) -> None:
    """So that the comparisons above would show a gradient that one of the processes lost."""
    with_loss, without = run(Run("with"), model, tmp_path), run(Run("without", mlc={"weight": 0.0}), model, tmp_path)
    assert (with_loss.weights - without.weights).abs().max() > 1e-2
    clipped, free = (
        run(Run(f"limit{limit}", mlc={"extractor": "linear"}, options={"max_grad_norm": limit}), model, tmp_path)
        for limit in (1.0, 0.0)
    )
    assert (clipped.weights - free.weights).abs().max() > 1e-2
