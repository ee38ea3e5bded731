"""The measurement that fills ``mlc_kernels.split.SPLITS``, on a GPU that is emulated, with a clock that counts."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from emulated_gpu import EmulatedGpu

from benchmarks import split as measurement
from benchmarks.split import USUAL, Candidate, best, candidates, measure, table
from benchmarks.timing import Function, Quantiles
from mlc_kernels import backends, split


def test_candidates() -> None:
    assert candidates((16, 512, 1), 132) == [USUAL, Candidate(1, True)]
    parts = [n for n in (1, 2, 4, 8) for _ in range(2)]
    assert [c.parts for c in candidates((16, 4096, 32), 132)] == parts
    assert candidates((32, 8192, 128), 132) == [USUAL, Candidate(2, False)]
    assert candidates((32, 8192, 133), 132) == [USUAL]


def test_the_best_saves_enough() -> None:
    one_warp, parts = Candidate(1, True), Candidate(4, True)
    usual = 100e-6
    assert best({USUAL: usual, one_warp: 96e-6, parts: 91e-6}) == USUAL
    assert best({USUAL: usual, one_warp: 94e-6, parts: 91e-6}) == one_warp
    assert best({USUAL: usual, one_warp: 94e-6, parts: 89e-6}) == parts


def test_a_size_stands_for_more_features_and_fewer_prompts() -> None:
    found = {(16, 512, 8): Candidate(1, True), (16, 2048, 1): USUAL, (32, 2048, 1): Candidate(4, False)}
    assert table(found, (512, 2048), (1, 8)) == [
        split.Split(16, range(512, 2048), range(2, 9), 1, True),
        split.Split(32, range(2048, 1 << 20), range(1, 2), 4, False),
    ]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> EmulatedGpu:
    found = EmulatedGpu(90)
    found.install(monkeypatch)
    monkeypatch.setitem(backends._reasons, ("cpu", None), None)
    monkeypatch.setattr(measurement, "LANGUAGES", {16: 3})
    return found


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler")
def test_each_candidate_is_what_is_timed(gpu: EmulatedGpu) -> None:
    seen: dict[str, list[str]] = {}

    def timer(calls: Mapping[str, list[Function]], device: torch.device) -> dict[str, Quantiles]:
        for name, functions in calls.items():
            gpu.launches.clear()
            functions[0]()
            seen[name] = list(gpu.launches)
        return {name: Quantiles(float(len(name)), 0.0, 0.0, 1) for name in calls}

    times = measure((16, 520, 1), torch.float32, torch.device("cpu"), 132, timer)
    two = ["prompt_forward", "prompt_backward"]
    assert seen == {
        "1 part": two,
        "1 part, one warp": two,
        "2 parts": ["gram_parts", *two],
        "2 parts, one warp": ["gram_parts", *two],
    }
    assert times == {candidate: len(str(candidate)) for candidate in candidates((16, 520, 1), 132)}
    assert split.SPLITS == ()


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler")
def test_a_wrong_candidate_is_not_timed(gpu: EmulatedGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    right = measurement.with_candidate

    def wrong(candidate: Candidate, function: Callable[[], Tensor]) -> Tensor:
        return right(candidate, function) * (1 + candidate.one_warp * 1e-5)

    monkeypatch.setattr(measurement, "with_candidate", wrong)
    with pytest.raises(ArithmeticError, match=r"the gradient with 1 part, one warp differs by 1.0e-05 of its"):
        measure((16, 40, 1), torch.float32, torch.device("cpu"), 132, lambda calls, device: {})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert measurement.main([]) == 2
    assert capsys.readouterr().err == "error: there is no GPU here, and only a GPU can tell what to choose\n"
