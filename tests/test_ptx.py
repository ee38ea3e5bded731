"""Tests of the emulator itself, with programs short enough to follow by hand."""

from __future__ import annotations

import re
from fractions import Fraction

import numpy as np
import ptx
import pytest

OUT = 0x1000  # address of the results: one number for each thread


def run(body: str, dtype: str = "i4", threads: int = 64, blocks: int = 1) -> tuple[np.ndarray, set[str]]:
    """Run a program, and return the value of ``%r9`` in each thread (``%rd9`` for types of 8 bytes), and the races."""
    wide = np.dtype(dtype).itemsize == 8
    text = f"""
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0
)
.reqntid {threads}
{{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<20>;
	.reg .b64 	%rd<20>;
$L__func_begin0:
	ld.param.b64 	%rd10, [kernel_param_0];
	mov.u32 	%r10, %tid.x;               // a comment
	mov.u32 	%r11, %ctaid.x;
	mad.lo.s32 	%r12, %r11, {threads}, %r10;
	mad.wide.u32 	%rd11, %r12, {8 if wide else 4}, %rd10;
	shl.b32 	%r13, %r10, 2;
	.loc	1 0 0
{body}
	st.global.{"b64" if wide else "b32"} [ %rd11 + 0 ], {{ {"%rd9" if wide else "%r9"} }};
	ret;
$L__func_end0:
}}
"""
    data = np.full(threads * blocks * np.dtype(dtype).itemsize, 0xFF, np.uint8)
    races = ptx.Program(text, shared=1024).run((blocks,), threads, [OUT], ptx.Memory({OUT: data}))
    return data.view(dtype), races


EXCHANGE = """
	st.shared.b32 [ %r13 + 0 ], %r10;
	bar.sync 	0;
	xor.b32 	%r14, %r13, 128;
	ld.shared.b32 	%r9, [%r14];
"""


def test_warps_exchange_through_shared_memory() -> None:
    found, races = run(EXCHANGE, blocks=2)
    assert found.tolist() == [*range(32, 64), *range(32)] * 2
    assert races == set()


def test_without_the_barrier_that_is_a_race() -> None:
    _, races = run(EXCHANGE.replace("bar.sync 	0;", ""))
    assert races == {"read after another warp's write: ld.shared.b32 \t%r9, [%r14]"}


def test_a_barrier_between_reading_and_the_next_write_is_needed_too() -> None:
    again = EXCHANGE + "{}\tst.shared.b32 [ %r13 + 0 ], %r9;"
    assert run(again.format("\tbar.sync 	0;\n"))[1] == set()
    assert run(again.format(""))[1] == {"write after another warp's read: st.shared.b32 [ %r13 + 0 ], %r9"}


def test_a_barrier_of_warps_does_not_help_other_warps() -> None:
    assert run(EXCHANGE.replace("bar.sync 	0;", "bar.warp.sync 	-1;"))[1] != set()


def test_every_block_knows_their_number() -> None:
    assert run("mov.u32 	%r9, %nctaid.x;", blocks=3)[0].tolist() == [3] * 192


def test_within_a_warp_no_barrier_is_needed() -> None:
    found, races = run(EXCHANGE.replace("bar.sync 	0;", "").replace("128", "4"))
    assert found[:4].tolist() == [1, 0, 3, 2]
    assert races == set()


def test_several_warps_may_store_the_same_value() -> None:
    store = "\tand.b32 \t%r14, %r13, 127;\n\tst.shared.b32 [ %r14 + 0 ], {};\n"
    assert run("\tand.b32 \t%r9, %r10, 31;\n" + store.format("%r9"))[1] == set()
    assert run("\tmov.b32 \t%r9, 7;\n" + store.format("%r9") * 2)[1] == set()
    (race,) = run("\tmov.b32 \t%r9, 7;\n" + store.format("%r10"))[1]
    assert race.startswith("write with another warp's write")


def test_threads_diverge_and_meet() -> None:
    """Thread n loops n % 8 times, so the threads leave the loop at different times."""
    found, _ = run("""
	mov.b32 	%r9, 0;
	and.b32 	%r14, %r10, 7;
$L__BB0_1:
	setp.ge.s32 	%p1, %r9, %r14;
	@%p1 bra 	$L__BB0_2;
	add.s32 	%r9, %r9, 1;
	bra.uni 	$L__BB0_1;
$L__BB0_2:
	@!%p1 bra 	$L__BB0_1;
	bar.sync 	0;
	add.s32 	%r9, %r9, 100;
""")
    assert found.tolist() == [100 + thread % 8 for thread in range(64)]


def test_fused_rounds_once() -> None:
    """x * x minus its rounded value is the rounding error. It is 0 unless the operations are fused."""
    x = np.float64(0.1)
    bits = f"0d{x.view(np.uint64):016X}"
    product = f"\tmov.b64 \t%rd1, {bits};\n\tmul.f64 \t%rd2, %rd1, %rd1;\n\tneg.f64 \t%rd3, %rd2;\n"
    found, _ = run(product + "\tfma.rn.f64 \t%rd9, %rd1, %rd1, %rd3;", "f8")
    lost = Fraction(float(x)) ** 2 - Fraction(float(x * x))
    assert lost != 0
    # To the precision of the longer type, which has more bits than float64.
    assert found == pytest.approx(float(lost), rel=2.0**-8, abs=0)
    assert (run(product + "\tadd.f64 \t%rd9, %rd2, %rd3;", "f8")[0] == 0).all()


def test_what_nobody_wrote_is_poison() -> None:
    assert np.isnan(run("", "f8")[0]).all()
    assert np.isnan(run("\tld.shared.b64 \t%rd9, [0];", "f8")[0]).all()


def test_conversion_to_bfloat16_rounds_to_even() -> None:
    import torch

    values = np.array([1.0, 1.00390625, 1.01171875, -3.1415926, 1e-40, np.inf, np.nan, 3.4e38], np.float32)
    for value in values:
        bits = f"0f{value.view(np.uint32):08X}"
        found, _ = run(f"\tmov.b32 \t%r1, {bits};\n\tcvt.rn.bf16x2.f32 \t%r9, %r1, %r1;", "u4")
        expected = torch.tensor(value).to(torch.bfloat16).view(torch.int16).item() & 0xFFFF
        if np.isnan(value):
            expected = 0x7FFF  # any NaN would do; this is the one that a GPU returns
        assert (found == expected * 0x10001).all()


@pytest.mark.parametrize(
    ("body", "error", "words"),
    [
        ("\tsin.approx.f32 \t%r9, %r10;", ptx.Unknown, "sin.approx"),
        ("\tcvt.rzi.s32.f32 \t%r9, %r10;", ptx.Unknown, "cvt.rzi"),
        ("\tcvt.rn.s32.f32 \t%r9, %r10;", ptx.Unknown, "f32 to s32"),
        ("\tadd.s32 \t%r9, %r10, %what;", ptx.Unknown, "%what"),
        ("\tadd.s32 \t%r9, %r10, %rd1;", ptx.Unknown, "%rd1 as s32"),
        ("\tld.global.b32 { %r9 }, [ %rd10 + 4096 ];", ptx.Fault, "outside of all memory"),
        ("\tld.shared.b32 \t%r9, [%r13+1024];", ptx.Fault, "outside of shared memory"),
        ("\tld.shared.b32 \t%r9, [%r10];", ptx.Fault, "not aligned"),
        ("\tld.shared.v2.b32 \t{%r9, %r8}, [%r13];", ptx.Fault, "not aligned"),
        ("\tsetp.lt.s32 \t%p1, %r10, 40;\n\t@%p1 bar.sync \t0;", ptx.Fault, "not reached by all"),
        ("\tsetp.lt.s32 \t%p1, %r10, 40;\n\t@%p1 bar.warp.sync \t-1;", ptx.Fault, "not reached by all"),
        ("\tbar.warp.sync \t15;", ptx.Unknown, "barrier of a part of a warp"),
    ],
)
def test_what_is_not_allowed_is_named(body: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=re.escape(words)):
        run(body)
