"""``python -m benchmarks.kernel``: compare the MLC loss with implementations in eager PyTorch.

The results include the errors of loss and gradient against float64, for every shape. Speed-ups are printed only if
our implementations are at least as exact as the published form, a float32 SVD. On a GPU the kernel is timed twice:
in replays of a CUDA graph over inputs that do not fit into the cache (the time of the GPU alone), and by the wall
clock (the time that a training step waits).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import alternatives
from benchmarks.environment import environment
from benchmarks.timing import Function, Quantiles, copy_bandwidth, graph_times, peak_bytes, wall_times
from lightning_mlc.files.paths import user_path
from mlc_kernels import mlc_loss, mlc_loss_from_hidden

PHASES = ("forward", "backward", "both")
Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """B prompts in L languages: rows (B, L, D), or, with T ``tokens``, states (B * L, T, D) that are averaged first."""

    prompts: int
    languages: int
    features: int
    tokens: int = 0

    def __str__(self) -> str:
        text = f"B={self.prompts} L={self.languages} D={self.features}"
        return text + (f" T={self.tokens}" if self.tokens else "")


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


@dataclass
class ProviderResult:
    """Errors, times and memory of one provider on one shape. Times are seconds per call."""

    prompts: int
    languages: int
    features: int
    tokens: int
    dtype: str
    provider: str
    ours: bool
    loss_error: float
    """Relative error of the loss against float64."""
    gradient_error: float
    """Norm of the gradient's error over the gradient's, against float64."""
    forward: float
    forward_p20: float
    forward_p80: float
    backward: float
    backward_p20: float
    backward_p80: float
    both: float
    both_p20: float
    both_p80: float
    rounds: int
    both_in_graph: float | None
    """Time of the GPU alone, from CUDA-graph replay."""
    peak_bytes: int | None
    share_of_copy: float | None
    """Achieved bandwidth over that of a device copy. The bytes that must move: the input is read once (rows twice,
    because the gradient needs them again; padding never), and its gradient is written once."""

    @property
    def shape(self) -> Shape:
        return Shape(self.prompts, self.languages, self.features, self.tokens)


def measure_shape(
    shape: Shape, dtype: torch.dtype, device: torch.device, seconds: float, copied: float
) -> list[ProviderResult]:
    """Measure each provider that runs on ``device``.

    Args:
        shape: Shape of the input.
        dtype: Dtype of the input.
        device: Device of the input.
        seconds: Approximate time for each provider and phase.
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
        forward, backward, both = (times[phase][p.name] for phase in PHASES)
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
            )
        )
    return measured


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


def inexact(rows: list[ProviderResult]) -> list[str]:
    """Describe every result of ours that is less exact than the published form on the same shape."""
    complaints = []
    published = {row.shape: row for row in rows if row.provider == "svd"}
    for row in rows:
        bar = published[row.shape]
        # A result cannot be more exact than its own dtype.
        unit = torch.finfo(getattr(torch, row.dtype)).eps
        for what, error, allowed in (
            ("loss", row.loss_error, max(bar.loss_error, torch.finfo(torch.float32).eps)),
            ("gradient", row.gradient_error, max(bar.gradient_error, unit)),
        ):
            if row.ours and not error <= allowed:
                complaints.append(
                    f"{row.provider} at {row.shape}: error of the {what} is {error:.1e}, allowed {allowed:.1e}"
                )
    return complaints


def speed_ups(rows: list[ProviderResult]) -> list[dict[str, Any]]:
    """Compare our fastest provider with the published form and with the fastest eager one: wall time of both passes."""
    found = []
    for shape in dict.fromkeys(row.shape for row in rows):
        here = [row for row in rows if row.shape == shape]
        fastest = min((r for r in here if r.ours), key=lambda r: r.both)
        published = next(r for r in here if r.provider == "svd")
        best = min((r for r in here if not r.ours), key=lambda r: r.both)
        found.append(
            {
                **dataclasses.asdict(shape),
                "ours": fastest.provider,
                "milliseconds": fastest.both * 1e3,
                "times_faster_than_svd": published.both / fastest.both,
                "best_eager": best.provider,
                "times_faster_than_best_eager": best.both / fastest.both,
            }
        )
    return found


def write(folder: Path, about: dict[str, Any], rows: list[ProviderResult], trusted: bool) -> list[Path]:
    """Write JSON with everything, including ``about``, and CSV with the rows. Returns the paths."""
    everything = {
        **about,
        "speed_ups": speed_ups(rows) if trusted else None,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    (folder / "kernel.json").write_text(json.dumps(everything, indent=1) + "\n")
    with (folder / "kernel.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in dataclasses.fields(ProviderResult)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(everything["rows"])
    return [folder / "kernel.json", folder / "kernel.csv"]


def plot(rows: list[ProviderResult], path: Path, device: str) -> None:
    """Plot the time of forward + backward over the number of prompts, with a panel for each number of features."""
    from matplotlib.figure import Figure

    rows = [r for r in rows if r.tokens == 0]
    languages = 10 if any(r.languages == 10 for r in rows) else rows[0].languages
    rows = [r for r in rows if r.languages == languages]
    widths = sorted({r.features for r in rows})
    figure = Figure(figsize=(2.6 * len(widths) + 1.2, 3.2), layout="constrained")
    panels = figure.subplots(1, len(widths), sharey=True, squeeze=False)[0]
    markers = dict(zip((p.name for p in PROVIDERS), "os^vDx", strict=False))
    for axes, width in zip(panels, widths, strict=True):
        for name in dict.fromkeys(r.provider for r in rows):
            points = sorted((r.prompts, r.both * 1e3) for r in rows if r.provider == name and r.features == width)
            ours = any(r.ours for r in rows if r.provider == name)
            axes.plot(*zip(*points, strict=True), marker=markers[name], ms=4, lw=2 if ours else 1, label=name)
        axes.set(xscale="log", yscale="log", title=f"D = {width}", xlabel="prompts (B)")
        axes.set_xticks(sorted({r.prompts for r in rows}), sorted({r.prompts for r in rows}))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("ms, forward + backward")
    panels[0].legend(fontsize=7)
    figure.suptitle(f"MLC loss of {languages} languages on {device}", fontsize=10)
    figure.savefig(path, dpi=150)


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
    parser.add_argument("--seconds", type=float, default=0.3, help="approximate time of each provider and phase")
    parser.add_argument(
        "--out", type=user_path, required=True, help="folder for kernel.json, kernel.csv and kernel.png"
    )
    options = parser.parse_args(args)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)

    copied = copy_bandwidth(device)
    about = {
        "environment": environment(device),
        "settings": {"dtype": options.dtype, "seconds": options.seconds, "copy_bytes_per_second": copied},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    rows: list[ProviderResult] = []
    shapes = [Shape(*sizes) for sizes in product(options.prompts, options.languages, options.features)]
    shapes += [Shape(8, 10, *sizes) for sizes in product(options.pool_features, options.pool_tokens)]
    for number, shape in enumerate(shapes, start=1):
        rows += measure_shape(shape, dtype, device, options.seconds, copied)
        complaints = inexact(rows)
        paths = write(options.out, about, rows, trusted=not complaints)  # now, so that results survive an interruption
        print(f"\r{number}/{len(shapes)} shapes", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)

    if not complaints:
        paths.append(options.out / "kernel.png")
        plot(rows, paths[-1], str(about["environment"]["device"]))
    print("wrote", *paths, sep="\n  ")
    if complaints:
        print("no speed-up is reported, because the results are not exact enough:", *complaints, sep="\n  ")
        return 1
    print(f"{'B':>4} {'L':>3} {'D':>5} {'T':>4}  {'ours':<12} {'ms':>9} {'x svd':>7}  x best eager")
    for s in speed_ups(rows):
        sizes = f"{s['prompts']:>4} {s['languages']:>3} {s['features']:>5} {s['tokens']:>4}"
        ratios = f"{s['times_faster_than_svd']:>7.1f}  {s['times_faster_than_best_eager']:.1f} ({s['best_eager']})"
        print(f"{sizes}  {s['ours']:<12} {s['milliseconds']:>9.3f} {ratios}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
