"""``python -m benchmarks.kernel``: compare the MLC loss with implementations in eager PyTorch.

The results include the errors of loss and gradient against float64, for every shape. Speed-ups are printed only if
our implementations are at least as exact as the published form, a float32 SVD.

Loss and gradient together are timed by the wall clock at three paces, for all forms alike (:mod:`benchmarks.timing`):
cold (calls of all forms interleaved), hot (one form again and again) and queued (many calls, one wait). Each pace is
timed with and without autograd's thread for the device (``torch.autograd.set_multithreading_enabled``). With it, the
backward pass of a loss alone wakes another thread and waits for it. In a training step this thread is awake already,
because it runs the backward pass of the whole model. On a CPU autograd has no such thread.

The forward and the backward pass are timed alone, too. They do not add up to the time of both, because a call of both
finds colder caches. The floor is what any loss costs: the sum of the rows and its gradient, timed in the same rounds.

On a GPU the kernel is also timed in replays of a CUDA graph, over inputs that do not fit into the cache: the time of
the GPU alone.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks import alternatives
from benchmarks.environment import environment
from benchmarks.kernel_report import PROTOCOL, Floor, ProviderResult, Shape, goals, inexact, plot, table, write
from benchmarks.timing import (
    Function,
    Quantiles,
    copy_bandwidth,
    graph_times,
    hot_times,
    peak_bytes,
    queued_times,
    wall_times,
)
from lightning_mlc.files.paths import user_path
from mlc_kernels import mlc_loss, mlc_loss_from_hidden

PHASES = ("forward", "backward")
FLOOR = "floor"
"""Name of the sum, among those of the providers."""
Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Provider:
    """One way to compute the loss of (B, L, D) rows."""

    name: str
    loss: Loss
    ours: bool = False
    cuda_only: bool = False
    capturable: bool = False
    """Whether a CUDA graph can capture it. Eager eigen-solvers and SVDs read their error code on the host."""


PROVIDERS = (
    Provider("triton", partial(mlc_loss, backend="triton"), ours=True, cuda_only=True, capturable=True),
    Provider("closed_form", partial(mlc_loss, backend="closed_form"), ours=True),
    Provider("svd", alternatives.svd),
    Provider("svd_gesvda", alternatives.svd_gesvda, cuda_only=True),
    Provider("gram_eigh", alternatives.gram_eigh),
    Provider("gram_eigh_compiled", alternatives.gram_eigh_compiled),
)
REFERENCE = Provider("reference", partial(mlc_loss, backend="reference"), ours=True)
"""The definition. Its result in float64 is taken as the truth."""


def measure_shape(
    shape: Shape, dtype: torch.dtype, device: torch.device, seconds: float, copied: float
) -> tuple[list[ProviderResult], Floor]:
    """Measure each provider that runs on ``device``, and the floor.

    Args:
        shape: Shape of the input.
        dtype: Dtype of the input.
        device: Device of the input.
        seconds: Approximate time for each provider, phase and pace.
        copied: Bytes per second that a copy on the device moves.
    """
    mask = make_mask(shape, device)
    rows = make_input(shape, dtype, device)
    truth = loss_and_gradient(loss_of(REFERENCE, shape, mask), rows.double())
    providers = [p for p in PROVIDERS if device.type == "cuda" or not p.cuda_only]
    losses = {p.name: loss_of(p, shape, mask) for p in providers}
    errors = {name: relative_errors(loss_and_gradient(loss, rows), truth) for name, loss in losses.items()}
    times = {
        phase: wall_times({name: phase_of(phase, loss, rows) for name, loss in losses.items()}, device, seconds)
        for phase in PHASES
    }
    paces = paces_of(
        {name: phase_of("both", loss, rows) for name, loss in [*losses.items(), (FLOOR, sum_of)]}, device, seconds
    )
    in_graph: dict[str, Quantiles] = {}
    if device.type == "cuda":
        # Up to 64 inputs, together larger than an H100's L2 cache of 50 MB. A cache goes by address, so copies suffice.
        copies = min(64, 1 + (1 << 27) // rows.nbytes)
        inputs = [rows.detach().clone().requires_grad_() for _ in range(copies)]
        capturable = [p.name for p in providers if p.capturable]
        in_graph = graph_times(
            {name: [phase_of("both", losses[name], x) for x in inputs] for name in capturable}, device
        )
    read = 2 * rows.nbytes if mask is None else rows.nbytes * int(mask.sum()) // mask.numel()
    measured = []
    for p in providers:
        forward, backward = (times[phase][p.name] for phase in PHASES)
        both = paces["cold"][p.name]
        on_gpu = in_graph[p.name].median if p.name in in_graph else None
        measured.append(
            ProviderResult(
                shape.prompts,
                shape.languages,
                shape.features,
                shape.tokens,
                str(dtype).removeprefix("torch."),
                p.name,
                p.ours,
                errors[p.name][0],
                errors[p.name][1],
                *forward[:3],
                *backward[:3],
                *both[:3],
                both.rounds,
                on_gpu,
                peak_bytes(phase_of("both", losses[p.name], rows), device),
                (read + rows.nbytes) / on_gpu / copied if on_gpu else None,
                {pace: found[p.name] for pace, found in paces.items()},
            )
        )
    return measured, Floor(shape, {pace: found[FLOOR] for pace, found in paces.items()})


def sum_of(rows: Tensor) -> Tensor:
    """No loss, but what any loss costs: one reduction."""
    return rows.sum()


def paces_of(calls: dict[str, Function], device: torch.device, seconds: float) -> dict[str, dict[str, Quantiles]]:
    """Time ``calls`` at every pace of ``kernel_report.PACES``."""
    found = {}
    for suffix, threaded in (("", True), ("_inline", False)):
        with torch.autograd.set_multithreading_enabled(threaded):
            found[f"cold{suffix}"] = wall_times(calls, device, seconds)
            found[f"hot{suffix}"] = hot_times(calls, device, seconds)
            found[f"queued{suffix}"] = queued_times(calls, device, seconds)
    return found


def loss_of(provider: Provider, shape: Shape, mask: Tensor | None) -> Loss:
    """Return the loss as a function of the input alone. With a ``mask`` of tokens, it averages over tokens first."""
    if mask is None:
        return provider.loss
    if provider.ours:
        row = torch.arange(len(mask), device=mask.device)
        return lambda hidden: mlc_loss_from_hidden(
            hidden,
            row // shape.languages,
            row % shape.languages,
            shape.prompts,
            shape.languages,
            attention_mask=mask,
            pooling="mean",
            backend=provider.name,  # type: ignore[arg-type]  # ours are named after their backends
        )
    size = (shape.prompts, shape.languages, shape.features)
    return lambda hidden: provider.loss(alternatives.mean_pool(hidden, mask).view(size))


def make_mask(shape: Shape, device: torch.device) -> Tensor | None:
    """Return (B * L, T) bool, in which a row has between T / 2 and T tokens; None without tokens."""
    if shape.tokens == 0:
        return None
    rows = shape.prompts * shape.languages
    lengths = torch.randint(shape.tokens // 2, shape.tokens + 1, (rows,), generator=torch.Generator().manual_seed(0))
    return (torch.arange(shape.tokens) < lengths[:, None]).to(device)


def make_input(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return rows with a shared direction, as translations have, and noise of a tenth of its length."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(shape.prompts, 1, shape.features, generator=generator)
    rows = shared + 0.1 * torch.randn(shape.prompts, shape.languages, shape.features, generator=generator)
    if shape.tokens:
        rows = rows.view(-1, 1, shape.features).expand(-1, shape.tokens, -1)
    return rows.to(device, dtype).contiguous().requires_grad_()


def loss_and_gradient(loss: Loss, rows: Tensor) -> tuple[Tensor, Tensor]:
    rows = rows.detach().requires_grad_()
    value = loss(rows)
    (gradient,) = torch.autograd.grad(value, rows)
    return value.detach(), gradient


def relative_errors(found: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> tuple[float, float]:
    loss, gradient = ((a.double() - b).norm() / b.norm() for a, b in zip(found, truth, strict=True))
    return float(loss), float(gradient)


def phase_of(phase: str, loss: Loss, rows: Tensor) -> Function:
    """Return the function to time for ``phase``."""
    if phase == "forward":
        return lambda: loss(rows)
    if phase == "backward":
        value = loss(rows)
        return lambda: torch.autograd.grad(value, rows, retain_graph=True)
    return lambda: torch.autograd.grad(loss(rows), rows)


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel", description=str(__doc__).split("\n")[0])
    numbers: dict[str, Any] = {"type": int, "nargs": "+", "metavar": "N"}
    parser.add_argument("--prompts", default=[1, 2, 8, 32, 128], help="B", **numbers)
    parser.add_argument("--languages", default=[4, 10, 16, 32], help="L", **numbers)
    parser.add_argument("--features", default=[512, 2048, 4096, 8192], help="D", **numbers)
    parser.add_argument("--pool-tokens", default=[32, 128, 512], help="T of mean pooling, at B = 8, L = 10", **numbers)
    parser.add_argument("--pool-features", default=[512, 4096], help="H of mean pooling", **numbers)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=0.3, help="approximate time of each provider, phase and pace")
    parser.add_argument(
        "--out", type=user_path, required=True, help="folder for kernel.json, kernel.csv and kernel.png"
    )
    options = parser.parse_args(args)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)

    copied = copy_bandwidth(device)
    about = {
        "environment": environment(device),
        "settings": {
            "protocol": PROTOCOL,
            "dtype": options.dtype,
            "seconds": options.seconds,
            "copy_bytes_per_second": copied,
        },
    }
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[ProviderResult] = []
    floors: list[Floor] = []
    shapes = [Shape(*sizes) for sizes in product(options.prompts, options.languages, options.features)]
    shapes += [Shape(8, 10, *sizes) for sizes in product(options.pool_features, options.pool_tokens)]
    for number, shape in enumerate(shapes, start=1):
        measured, floor = measure_shape(shape, dtype, device, options.seconds, copied)
        rows += measured
        floors.append(floor)
        complaints = inexact(rows)
        # Now, so that results survive an interruption.
        paths = write(options.out, about, rows, floors, trusted=not complaints)
        print(f"\r{number}/{len(shapes)} shapes", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)

    if not complaints:
        paths.append(options.out / "kernel.png")
        plot(rows, paths[-1], str(about["environment"]["device"]))
    print("wrote", *paths, sep="\n  ")
    if complaints:
        print("no speed-up is reported, because the results are not exact enough:", *complaints, sep="\n  ")
        return 1
    print(*table(rows, floors), sep="\n")
    if device.type == "cuda":
        print(*goals(rows, floors), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
