"""The divergence between distributions: by hand, against plain Python in float64, and its gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_mlc.consistency.divergence import divergences


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_python(teacher: list[float], student: list[float]) -> float:
    """In floats of Python, which have 64 bits, with sums that are rounded once."""

    def logs(logits: list[float]) -> list[float]:
        largest = max(logits)
        total = math.log(math.fsum(math.exp(x - largest) for x in logits))
        return [x - largest - total for x in logits]

    p, q = logs(teacher), logs(student)
    return math.fsum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True) if a > -math.inf)


def test_by_hand() -> None:
    """Probabilities 1/2, 1/4, 1/4 and 1/8, 1/8, 3/4: log 4 / 2 + log 2 / 4 - log 3 / 4. The reverse differs."""
    teacher = torch.tensor([[0.5, 0.25, 0.25]]).log() + 7  # a constant changes nothing
    student = torch.tensor([[0.125, 0.125, 0.75], [0.5, 0.25, 0.25]]).log()
    found = divergences(teacher, torch.tensor([0, 0]), student)
    assert found.tolist() == pytest.approx([1.25 * math.log(2) - math.log(3) / 4, 0.0], abs=1e-6)
    same = random(2, 50).float()
    assert divergences(same, torch.tensor([0, 1]), same).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("vocabulary", [1, 2, 259, 1000])
@pytest.mark.parametrize("chunk_elements", [1, 2000, 2**26])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, 1e-13),
        (torch.float32, 2e-6),  # float32 has 24 bits, and the divergences here are about 1
        # Logits of 8 bits are exact as they are given: the test rounds them first.
        (torch.bfloat16, 2e-6),
        (torch.float16, 2e-6),
    ],
)
def test_in_any_precision_and_shape(vocabulary: int, chunk_elements: int, dtype: Any, tolerance: float) -> None:
    teacher, student = random(3, vocabulary).to(dtype), random(7, vocabulary, seed=1).to(dtype)
    index = torch.tensor([2, 0, 0, 1, 2, 2, 1])
    found = divergences(teacher, index, student, chunk_elements)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = [by_python(teacher[i].tolist(), student[j].tolist()) for j, i in enumerate(index.tolist())]
    assert found.tolist() == pytest.approx(expected, abs=tolerance)
    assert divergences(teacher, index[:0], student[:0], chunk_elements).tolist() == []


@pytest.mark.parametrize("chunk_elements", [11, 2**26])
def test_gradient(chunk_elements: int) -> None:
    """Against finite differences in float64; the teacher gets none."""
    teacher, student = random(2, 5).requires_grad_(), random(4, 5, seed=1).requires_grad_()
    index = torch.tensor([1, 0, 1, 1])
    of_student = lambda logits: divergences(teacher.detach(), index, logits, chunk_elements)  # noqa: E731
    assert torch.autograd.gradcheck(of_student, (student,))
    weights = torch.tensor([1.0, 2.0, 0.0, -3.0], dtype=torch.float64)
    (divergences(teacher, index, student, chunk_elements) * weights).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert bool((student.grad[2] == 0).all())
    wanted = torch.nn.functional.kl_div(student.log_softmax(1), teacher.detach().softmax(1)[index], reduction="none")
    (expected,) = torch.autograd.grad((wanted.sum(1) * weights).sum(), student)
    torch.testing.assert_close(student.grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradient_in_half_precision_is_that_of_float32_rounded_once(dtype: Any) -> None:
    teacher, student = random(4, 40).to(dtype), random(4, 40, seed=1).to(dtype)
    index = torch.arange(4)
    found, expected = (
        torch.autograd.grad(divergences(teacher, index, logits).sum(), logits)[0]
        for logits in (student.clone().requires_grad_(), student.double().requires_grad_())
    )
    assert found.dtype == dtype
    # A unit in the last place of half precision, or of float32 near 0.
    torch.testing.assert_close(found.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def test_extreme_logits() -> None:
    """Finite wherever the divergence is, and its gradient always."""
    nowhere = -math.inf
    teacher = torch.tensor([[1e4, -1e4, 0.0], [0.0, nowhere, 0.0], [3e38, 0.0, -3e38], [0.0, nowhere, 0.0]])
    student = torch.tensor([[1e4, 1e4, 0.0], [0.0, nowhere, 0.0], [0.0, 0.0, 0.0], [0.0, 5.0, nowhere]])
    # A probability of exp(-200) is 0 in float32, and the student rules that token out.
    teacher = torch.cat([teacher, torch.tensor([[0.0, -200.0, nowhere]])])
    student = torch.cat([student, torch.tensor([[0.0, nowhere, 0.0]])]).requires_grad_()
    found = divergences(teacher, torch.arange(5), student)
    assert found.tolist() == pytest.approx([math.log(2), 0.0, math.log(3), math.inf, math.log(2)])
    (gradient,) = torch.autograd.grad(found.sum(), student)
    assert gradient[0].tolist() == pytest.approx([-0.5, 0.5, 0.0])
    assert gradient[1].tolist() == [0.0, 0.0, 0.0]
    assert gradient[2].tolist() == pytest.approx([-2 / 3, 1 / 3, 1 / 3])
    assert bool(gradient.isfinite().all())


def test_only_the_logits_are_kept() -> None:
    teacher, student = random(2, 100), random(6, 100, seed=1).requires_grad_()
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        divergences(teacher, torch.zeros(6, dtype=torch.int64), student)
    assert {teacher.data_ptr(), student.data_ptr()} < set(kept)
    assert len(kept) == 3  # and the index
