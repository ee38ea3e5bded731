"""Every kernel compiles for GPUs that are not present: no spills, bounded registers and shared memory.

Set ``MLC_SHOW_FIGURES=1`` to print a table of the figures.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from _pytest.mark import ParameterSet

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from mlc_kernels import fused, fused_pooling, loss_kernels, pooling_kernels, split  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter replaces the compiler"
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Bytes that each of these devices gives to a program by default (sm_80: 48 KiB, gfx942: 64 KiB).
SHARED = 48 * 1024
# Registers of a multiprocessor. A program needs (registers per thread) x (threads).
REGISTER_FILE = 65536
# Bytes. Triton 3.6 spills a few bytes in the largest float64 kernel for sm_80.
SPILLED = 0 if triton.__version__ >= "3.7" else 40
MANY_REGISTERS = loss_kernels.prompt_forward, loss_kernels.gram_parts, loss_kernels.prompt_backward
POINTERS = {
    "mask_ptr": "*i1",
    "table_ptr": "*i64",
    "saved_ptr": "*fp64",
    "group_ptr": "*i64",
    "language_ptr": "*i64",
    "offsets_ptr": "*i64",
}


class Figures(NamedTuple):
    registers: int
    spilled: int  # bytes stored and loaded (CUDA), or registers (ROCm)
    shared: int


def compiled(
    target: str, kernel: Any, constants: dict[str, Any], warps: int, pointers: dict[str, str], folder: Path
) -> Figures:
    signature, aligned = {}, {}
    for position, parameter in enumerate(kernel.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            signature[name] = (POINTERS | pointers)[name]
            aligned[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i64" if name == "temperature_bits" else "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps}
    if kernel in MANY_REGISTERS and target != "gfx942":
        options |= fused.COMPILER
    binary = triton.compile(source, target=TARGETS[target], options=options)
    if target == "gfx942":
        text = binary.asm["amdgcn"]
        registers, spilled, scalars = (
            int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # type: ignore[index]
            for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
        )
        return Figures(registers, spilled + scalars, binary.metadata.shared)
    # It has only about 20 correct bits, unlike rsqrt.approx.f64, which ptxas extends to float64.
    assert "rsqrt.approx.ftz.f64" not in binary.asm["ptx"]
    (folder / "kernel.ptx").write_text(binary.asm["ptx"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    architecture = re.search(r"^\.target (\w+)", binary.asm["ptx"], re.MULTILINE)[1]  # type: ignore[index]
    command = [tool, "-v", f"--gpu-name={architecture}", folder / "kernel.ptx", "-o", folder / "kernel.cubin"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(re.search(r"Used (\d+) registers", report)[1])  # type: ignore[index]
    spilled = [int(count) for count in re.findall(r"(\d+) bytes spill (?:stores|loads)", report)]
    assert len(spilled) >= 2
    return Figures(registers, sum(spilled), binary.metadata.shared)


def assert_fits(title: str, figures: Figures, warps: int, target: str, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        if os.environ.get("MLC_SHOW_FIGURES") == "1":
            cells = [target, title, warps, figures.registers, figures.spilled, figures.shared]
            print("\n|", " | ".join(map(str, cells)), "|", end="")
    assert figures.spilled <= SPILLED
    assert figures.shared <= SHARED
    lanes = TARGETS[target].warp_size
    # gfx942 has 512 registers for each of 4 x 64 lanes, so up to 512 with at most 4 warps.
    file = REGISTER_FILE if target != "gfx942" else 2 * REGISTER_FILE
    assert figures.registers * lanes * warps <= file


def forward_constants(target: str, tile: int, **changes: Any) -> dict[str, Any]:
    constants = {
        "OUTPUT": "gradient",
        "HAS_MASK": True,
        "HAS_TABLE": False,
        "DIVIDE_BY_TOP": True,
        "RESCALE": False,
        "ALIGNED": True,
        "DOT": target != "gfx942",
        "TILE": tile,
        "BLOCK": fused.FORWARD[tile][1],
        "PARTS": 1,
    }
    return constants | changes


FORWARD_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bf16": ("*bf16", {}),
    "fp32, table": ("*fp32", {"HAS_TABLE": True, "HAS_MASK": False, "DIVIDE_BY_TOP": False}),
    "fp64": ("*fp64", {"RESCALE": True}),
    "bf16, any stride": ("*bf16", {"ALIGNED": False}),
    "bf16, values": ("*bf16", {"OUTPUT": "values"}),
    "fp16, no gradient": ("*fp16", {"OUTPUT": "loss"}),
}


TILES = (16, 32, 64)


def cases(variants: Iterable[str], tiles: tuple[int, ...] = TILES) -> list[ParameterSet]:
    """Every variant in the largest tile for each target, and in every other tile for one target.

    So every target meets every variant, every variant every tile, and every tile every target. The full product has
    half as many cases again, each takes seconds, and it finds nothing more. The quick round compiles the first variant
    for sm_90.
    """
    found = []
    for place, variant in enumerate(variants):
        for number, tile in enumerate(tiles):
            for turn, target in enumerate(TARGETS):
                quick = (target, place) == ("sm_90", 0)
                if quick or tile == tiles[-1] or (place + number + turn) % len(TARGETS) == 0:
                    found.append(pytest.param(target, tile, variant, marks=[] if quick else [pytest.mark.slow]))
    return found


@pytest.mark.parametrize(("target", "tile", "variant"), cases(FORWARD_VARIANTS))
def test_forward(target: str, tile: int, variant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, changes = FORWARD_VARIANTS[variant]
    warps = fused.FORWARD[tile][0]
    pointers = {"rows_ptr": rows, "out_ptr": "*fp64" if rows == "*fp64" else "*fp32"}
    constants = forward_constants(target, tile, **changes)
    figures = compiled(target, loss_kernels.prompt_forward, constants, warps, pointers, tmp_path)
    assert_fits(f"forward, L <= {tile}, {variant}", figures, warps, target, capsys)


SPLIT_TILES = (16, 32)


@pytest.mark.parametrize(
    ("target", "tile", "variant"), cases(["bf16", "fp32, table", "fp64", "bf16, any stride"], SPLIT_TILES)
)
def test_parts(target: str, tile: int, variant: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, changes = FORWARD_VARIANTS[variant]
    warps = fused.FORWARD[tile][0]
    constants = forward_constants(target, tile, **changes)
    for name in ("OUTPUT", "DIVIDE_BY_TOP", "PARTS"):
        del constants[name]
    pointers = {"rows_ptr": rows, "out_ptr": "*fp64"}
    figures = compiled(target, loss_kernels.gram_parts, constants, warps, pointers, tmp_path)
    assert_fits(f"gram_parts, L <= {tile}, {variant}", figures, warps, target, capsys)


SPLIT_LOSSES = {  # tile, parts, whether it has one warp
    "one warp": (16, 1, True),
    "one warp, parts": (16, 8, True),
    "parts": (16, 8, False),
    "parts, wide": (32, 8, False),
}


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("fp64", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", SPLIT_LOSSES)
@pytest.mark.parametrize(
    "target", ["sm_90", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sm_80", "gfx942"))]
)
def test_forward_of_a_split(
    target: str, kind: str, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tile, parts, one_warp = SPLIT_LOSSES[kind]
    warps, block = (fused.ONE_WARP if one_warp else fused.FORWARD)[tile]
    alone = parts == 1
    changes = {"RESCALE": dtype == "fp64", "BLOCK": block, "PARTS": parts, "ALIGNED": alone, "HAS_MASK": alone}
    pointers = {"rows_ptr": f"*{dtype}" if alone else "*fp64", "out_ptr": f"*{dtype}"}
    constants = forward_constants(target, tile, **changes)
    figures = compiled(target, loss_kernels.prompt_forward, constants, warps, pointers, tmp_path)
    assert_fits(f"forward, L <= {tile}, {dtype}, {kind}", figures, warps, target, capsys)


def test_the_table_asks_for_nothing_that_is_not_compiled_here() -> None:
    asked = {(chosen.tile, 8 if chosen.parts > 1 else 1, chosen.one_warp) for chosen in split.SPLITS}
    assert asked <= set(SPLIT_LOSSES.values())


@pytest.mark.parametrize(("target", "tile", "dtype"), cases(["bf16", "fp32", "fp64"]))
def test_backward(target: str, tile: int, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    warps, block = fused.BACKWARD[tile]
    pointers = {"rows_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "grad_ptr": "*fp32", "count_ptr": "*fp64"}
    constants = {
        "MEAN": True,
        "HAS_TABLE": dtype == "fp32",
        "ALIGNED": True,
        "DOT": target != "gfx942",
        "TILE": tile,
        "BLOCK": block,
    }
    figures = compiled(target, loss_kernels.prompt_backward, constants, warps, pointers, tmp_path)
    assert_fits(f"backward, L <= {tile}, {dtype}", figures, warps, target, capsys)


@pytest.mark.parametrize(
    "target", [pytest.param(name, marks=[] if name == "sm_90" else pytest.mark.slow) for name in TARGETS]
)
def test_sum(target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pointers = {"losses_ptr": "*fp32", "out_ptr": "*fp32", "count_ptr": "*fp64"}
    constants = {"MEAN": True, "BLOCK": fused.SUMMED}
    figures = compiled(target, loss_kernels.sum_losses, constants, 1, pointers, tmp_path)
    assert_fits("sum_losses", figures, 1, target, capsys)


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "target", ["sm_90", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sm_80", "gfx942"))]
)
def test_pooling(target: str, packed: bool, mean: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = {"HAS_MASK": not packed, "PACKED": packed}
    find = common | {"OF_TOKENS": not mean, "TILE": 64, "BLOCK": fused_pooling.ids_in_a_step(64)}
    move = common | {"MEAN": mean, "ALIGNED": True, "TOKENS": fused_pooling.TOKENS, "BLOCK": fused_pooling.FEATURES}
    pointers = {
        "hidden_ptr": "*bf16",
        "count_ptr": "*fp64" if mean else "*i64",
        "grad_ptr": "*fp32" if mean else "*bf16",
    }
    kind = f"{'packed' if packed else 'padded'}, {'mean' if mean else 'last'}"
    for kernel, constants, warps, out in (
        (pooling_kernels.find_rows, find, 4, ""),
        (pooling_kernels.pool_rows, move, fused_pooling.WARPS, "*fp32" if mean else "*bf16"),
        (pooling_kernels.spread_rows, move, fused_pooling.WARPS, "*bf16"),
    ):
        figures = compiled(target, kernel, constants, warps, pointers | {"out_ptr": out}, tmp_path)
        assert_fits(f"{kernel.__name__}, {kind}", figures, warps, target, capsys)


@pytest.mark.parametrize(
    "kernel",
    [
        loss_kernels.prompt_forward,
        loss_kernels.gram_parts,
        loss_kernels.prompt_backward,
        loss_kernels.sum_losses,
        pooling_kernels.find_rows,
        pooling_kernels.pool_rows,
        pooling_kernels.spread_rows,
    ],
)
def test_no_number_makes_a_variant(kernel: Any) -> None:
    """Unless told otherwise, Triton compiles again for a number that is 1 or a multiple of 16."""
    numbers = [p for p in kernel.params if not p.is_constexpr and not p.name.endswith("_ptr")]
    assert numbers
    assert [p.name for p in numbers if not p.do_not_specialize] == []


def test_launch_table_covers_every_number_of_languages() -> None:
    assert {fused.tile_of(languages) for languages in range(1, 65)} == set(fused.FORWARD) == set(fused.BACKWARD)
    assert all(languages <= fused.tile_of(languages) for languages in range(1, 65))
