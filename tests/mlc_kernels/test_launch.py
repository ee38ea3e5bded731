"""Plans: a launch by a plan hands over what Triton would, and whatever Triton would do differently goes through Triton.

The GPU is a stub that notes what reaches the launcher.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

from benchmarks.stub_gpu import Launch, StubGpu  # noqa: E402
from mlc_kernels import fused, fused_pooling, launch, loss_kernels, mlc_loss, mlc_loss_from_hidden, split  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the launcher"
)


@pytest.fixture
def gpu() -> Iterator[StubGpu]:
    with StubGpu(record=[]).installed() as gpu:
        yield gpu


def taken(gpu: StubGpu) -> list[Launch]:
    """The launches since the last time."""
    assert gpu.record is not None
    found = list(gpu.record)
    gpu.record.clear()
    return found


def one(gpu: StubGpu) -> Launch:
    (found,) = taken(gpu)
    return found


def rows_of(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def forward(rows: Tensor, mask: Tensor | None = None, **options: Any) -> None:
    mlc_loss(rows, mask, backend="triton", **options)


# --- The same arguments -----------------------------------------------------------------------------------------------


def loss_variant(prompts: int, dtype: torch.dtype, mask: bool, reduction: Any, scale: Any) -> None:
    rows = rows_of(prompts, 3, 32, dtype=dtype).requires_grad_()
    present = torch.ones(3, prompts, dtype=torch.bool).T if mask else None
    loss = mlc_loss(rows, present, reduction=reduction, scale=scale, backend="triton")
    torch.autograd.grad(loss, rows, torch.ones_like(loss))


def hidden_variant(packed: bool, pooling: Any, mask: torch.dtype | None) -> None:
    hidden = rows_of(15, 8) if packed else rows_of(3, 5, 8)
    spans = {"offsets": torch.tensor([0, 4, 9, 15], dtype=torch.int32)} if packed else {}
    if mask is not None:
        spans["attention_mask"] = torch.ones(5, 3, dtype=mask).T
    ids = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0])
    hidden.requires_grad_()
    loss = mlc_loss_from_hidden(hidden, *ids, 2, 2, pooling=pooling, backend="triton", **spans)
    torch.autograd.grad(loss, hidden)


F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
LOSS, SUM = ["prompt_forward", "prompt_backward"], ["prompt_forward", "sum_losses", "prompt_backward"]
VARIANTS: dict[str, tuple[Callable[..., None], tuple[Any, ...], list[str]]] = {
    "one prompt, mean": (loss_variant, (1, F32, False, "mean", "top"), LOSS),
    "one prompt, sum": (loss_variant, (1, BF16, True, "sum", "none"), LOSS),
    "one prompt, none": (loss_variant, (1, F64, True, "none", "top"), LOSS),
    "mean": (loss_variant, (4, F32, False, "mean", "top"), SUM),
    "mean, mask": (loss_variant, (4, F16, True, "mean", "none"), SUM),
    "sum": (loss_variant, (4, F64, False, "sum", "top"), SUM),
    "sum, mask": (loss_variant, (4, F32, True, "sum", "top"), SUM),
    "none": (loss_variant, (4, BF16, False, "none", "top"), LOSS),
    "none, mask": (loss_variant, (4, F64, True, "none", "none"), LOSS),
    "last tokens": (hidden_variant, (False, "last", torch.bool), ["find_rows", *SUM]),
    "last tokens, packed": (hidden_variant, (True, "last", None), ["find_rows", *SUM]),
    "means": (hidden_variant, (False, "mean", torch.int64), ["find_rows", "pool_rows", *SUM, "spread_rows"]),
    "means, packed": (hidden_variant, (True, "mean", None), ["find_rows", "pool_rows", *SUM, "spread_rows"]),
}


@pytest.mark.parametrize("bind", ["_directly", "_publicly"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_plan_hands_over_what_triton_does(
    gpu: StubGpu, monkeypatch: pytest.MonkeyPatch, variant: str, bind: str
) -> None:
    """Every launch is made three times with the same tensors: without a plan, and twice with."""
    original = launch.launch

    def thrice(*arguments: Any) -> None:
        launch.forget()
        for _ in range(3):
            original(*arguments)

    monkeypatch.setattr(launch, "_bind", getattr(launch, bind))
    monkeypatch.setattr(fused, "launch", thrice)
    monkeypatch.setattr(fused_pooling, "launch", thrice)
    run, arguments, kernels = VARIANTS[variant]
    run(*arguments)
    found = taken(gpu)
    assert [launched.kernel for launched in found[::3]] == kernels
    for by_triton, *by_plan in zip(found[::3], found[1::3], found[2::3], strict=True):
        assert not by_triton.by_plan
        assert by_plan == [by_triton._replace(by_plan=True)] * 2
        assert by_plan[0].function is by_triton.function
        assert [type(a) for a in by_plan[0].arguments] == [type(a) for a in by_triton.arguments]


def test_values_have_plans_too(gpu: StubGpu) -> None:
    from mlc_kernels import singular_values

    for _ in range(2):
        singular_values(rows_of(2, 3, 8), backend="triton")
    assert [launched.by_plan for launched in taken(gpu)] == [False, True]


# --- The layout -------------------------------------------------------------------------------------------------------


def strided(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype = F32) -> Tensor:
    size = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    return torch.zeros(size, dtype=dtype).as_strided(shape, strides)


FAR = 2**31  # a stride that needs 64 bits, of an axis with one entry
ALL, EVERY_OTHER = torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 6, dtype=torch.bool)[:, ::2]
LAYOUTS: dict[str, Callable[[], None]] = {
    "base": lambda: forward(rows_of(2, 3, 32), temperature=0.25),
    "prompts": lambda: forward(rows_of(4, 3, 32), temperature=0.25),
    "languages": lambda: forward(rows_of(2, 4, 32), temperature=0.25),
    "features": lambda: forward(rows_of(2, 3, 33), temperature=0.25),
    "prompt stride": lambda: forward(strided((2, 3, 32), (128, 32, 1)), temperature=0.25),
    "row stride": lambda: forward(strided((2, 3, 32), (96, 48, 1)), temperature=0.25),
    "one prompt": lambda: forward(rows_of(1, 3, 32), temperature=0.25),
    "one prompt, far": lambda: forward(rows_of(3, 32).as_strided((1, 3, 32), (FAR, 32, 1)), temperature=0.25),
    "dtype": lambda: forward(rows_of(2, 3, 32, dtype=BF16), temperature=0.25),
    "dtype of the same size": lambda: forward(rows_of(2, 3, 32, dtype=F16), temperature=0.25),
    "float64": lambda: forward(rows_of(2, 3, 32, dtype=F64), temperature=0.25),
    "temperature": lambda: forward(rows_of(2, 3, 32), temperature=0.5),
    "scale": lambda: forward(rows_of(2, 3, 32), temperature=0.25, scale="none"),
    "reduction": lambda: forward(rows_of(2, 3, 32), temperature=0.25, reduction="none"),
    "mask": lambda: forward(rows_of(2, 3, 32), ALL, temperature=0.25),
    "strides of the mask": lambda: forward(rows_of(2, 3, 32), EVERY_OTHER, temperature=0.25),
    "gradient": lambda: forward(rows_of(2, 3, 32).requires_grad_(), temperature=0.25),
    "table": lambda: fused.loss(rows_of(2, 32), None, torch.zeros(2, 3, dtype=torch.int64), 0.25, True, "sum"),
}


def loss_launches(gpu: StubGpu) -> list[Launch]:
    return [launched for launched in taken(gpu) if launched.kernel == "prompt_forward"]


def without_addresses(launched: Launch) -> tuple[Any, ...]:
    return (*launched[:-2], launched.arguments[5:])


def test_every_layout_has_a_plan_of_its_own(gpu: StubGpu) -> None:
    """Each is launched by Triton first, and by its plan when all others have theirs."""
    for run in LAYOUTS.values():
        run()
    first = loss_launches(gpu)
    assert not any(launched.by_plan for launched in first)
    assert len({without_addresses(launched) for launched in first}) == len(LAYOUTS)
    for run in LAYOUTS.values():
        run()
    again = loss_launches(gpu)
    assert all(launched.by_plan for launched in again)
    assert [without_addresses(launched) for launched in again] == [without_addresses(launched) for launched in first]


def choose(monkeypatch: pytest.MonkeyPatch, parts: int, one_warp: bool) -> None:
    every = range(1, 1000)
    monkeypatch.setattr(split, "SPLITS", (split.Split(16, every, every, parts, one_warp),))


def test_a_split_is_part_of_the_layout(gpu: StubGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five choices have five plans of the loss kernel. Of the parts there are two plans, for two numbers of parts."""
    first, again = [], []
    for found in (first, again):
        monkeypatch.setattr(split, "SPLITS", ())
        forward(rows_of(1, 3, 300))
        for parts, one_warp in ((1, True), (2, False), (2, True), (3, True)):
            choose(monkeypatch, parts, one_warp)
            forward(rows_of(1, 3, 300))
        found += taken(gpu)
    one_launch, two_launches = ["prompt_forward"], ["gram_parts", "prompt_forward"]
    assert [launched.kernel for launched in first] == one_launch * 2 + two_launches * 3
    assert [launched.by_plan for launched in first] == [False] * 4 + [True] + [False] * 3
    assert all(launched.by_plan for launched in again)
    losses, parts_alone = ([x for x in again if x.kernel == name] for name in ("prompt_forward", "gram_parts"))
    # The usual launch and that of one warp differ in the block, the others in the parts or the compiled function.
    assert len({(id(x.function), *x.arguments[5:]) for x in losses}) == 5
    assert len({(id(x.function), *x.arguments[4:], *x.grid) for x in parts_alone}) == 2


def test_parts_of_every_layout_have_the_right_plan(gpu: StubGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all plans at hand, each launch by a plan is the one that Triton makes."""
    choose(monkeypatch, 2, True)
    by_triton = []
    for run in LAYOUTS.values():
        launch.forget()
        run()
        by_triton.append(taken(gpu))
    for run in LAYOUTS.values():
        run()
    taken(gpu)
    for run, expected in zip(LAYOUTS.values(), by_triton, strict=True):
        run()
        found = taken(gpu)
        assert [launched.kernel for launched in found][:2] == ["gram_parts", "prompt_forward"]
        assert all(launched.by_plan for launched in found)
        for by_plan, other in zip(found, expected, strict=True):
            tensors = {"gram_parts": 4, "prompt_forward": 5, "sum_losses": 3}[other.kernel]
            assert by_plan[:-2] == other[:-2]
            assert by_plan.arguments[tensors:] == other.arguments[tensors:]


def test_the_incoming_gradient_and_a_table_are_part_of_the_layout(gpu: StubGpu) -> None:
    rows, saved = rows_of(2, 3, 32), torch.zeros(2, 4, 3, dtype=F64)
    calls: list[tuple[Any, ...]] = [
        (rows, None, saved, torch.ones(2), None),
        (rows, None, saved, torch.ones(2, 2)[:, 0], None),
        (rows, None, saved, torch.ones(()), None),
        (rows, None, saved, torch.ones(2, dtype=F64), None),
        (rows, None, saved, torch.ones(()), torch.ones((), dtype=F64)),
        (rows_of(2, 32), torch.zeros(2, 3, dtype=torch.int64), saved, torch.ones(2), None),
        (rows_of(2, 3, 32, dtype=BF16), None, saved, torch.ones(2), None),
    ]
    for by_plan in (False, True):
        for call in calls:
            fused._gradient(*call)
        found = taken(gpu)
        assert [launched.by_plan for launched in found] == [by_plan] * len(calls)
        assert len({(launched.function, launched.arguments[6:]) for launched in found}) == len(calls)


def test_two_kernels_with_equal_layouts_have_two_plans(gpu: StubGpu) -> None:
    def call_for(mean: bool) -> Callable[[int], launch.Call]:
        constants = {"MEAN": mean, "BLOCK": 16}
        return lambda prompts: launch.Call(loss_kernels.sum_losses, (1, 1, 1), (prompts,), constants, {"num_warps": 1})

    mean, total = call_for(True), call_for(False)
    tensors = torch.ones(2, 3), torch.zeros(()), torch.zeros((), dtype=F64)
    for prepare in (mean, total, mean, total):
        launch.launch(prepare, (3,), tensors)
    found = taken(gpu)
    assert [launched.by_plan for launched in found] == [False, False, True, True]
    assert [launched.arguments[4] for launched in found] == [True, False] * 2


def test_types_of_a_mask_and_of_offsets_are_part_of_the_layout(gpu: StubGpu) -> None:
    ids = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 0])
    for dtype in (torch.bool, torch.uint8, torch.int8, torch.int64):
        mask = torch.ones(3, 5, dtype=dtype)
        fused_pooling.table(rows_of(3, 5, 8), mask, None, *ids, 2, 2, True)
    for dtype in (torch.int32, torch.int64):
        fused_pooling.table(rows_of(15, 8), None, torch.zeros(4, dtype=dtype), *ids, 2, 2, True)
    assert [launched.by_plan for launched in taken(gpu)] == [False] * 6


def test_types_of_sums_and_of_pooling_are_part_of_the_layout(gpu: StubGpu) -> None:
    for dtype in (F32, F64):
        fused._sum(torch.ones(2, 3, dtype=dtype), True)
    for dtype in (F16, BF16, F32, F64):
        for mean in (True, False):
            fused_pooling._pool(rows_of(3, 5, 8, dtype=dtype), None, None, mean)
    for mean, kinds in ((True, [(F32, F16), (F32, BF16), (F32, F32), (F64, F64)]), (False, [(F16, F16), (F32, F32)])):
        count = torch.ones(3, dtype=F64 if mean else torch.int64)
        for grad, dtype in kinds:
            fused_pooling._spread(rows_of(3, 8, dtype=grad), None, None, count, [3, 5, 8], dtype, mean)
    assert [launched.by_plan for launched in taken(gpu)] == [False] * 16


# --- Guards -----------------------------------------------------------------------------------------------------------


def settled(gpu: StubGpu) -> Launch:
    """The launch of a base layout by its plan."""
    LAYOUTS["one prompt"]()
    LAYOUTS["one prompt"]()
    by_triton, by_plan = taken(gpu)
    assert [by_triton.by_plan, by_plan.by_plan] == [False, True]
    return by_plan


def base() -> None:
    LAYOUTS["one prompt"]()


def misaligned() -> None:
    """The base layout at an address that is no multiple of 16."""
    forward(torch.zeros(3 * 32 + 1)[1:].view(1, 3, 32), temperature=0.25)


def test_an_address_that_is_not_aligned_has_no_plan(gpu: StubGpu) -> None:
    by_plan = settled(gpu)
    for _ in range(2):
        misaligned()
        found = one(gpu)
        assert not found.by_plan
        assert found.function != by_plan.function  # with narrow loads
        base()
        found = one(gpu)
        assert found.by_plan
        assert found.function is by_plan.function


def test_nor_does_it_make_one(gpu: StubGpu) -> None:
    misaligned()
    narrow = one(gpu)
    by_plan = settled(gpu)
    assert by_plan.function != narrow.function


def test_hooks_are_called(gpu: StubGpu) -> None:
    by_plan = settled(gpu)
    runtime = triton.knobs.runtime
    for chain in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        calls: list[Any] = []
        chain.add(calls.append)
        try:
            base()
            assert not one(gpu).by_plan
            assert [about.get()["name"] for about in calls] == ["prompt_forward"]
        finally:
            chain.remove(calls.append)
        base()
        assert one(gpu).by_plan
        assert len(calls) == 1
    assert by_plan.by_plan


@pytest.mark.parametrize("name", ["launch_enter_hook", "launch_exit_hook"])
def test_a_hook_in_place_of_the_chain_is_called(gpu: StubGpu, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    settled(gpu)
    calls: list[Any] = []
    with monkeypatch.context() as patched:
        patched.setattr(triton.knobs.runtime, name, calls.append)
        base()
        assert not one(gpu).by_plan
        assert len(calls) == 1
        patched.setattr(triton.knobs.runtime, name, None)
        base()
        assert one(gpu).by_plan
    assert len(calls) == 1


def test_hooks_before_a_run_are_called(gpu: StubGpu) -> None:
    settled(gpu)
    calls: list[Any] = []
    hooks = loss_kernels.prompt_forward.pre_run_hooks
    loss_kernels.prompt_forward.add_pre_run_hook(lambda *arguments, **named: calls.append(named))
    try:
        base()
    finally:
        hooks.clear()
    assert not one(gpu).by_plan
    assert len(calls) == 1
    base()
    assert one(gpu).by_plan


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        ("runtime", "debug", True),
        ("compilation", "instrumentation_mode", "fpsan"),
        ("runtime", "add_stages_inspection_hook", lambda *_: ("other stages", "of our own")),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_another_compilation_is_left_to_triton(
    gpu: StubGpu, monkeypatch: pytest.MonkeyPatch, place: str, name: str, value: object, first: bool
) -> None:
    """While it is asked for, plans are neither used nor made."""
    usual = None if first else settled(gpu)
    with monkeypatch.context() as patched:
        patched.setattr(getattr(triton.knobs, place), name, value)
        for _ in range(2):
            base()
            other = one(gpu)
            assert not other.by_plan
            assert usual is None or other.function is not usual.function
    if first:
        assert settled(gpu).function is not other.function
    else:
        base()
        assert one(gpu).by_plan


def test_each_device_has_its_plan_and_each_launch_its_stream(gpu: StubGpu) -> None:
    one_device, other = gpu.device, object()
    by_plan = settled(gpu)
    gpu.device = other
    elsewhere = settled(gpu)
    assert elsewhere.function != by_plan.function
    for device, stream, expected in ((one_device, 7, by_plan), (other, 9, elsewhere), (one_device, 8, by_plan)):
        gpu.device, gpu.stream = device, stream
        base()
        found = one(gpu)
        assert found.by_plan
        assert (found.function, found.stream) == (expected.function, stream)


@pytest.mark.parametrize(
    ("version", "bind"),
    [
        ("3.5.1", "_publicly"),
        ("3.6.0", "_directly"),
        ("3.7.1+git1a2b", "_directly"),
        ("3.9.0", "_directly"),
        ("3.10.0", "_publicly"),
        ("4.0.0", "_publicly"),
        ("unknown", None),
    ],
)
def test_versions(version: str, bind: str | None) -> None:
    assert launch._bind_for(version) is (None if bind is None else getattr(launch, bind))


def test_a_version_that_lacks_a_guard_has_no_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(type(triton.knobs.runtime), "launch_exit_hook")
    assert launch._bind_for("3.7.1") is None


def test_nor_has_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert launch._bind_for("3.7.1") is None


def test_without_a_way_to_bind_triton_launches(gpu: StubGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_bind", None)
    for _ in range(3):
        base()
        assert not one(gpu).by_plan


def test_a_refused_launch_is_made_by_triton(
    gpu: StubGpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a version of Triton that takes no addresses. One line says so, once."""
    monkeypatch.setattr(launch, "_bind", launch._bind)  # comes back after the test
    settled(gpu)

    def refuse(arguments: tuple[Any, ...]) -> None:
        if not isinstance(arguments[0], Tensor):
            raise TypeError("wants tensors")

    gpu.before = refuse
    with caplog.at_level(logging.WARNING, "mlc_kernels"):
        for _ in range(2):
            base()
            assert not one(gpu).by_plan
    version = triton.__version__
    assert caplog.messages == [
        f"Launches take longer, because Triton {version} refuses a kernel's arguments: wants tensors"
    ]


def test_what_is_no_compiled_kernel_has_no_plan(gpu: StubGpu) -> None:
    """Triton returns something else while it compiles in the background."""

    class InBackground:
        launched = 0

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]:
            return lambda *arguments, **named: setattr(self, "launched", self.launched + 1)

    kernel = InBackground()

    def prepare(size: int) -> launch.Call:
        return launch.Call(kernel, (1, 1, 1), (size,), {}, {})

    for _ in range(3):
        launch.launch(prepare, (1,), (torch.zeros(1),))
    assert kernel.launched == 3
    assert launch._plans == {}


# --- Numbers of plans, threads, torch.compile ------------------------------------------------------------------------


def test_plans_are_few(gpu: StubGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "MOST_PLANS", 3)
    for features in range(1, 12):
        forward(rows_of(1, 3, features))
        assert 1 <= len(launch._plans) <= 3
    taken(gpu)
    forward(rows_of(1, 3, 11))
    assert one(gpu).by_plan


def test_threads(gpu: StubGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads with layouts of their own, which drop each other's plans all the time, launch what they asked for."""
    monkeypatch.setattr(launch, "MOST_PLANS", 3)
    forward(rows_of(1, 3, 7))  # compile
    taken(gpu)
    failures: list[BaseException] = []
    start = threading.Barrier(4)

    def run(features: int) -> None:
        try:
            start.wait(60)
            for _ in range(200):
                forward(rows_of(1, 3, features))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(features,)) for features in (17, 19, 21, 23)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    found = taken(gpu)
    assert len(found) == 800
    assert {launched.by_plan for launched in found} == {True, False}
    for features in (17, 19, 21, 23):
        mine = [launched for launched in found if launched.arguments[8] == features]
        assert len(mine) == 200
        assert len({without_addresses(launched) for launched in mine}) == 1
    assert len(launch._plans) <= 3


@pytest.mark.slow
def test_operators_of_torch_compile_use_plans(gpu: StubGpu) -> None:
    compiled = torch.compile(lambda x: mlc_loss(x, backend="triton"), fullgraph=True, backend="aot_eager")
    rows = rows_of(2, 3, 32).requires_grad_()
    for by_plan in (False, True):
        torch.autograd.grad(compiled(rows), rows)
        found = taken(gpu)
        assert [launched.kernel for launched in found] == SUM
        assert [launched.by_plan for launched in found] == [by_plan] * 3
