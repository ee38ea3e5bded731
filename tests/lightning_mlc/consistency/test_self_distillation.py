"""The source language teaches its translations: values by hand, gradients, which positions count, and whole runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import columns, example_rows, labelled_rows, save_model, write_jsonl
from first_positions import next_tokens, observed
from torch import Tensor

from lightning_mlc.cli import main
from lightning_mlc.commands.training import run
from lightning_mlc.consistency import SelfDistillation


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PRESENT = torch.tensor([[True, True, True], [True, False, True], [True, False, False]])
LENGTHS = torch.tensor([3, 2, 4])


def by_loops(logits: Tensor, present: Tensor, lengths: Tensor, source: int, positions: int) -> Tensor:
    """(B,): the definition, with the teacher detached."""
    losses = []
    for prompt, there, length in zip(logits, present, lengths, strict=True):
        parts = []
        for language in range(len(there)):
            for place in range(min(int(length), positions)):
                if language != source and there[language]:
                    wanted, found = prompt[source, place].detach().softmax(0), prompt[language, place].softmax(0)
                    parts.append((wanted * (wanted / found).log()).sum())
        losses.append(torch.stack(parts).mean() if parts else prompt.sum() * 0)
    return torch.stack(losses)


def test_by_hand() -> None:
    """Two positions: probabilities 1/2 and 1/2 taught to 1/4 and 3/4, and 3/4 and 1/4 taught to themselves."""
    source, translation = [[0.5, 0.5], [0.75, 0.25]], [[0.25, 0.75], [0.75, 0.25]]
    logits = torch.tensor([[source, translation]]).log()
    both = torch.ones(1, 2, dtype=torch.bool)
    first = math.log(2) / 2 + math.log(2 / 3) / 2
    for positions, expected in ((1, first), (2, first / 2), (8, first / 2)):
        seen = observed(next_tokens(logits, both), both)
        assert SelfDistillation(positions=positions).losses(seen).tolist() == pytest.approx([expected], abs=1e-6)


@pytest.mark.parametrize("positions", [1, 2, 4, 9])
@pytest.mark.parametrize("source", [0, 2])
def test_is_its_definition_and_so_is_its_gradient(positions: int, source: int) -> None:
    present = PRESENT if source == 0 else PRESENT.flip(1)
    ours, twin = (random(3, 3, 4, 6).requires_grad_() for _ in range(2))
    term = SelfDistillation(positions=positions)
    found = term.losses(observed(next_tokens(ours, present, LENGTHS), present, source=source))
    expected = by_loops(twin, present, LENGTHS, source, positions)
    torch.testing.assert_close(found, expected)
    assert found[2] == 0  # in one language alone
    weights = torch.tensor([1.0, 2.0, 4.0])
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, twin.grad)
    assert ours.grad is not None
    assert bool((ours.grad[:, source] == 0).all())
    assert bool((ours.grad[0, 1] != 0).any())


@pytest.mark.parametrize("positions", [1, 3, 9])
@pytest.mark.parametrize("source", [0, 2])
def test_a_fixed_teacher_teaches_the_source_language_too(positions: int, source: int) -> None:
    present = PRESENT if source == 0 else PRESENT.flip(1)
    ours, twin = (random(3, 3, 4, 6).requires_grad_() for _ in range(2))
    fixed = random(3, 3, 4, 6, seed=5)
    term = SelfDistillation(positions=positions, teacher="reference")
    teacher = next_tokens(fixed.requires_grad_(), present, LENGTHS, seed=7)  # other places than the policy's
    found = term.losses(observed(next_tokens(ours, present, LENGTHS), present, teacher, source))
    losses = []
    for prompt, other, there, length in zip(twin, fixed.detach(), present, LENGTHS, strict=True):
        places = range(min(int(length), positions))
        languages = there.nonzero().flatten().tolist() if there.sum() > 1 else []
        wanted = [other[source, place].softmax(0) for place in places]
        parts = [
            (wanted[place] * (wanted[place] / prompt[language, place].softmax(0)).log()).sum()
            for language in languages
            for place in places
        ]
        losses.append(torch.stack(parts).mean() if parts else prompt.sum() * 0)
    torch.testing.assert_close(found, torch.stack(losses))
    assert found[2] == 0  # in one language alone
    weights = torch.tensor([1.0, 2.0, 4.0])
    (found * weights).sum().backward()
    (torch.stack(losses) * weights).sum().backward()
    torch.testing.assert_close(ours.grad, twin.grad)
    assert fixed.grad is None
    assert ours.grad is not None
    assert bool((ours.grad[0, source] != 0).any())


def test_agreement_is_with_the_fixed_teacher() -> None:
    """The policy says 0 everywhere. The reference says 0 after the first source prompt, 1 after the second."""
    both = torch.ones(2, 2, dtype=torch.bool)
    policy, reference = torch.zeros(2, 2, 1, dtype=torch.long), torch.tensor([[[0], [1]], [[1], [0]]])
    ours, theirs = (
        next_tokens(torch.nn.functional.one_hot(tokens, 2).double(), both) for tokens in (policy, reference)
    )
    found = SelfDistillation(teacher="reference").metrics(observed(ours, both, theirs))
    assert found["agreement"].tolist() == [1.0, 0.0]


def test_finite_differences() -> None:
    """Of the translations; the source's logits are held."""
    source, others = random(3, 1, 4, 5), random(3, 2, 4, 5, seed=1).requires_grad_()

    def losses(logits: Tensor) -> Tensor:
        whole = torch.cat([source, logits], 1)
        return SelfDistillation().losses(observed(next_tokens(whole, PRESENT, LENGTHS), PRESENT))

    assert torch.autograd.gradcheck(losses, (others,))


def test_rows_and_missing_languages_leave_no_trace() -> None:
    logits = random(3, 3, 4, 6).requires_grad_()
    seen = observed(next_tokens(logits, PRESENT, LENGTHS), PRESENT, is_ordinary=torch.tensor([True, False, False]))
    for rows, alone in (("harmful", 1), ("ordinary", 0)):
        term = SelfDistillation(rows=rows)  # type: ignore[arg-type]
        losses = term.losses(seen.only(term.rows))
        assert [loss > 0 for loss in losses.tolist()] == [prompt == alone for prompt in range(3)]
        (gradient,) = torch.autograd.grad(losses.sum(), logits, retain_graph=True)
        assert (gradient != 0).flatten(1).any(1).tolist() == [prompt == alone for prompt in range(3)]


def test_agreement_is_about_the_first_token() -> None:
    """Of two translations of the first prompt, one begins as the source does; later positions do not count."""
    tokens = torch.tensor([[[1, 2], [1, 0], [0, 2]], [[2, 0], [0, 0], [2, 1]], [[1, 1], [0, 0], [0, 0]]])
    logits = torch.nn.functional.one_hot(tokens, 3).double()
    found = SelfDistillation().metrics(observed(next_tokens(logits, PRESENT), PRESENT))
    assert found["agreement"].tolist() == [0.5, 1.0, 0.0]


def test_infinite_where_only_the_translation_rules_a_token_out() -> None:
    """The run then ends with a message, as for any loss that is not finite; other prompts are not spoilt."""
    logits = random(3, 3, 4, 6)
    logits[0, 1, 2, 3] = -math.inf
    losses = SelfDistillation().losses(observed(next_tokens(logits, PRESENT), PRESENT))
    assert losses.isfinite().tolist() == [False, True, True]


# ---- whole runs -----------------------------------------------------------------------------------------

KEY = "--model.consistency"
OPTIONS = ["--trainer.accelerator=cpu", "--trainer.precision=32-true", "--trainer.enable_progress_bar=false"]
OPTIONS += ["--trainer.max_steps=3", "--trainer.log_every_n_steps=1", "--model.optimizer=AdamW"]
OPTIONS += ["--model.optimizer.lr=2e-3", f"{KEY}.mlc.weight=0", f"{KEY}.self_distillation.weight=1"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with large weights, whose distributions are far from uniform."""
    return save_model(tmp_path_factory.mktemp("models") / "sharp", initializer_range=0.3)


def fit(model: Path, folder: Path, rows: list[dict[str, Any]], *more: str) -> dict[str, list[float]]:
    data = write_jsonl(folder / "rows.jsonl", rows)
    given = [f"--model.name_or_path={model}", f"--data.train_path={data}", f"--out={folder / 'out'}"]
    run(["fit", *given, *OPTIONS, *more])
    return columns(folder / "out")


@pytest.mark.parametrize(
    "more",
    [
        ("--model.objective=null", "--model.packing=false"),
        ("--model.objective=SFT", f"{KEY}.self_distillation.positions=1", f"{KEY}.layer=1"),
        ("--model.objective=null", f"{KEY}.self_distillation.teacher=reference"),
        ("--model.objective=DPO", f"{KEY}.self_distillation.teacher=reference", f"{KEY}.self_distillation.positions=3"),
    ],
    ids=[
        "alone, padded",
        "with SFT, one position, a middle layer",
        "a fixed teacher, alone",
        "a fixed teacher, with DPO",
    ],
)
def test_a_run_brings_the_divergence_down(model: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    rows = example_rows(8)
    found = fit(model, tmp_path, rows, "--data.val_share=0.5", "--data.batch_size=4", *more)
    losses = found["train/self_distillation/loss"]
    assert len(losses) == 3
    assert losses[2] < 0.8 * losses[0]
    validated = found["val/self_distillation/loss"]
    assert validated[-1] < 0.8 * validated[0]
    assert len(found["train/self_distillation/agreement"]) == 3
    assert "train/mlc/loss" not in found


def test_steps_between_and_single_labelled_responses(model: Path, tmp_path: Path) -> None:
    """Every second step has the term. The responses are the only ones of their rows, some of them undesirable."""
    more = ("--model.objective=KTO", f"{KEY}.every_n_steps=2", "--data.val_share=0", "--data.batch_size=3")
    found = fit(model, tmp_path, labelled_rows(9), *more)
    first, second, third = found["train/self_distillation/loss"]
    assert first == second  # repeated in the log
    assert first != third
    assert found["train/loss"][1] == pytest.approx(found["train/objective/loss"][1])
    assert found["train/loss"][0] == pytest.approx(found["train/objective/loss"][0] + first)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([f"{KEY}.self_distillation.positions=0"], "self_distillation.positions: must be 1 or above, got 0"),
        ([f"{KEY}.self_distillation.weight=-1"], "self_distillation.weight: must be 0 or above, got -1"),
        (["--data.languages=[en]"], "self_distillation: needs prompts in two or more languages"),
        (
            [f"{KEY}.self_distillation.rows=ordinary"],
            "self_distillation.rows: is ordinary, but the training data has no",
        ),
        (["--model.objective=null", f"{KEY}.every_n_steps=2"], "every_n_steps: the steps between would train nothing"),
        ([f"{KEY}.self_distillation.teacher=english"], "self_distillation.teacher: "),
    ],
)
def test_what_is_refused_at_start(
    model: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    given = [f"--model.name_or_path={model}", f"--data.train_path={pairs_file}", f"--out={tmp_path / 'out'}"]
    assert main(["fit", *given, *OPTIONS, *more]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert line.startswith(f"error: model.consistency.{message}")
