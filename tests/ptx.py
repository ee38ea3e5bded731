"""Emulate compiled PTX with numpy, to run and check the code of a GPU without a GPU.

A kernel may be right in Triton's interpreter and wrong on a GPU, because a compiler comes between the two. It fuses
products and sums, lays data out over threads, and puts barriers where warps exchange data through shared memory. All of
this can be read in the PTX, which a :class:`Program` runs instruction by instruction.

Emulated: every thread of every block, in lockstep. If threads diverge, those with the smallest program counter run
first, until they meet the others. Registers and memory hold bits. Memory that was never written holds ones only (NaN as
a floating-point number, -1 as an integer). Addresses must be aligned and lie in memory that was passed in. All threads
that take part in a barrier, a shuffle or a matrix product must reach it. If one warp writes shared memory and another
reads it without a barrier between, that is a race. Lockstep hides its effect, but :class:`Races` detects it. If several
threads of a warp store to one address at once, PTX does not define which value stays: one is drawn at random.

Not emulated: time; the memory model beyond barriers, and races in global memory; the work of ptxas (it may fuse ``mul``
and ``add`` without a rounding mode); errors of approximations (``rsqrt.approx`` and similar instructions are exact
here); ``ftz``, which replaces subnormals by 0; the order of summation within a matrix product.

Only the opcodes of our kernels are supported. Any other raises :class:`Unknown`, which names it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Active = NDArray[np.bool_] | Literal[True]  # which threads take part; numpy is fastest with True for all
Step = Callable[[Active], object]

LANES = 32  # lanes of a warp
_LITERAL = re.compile(r"(0[df])?(-?[0-9A-Fa-fx]+)")
_ADDRESS = re.compile(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+))?\s*\]")
_TYPES: dict[str, type[np.generic]] = {
    "pred": np.bool_,
    **{f"{kind}{bits}": getattr(np, f"uint{bits}") for kind in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": getattr(np, f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"f{bits}": getattr(np, f"float{bits}") for bits in (16, 32, 64)},
    "bf16": np.uint16,  # numpy has no bfloat16: these are bits, for conversions only
    "bf16x2": np.uint32,
}


class Unknown(NotImplementedError):
    """The program contains something that is not emulated."""


class Fault(RuntimeError):
    """The program does something that is forbidden or undefined on a GPU."""


# --- Programs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    """An instruction such as ``@%p1 ld.global.v2.b64 {%rd1, %rd2}, [%rd3+8];``, split into its parts."""

    text: str
    opcode: str  # without types: ld.global.v2
    types: tuple[str, ...]  # b64
    operands: tuple[str, ...]  # as written, including braces and brackets
    guard: str | None  # %p1, with a leading ! if it is negated

    @classmethod
    def parse(cls, text: str) -> Instruction:
        match = re.fullmatch(r"(?:@(!?%\w+)\s+)?([\w.]+)\s*(.*)", text, re.DOTALL)
        if match is None:
            raise Unknown(text)
        guard, name, rest = match.groups()
        words = name.split(".")
        opcode = ".".join(word for word in words if word not in _TYPES)
        operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
        return cls(text, opcode, tuple(word for word in words if word in _TYPES), tuple(operands), guard)

    def vector(self, position: int) -> list[str]:
        """The registers of an operand, which may be in braces."""
        return re.findall(r"[^{},\s]+", self.operands[position])


class Program:
    """One kernel in PTX, which can be run any number of times."""

    def __init__(self, ptx: str, shared: int) -> None:
        """Parse the kernel.

        Args:
            ptx: Text of a module with one kernel.
            shared: Bytes of shared memory in a block, all of them in ``global_smem``.
        """
        self.shared = shared
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.registers: dict[str, str] = {}  # type by register name, or by the name without its number
        body = re.search(r"^\.visible \.entry (\w+)\((.*?)\).*?^\{(.*?)^\$L__func_end", ptx, re.DOTALL | re.MULTILINE)
        if body is None:
            raise Unknown("no kernel in this PTX")
        self.name, parameters, code = body.groups()
        self.parameters: list[str] = re.findall(r"(\w+)\s*(?:,|$)", parameters.strip())
        code = re.sub(r"//.*|^\s*\.loc\b.*", "", code, flags=re.MULTILINE)
        # Braces around inline assembly: they begin with a register declaration of their own, or stand at the end of a
        # line.
        code = re.sub(r"\{(?=\s*\.reg)|;\s*\}", ";", code)
        for statement in re.split(r";|(?<=:)\s", code):
            statement = statement.strip()
            if statement.endswith(":"):
                self.labels[statement[:-1]] = len(self.instructions)
            elif statement.startswith(".reg"):
                _, kind, name = statement.split()
                self.registers[name.split("<")[0]] = kind[1:]
            elif statement and statement != "}":
                self.instructions.append(Instruction.parse(statement))

    def run(self, grid: Sequence[int], threads: int, arguments: Sequence[int], memory: Memory) -> set[str]:
        """Launch the kernel.

        Args:
            grid: Number of blocks along up to three axes. All blocks run at the same time.
            threads: Number of threads in each block.
            arguments: Bits of the kernel's parameters. Missing ones at the end are poison.
            memory: Memory that pointers among the arguments point to.

        Returns:
            A description of each race.
        """
        with np.errstate(all="ignore"):
            return _Launch(self, grid, threads, arguments, memory).run()


# --- Memory -----------------------------------------------------------------------------------------------------------


class Memory:
    """Arrays of bytes at their addresses. The space between them cannot be accessed."""

    def __init__(self, segments: Mapping[int, NDArray[np.uint8]]) -> None:
        self._segments = dict(segments)
        if any(begin % 16 for begin in self._segments):
            raise ValueError("a segment must begin at a multiple of 16")

    def _cells(self, address: Array, kind: type[np.generic]) -> list[tuple[Array, Array, Array]]:
        """For each segment: its numbers, which of the addresses lie in it, and at which index."""
        size = np.dtype(kind).itemsize
        cells = []
        found = 0
        for begin, data in self._segments.items():
            mine = np.flatnonzero((address >= begin) & (address <= begin + len(data) - size))
            if len(mine):
                found += len(mine)
                cells.append((data[: len(data) // size * size].view(kind), mine, (address[mine] - begin) // size))
        if found != len(address):
            raise Fault("an address outside of all memory")
        return cells

    def load(self, address: Array, kind: type[np.generic]) -> Array:
        """The numbers at (n,) addresses, which are multiples of the number's size."""
        value = np.empty(len(address), kind)
        for data, mine, index in self._cells(address, kind):
            value[mine] = data[index]
        return value

    def store(self, address: Array, value: Array) -> None:
        for data, mine, index in self._cells(address, value.dtype.type):
            data[index] = value[mine]


class Races:
    """The readers and writers of each cell of shared memory since the last barrier.

    A race is a cell that one warp writes and another one reads or writes, without a barrier between. A write that does
    not change the cell is no race: compilers let several warps store the same value.
    """

    _NOBODY, _SEVERAL = -1, -2  # otherwise the number of the only warp

    def __init__(self, cells: int) -> None:
        self.found: set[str] = set()
        self._readers = np.full(cells, self._NOBODY)
        self._writers = np.full(cells, self._NOBODY)

    def read(self, cell: Array, warp: Array, text: str) -> None:
        """Record that (n,) warps read (n,) cells."""
        if self._others(self._writers, cell, warp).any():
            self.found.add(f"read after another warp's write: {text}")
        self._note(self._readers, cell, warp)

    def write(self, cell: Array, warp: Array, changed: Array, disputed: Array, text: str) -> None:
        """Record that (n,) warps write (n,) cells. A write that changes nothing counts only if the warps disagree."""
        for earlier, name in ((self._readers, "read"), (self._writers, "write")):
            if (self._others(earlier, cell, warp) & changed).any():
                self.found.add(f"write after another warp's {name}: {text}")
        if (self._note(self._writers, cell, warp) & disputed).any():
            self.found.add(f"write with another warp's write: {text}")

    def barrier(self, cells: slice) -> None:
        self._readers[cells] = self._NOBODY
        self._writers[cells] = self._NOBODY

    def _others(self, known: Array, cell: Array, warp: Array) -> Array:
        who = known[cell]
        other: Array = (who != warp) & (who != self._NOBODY)
        return other

    def _note(self, known: Array, cell: Array, warp: Array) -> Array:
        """Note the warps at the cells, and return which cells now belong to several warps."""
        known[cell] = np.where(self._others(known, cell, warp), self._SEVERAL, warp)
        # Several warps may have noted themselves at once, of which the last one stays.
        several = known[cell] != warp
        known[cell[several]] = self._SEVERAL
        shared: Array = known[cell] == self._SEVERAL
        return shared


# --- Arithmetic -------------------------------------------------------------------------------------------------------


def _fused(first: Array, second: Array, third: Array) -> Array:
    """``first * second + third``, rounded once. A longer type is used, so a second rounding to this type remains.

    For float64 the longer type has 11 more bits on x86, enough to distinguish a fused operation from two operations.
    """
    wide = np.longdouble if first.dtype == np.float64 else np.float64
    result: Array = (np.multiply(first, second, dtype=wide) + third).astype(first.dtype)
    return result


def _shifted_left(value: Array, amount: Array) -> Array:
    """Shift. Beyond the width PTX fills with zeros, whereas C and numpy leave the result undefined."""
    bits = value.dtype.itemsize * 8
    moved: Array = value << np.minimum(amount, bits - 1).astype(value.dtype)
    return moved if np.all(amount < bits) else np.where(amount < bits, moved, value.dtype.type(0))


def _shifted_right(value: Array, amount: Array) -> Array:
    bits = value.dtype.itemsize * 8
    moved: Array = value >> np.minimum(amount, bits - 1).astype(value.dtype)
    return moved if value.dtype.kind == "i" else np.where(amount < bits, moved, value.dtype.type(0))


def _bit_field(value: Array, first: Array, length: Array) -> Array:
    """``length`` bits from ``first`` on, sign-extended if the type is signed."""
    bits = value.dtype.itemsize * 8
    if (first + length > bits).any():
        raise Unknown("bits beyond the last one")
    return _shifted_right(_shifted_left(value, bits - first - length), bits - length)


class _Rule(NamedTuple):
    """An instruction that computes from each thread's registers. Types are its own (=), twice as wide (+), or named."""

    function: Callable[..., Any]
    sources: str
    result: str = "="


_RULES: dict[str, _Rule] = {
    "add": _Rule(np.add, "= ="),
    "add.rn": _Rule(np.add, "= ="),
    "sub": _Rule(np.subtract, "= ="),
    "sub.rn": _Rule(np.subtract, "= ="),
    "mul": _Rule(np.multiply, "= ="),
    "mul.rn": _Rule(np.multiply, "= ="),
    "mul.lo": _Rule(np.multiply, "= ="),
    "mul.wide": _Rule(lambda a, b: np.multiply(a, b, dtype=_wider(a.dtype)), "= =", "+"),
    "mad.lo": _Rule(lambda a, b, c: a * b + c, "= = ="),
    "mad.wide": _Rule(lambda a, b, c: np.multiply(a, b, dtype=c.dtype) + c, "= = +", "+"),
    "fma.rn": _Rule(_fused, "= = ="),
    "div.rn": _Rule(np.divide, "= ="),
    "rem": _Rule(np.fmod, "= ="),
    "min": _Rule(np.fmin, "= ="),  # of a number and NaN, the number
    "max": _Rule(np.fmax, "= ="),
    "neg": _Rule(np.negative, "="),
    "abs": _Rule(np.abs, "="),
    "abs.ftz": _Rule(np.abs, "="),
    "sqrt.rn": _Rule(np.sqrt, "="),
    "sqrt.approx.ftz": _Rule(np.sqrt, "="),
    "rsqrt.approx": _Rule(lambda a: 1 / np.sqrt(a), "="),
    "rcp.approx.ftz": _Rule(lambda a: 1 / a, "="),
    "and": _Rule(np.bitwise_and, "= ="),
    "or": _Rule(np.bitwise_or, "= ="),
    "xor": _Rule(np.bitwise_xor, "= ="),
    "not": _Rule(np.invert, "="),
    "shl": _Rule(_shifted_left, "= u32"),
    "shr": _Rule(_shifted_right, "= u32"),
    "bfe": _Rule(_bit_field, "= u32 u32"),
    "popc": _Rule(np.bitwise_count, "=", "u32"),
    "selp": _Rule(lambda a, b, chosen: np.where(chosen, a, b), "= = pred"),
    "setp.eq": _Rule(np.equal, "= =", "pred"),
    "setp.ne": _Rule(lambda a, b: (a < b) | (a > b), "= =", "pred"),  # False for NaN
    "setp.lt": _Rule(np.less, "= =", "pred"),
    "setp.le": _Rule(np.less_equal, "= =", "pred"),
    "setp.gt": _Rule(np.greater, "= =", "pred"),
    "setp.ge": _Rule(np.greater_equal, "= =", "pred"),
    "setp.equ": _Rule(lambda a, b: ~((a < b) | (a > b)), "= =", "pred"),
    "setp.neu": _Rule(np.not_equal, "= =", "pred"),
    "setp.ltu": _Rule(lambda a, b: ~(a >= b), "= =", "pred"),
    "setp.leu": _Rule(lambda a, b: ~(a > b), "= =", "pred"),
    "setp.gtu": _Rule(lambda a, b: ~(a <= b), "= =", "pred"),
    "setp.geu": _Rule(lambda a, b: ~(a < b), "= =", "pred"),
}
_MATRIX = ["sync", "aligned", "m8n8"]
_SHAPES = {"m8n8k4": (8, 4), "m16n8k16": (16, 16)}  # rows and depth of float64 products
_REDUCTIONS: dict[str, np.ufunc] = {"max": np.maximum, "min": np.minimum, "add": np.add}


def _wider(kind: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(f"{kind.kind}{kind.itemsize * 2}")


def _rounded_to_bf16(value: Array) -> Array:
    """Bits of bfloat16 from bits of float32, rounded to nearest, ties to even; NaN stays NaN."""
    bits = value.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(value), np.uint32(0x7FFF), rounded).astype(np.uint16)


def _converted(sources: Sequence[Array], to: str, origin: str) -> Array:
    """Convert one number, or the two of a pair (the upper one first), to type ``to``."""
    if to == "bf16x2" and origin == "f32":
        upper, lower = (_rounded_to_bf16(source).astype(np.uint32) for source in sources)
        return upper << np.uint32(16) | lower
    (source,) = sources
    if to == "bf16" and origin == "f32":
        return _rounded_to_bf16(source)
    if origin == "bf16":
        source = (source.astype(np.uint32) << np.uint32(16)).view(np.float32)
    elif origin.startswith("f") and not to.startswith("f"):
        raise Unknown(f"conversion of {origin} to {to}")
    if "bf16" in to:
        raise Unknown(f"conversion of {origin} to {to}")
    return source.astype(_TYPES[to])


# --- Execution --------------------------------------------------------------------------------------------------------


class _Jump(NamedTuple):
    target: int
    guard: Callable[[], Array] | None

    def taken(self, active: Array) -> Array:
        return active if self.guard is None else active & self.guard()


class _Launch:
    """Registers and memory of all threads, with the program: numpy runs each instruction for all threads at once.

    A register is an array over the threads of all blocks, block after block.
    """

    def __init__(
        self, program: Program, grid: Sequence[int], threads: int, arguments: Sequence[int], memory: Memory
    ) -> None:
        if threads % LANES:
            raise ValueError("blocks consist of whole warps")
        self.program, self.threads, self.memory = program, threads, memory
        blocks = int(np.prod(grid))
        self.count = blocks * threads
        self.everyone = np.arange(self.count)
        thread = self.everyone.astype(np.uint32)
        self.lane = thread % LANES
        self.warp_begin = (thread - self.lane).astype(np.intp)
        self.warp = (thread % threads // LANES).astype(np.intp)
        block = thread // threads
        axes = np.unravel_index(block, tuple(grid), order="F")
        self.constants = {f"%ctaid.{'xyz'[axis]}": at.astype(np.uint32) for axis, at in enumerate(axes)}
        for axis, size in zip("xyz", grid, strict=False):
            self.constants[f"%nctaid.{axis}"] = np.full(self.count, size, np.uint32)
        self.constants["%tid.x"] = thread % threads
        self.arguments = dict(zip(program.parameters, arguments, strict=False))
        self.registers: dict[str, Array] = {}

        # All blocks one after the other in one array. Races are detected in units of the smallest accessed size.
        self.pitch = -(-program.shared // 16) * 16
        self.shared = Memory({0: np.full(blocks * self.pitch, 0xFF, np.uint8)})
        self.shared_begin = block.astype(np.int64) * self.pitch
        accesses = [i for i in program.instructions if ".shared" in i.opcode]
        self.granule = min((np.dtype(_TYPES[i.types[-1]]).itemsize for i in accesses), default=16)
        self.races = Races(blocks * self.pitch // self.granule)
        self.draw = np.random.default_rng(0)

        self.code = [self._bound(instruction) for instruction in program.instructions]

    def run(self) -> set[str]:
        end = len(self.code)
        waiting: dict[int, Array] = {0: np.ones(self.count, bool)}  # threads by program counter
        while waiting:
            counter = min(waiting)
            mask = waiting.pop(counter)
            active: Active = True if mask.all() else mask
            meeting = min(waiting, default=end)
            going_on = mask
            while counter < meeting:
                step = self.code[counter]
                counter += 1
                if isinstance(step, _Jump):
                    taken = step.taken(mask)
                    going_on = mask & ~taken
                    if taken.any() and step.target < end:
                        waiting[step.target] = waiting.get(step.target, False) | taken
                    break
                step(active)
            if going_on.any() and counter < end:
                waiting[counter] = waiting.get(counter, False) | going_on
        return self.races.found

    # Operands

    def _register(self, name: str) -> Array:
        """(threads,) bits of a register, unsigned."""
        if name not in self.registers:
            kind = self.program.registers.get(name) or self.program.registers.get(name.rstrip("0123456789"))
            if kind is None:
                raise Unknown(f"operand {name}")
            made = np.full(self.count, 1, bool) if kind == "pred" else np.full(self.count, -1, f"i{int(kind[1:]) // 8}")
            self.registers[name] = made if kind == "pred" else made.view(f"u{made.itemsize}")
        return self.registers[name]

    def _source(self, name: str, kind: str) -> Array:
        """(threads,) values of a register, or a () constant."""
        dtype = np.dtype(_TYPES[kind])
        if name in self.constants:
            return self.constants[name].view(dtype)
        if name == "global_smem":
            return np.zeros((), dtype)
        literal = _LITERAL.fullmatch(name)
        if literal is None:
            register = self._register(name)
            if register.dtype.itemsize != dtype.itemsize:
                raise Unknown(f"{name} as {kind}")
            return register.view(dtype)
        bits = int(literal[2], 16) if literal[1] else int(literal[2], 0)
        if kind == "pred":
            return np.array(bool(bits))
        width = dtype.itemsize * 8
        return np.array(bits % (1 << width), f"u{dtype.itemsize}").view(dtype)

    def _target(self, name: str, kind: str) -> Array:
        """(threads,) registers to write to. A value is sign-extended if the register is wider than a signed type."""
        register = self._register(name)
        dtype = np.dtype(_TYPES[kind])
        return register.view(dtype if dtype.itemsize == register.itemsize else f"{dtype.kind}{register.itemsize}")

    # Instructions

    def _bound(self, instruction: Instruction) -> Step | _Jump:
        """The function for an instruction, and its registers."""
        try:
            guard = self._guard(instruction.guard)
            if instruction.opcode in ("bra", "bra.uni"):
                return _Jump(self.program.labels[instruction.operands[0]], guard)
            if instruction.opcode == "ret":
                return _Jump(len(self.program.instructions), guard)
            step = self._step(instruction)
        except Unknown as error:
            raise Unknown(f"not emulated: {instruction.text} ({error})") from error
        if guard is None:
            return step
        chosen = guard
        return lambda active: step(active & chosen())

    def _guard(self, name: str | None) -> Callable[[], Array] | None:
        if name is None:
            return None
        predicate = self._register(name.lstrip("!"))
        return (lambda: ~predicate) if name.startswith("!") else (lambda: predicate)

    def _step(self, instruction: Instruction) -> Step:
        words = instruction.opcode.split(".")
        if instruction.opcode in _RULES:
            return self._rule(instruction, _RULES[instruction.opcode])
        if words[0] in ("ld", "st") and words[1] in ("global", "shared") and words[2:] in ([], ["v2"], ["v4"]):
            return self._load(instruction) if words[0] == "ld" else self._store(instruction)
        if words[:4] in (["ldmatrix", *_MATRIX], ["stmatrix", *_MATRIX]):
            return self._matrix(instruction, stored=words[0] == "stmatrix", turned="trans" in words)
        if (
            words[0] == "mma"
            and words[3] in _SHAPES
            and words[4:] == ["row", "col"]
            and set(instruction.types) == {"f64"}
        ):
            return self._product(instruction, *_SHAPES[words[3]])
        if words[:2] == ["shfl", "sync"] and words[2] in ("bfly", "idx"):
            return self._shuffle(instruction, words[2] == "bfly")
        if words[:2] == ["redux", "sync"] and words[2] in _REDUCTIONS:
            return self._reduction(instruction, _REDUCTIONS[words[2]])
        others = {
            "mov": self._move,
            "cvt": self._conversion,
            "cvt.rn": self._conversion,
            "ld.param": self._parameter,
            "bar.sync": self._barrier,
            "bar.warp.sync": self._warp_barrier,
        }
        if instruction.opcode not in others:
            raise Unknown(f"opcode {instruction.opcode}")
        return others[instruction.opcode](instruction)

    def _rule(self, instruction: Instruction, rule: _Rule) -> Step:
        own = instruction.types[0]
        named = {"=": own, "+": f"{own[0]}{2 * int(own[1:])}" if own != "pred" else own}
        target = self._target(instruction.operands[0], named.get(rule.result, rule.result))
        kinds = [named.get(kind, kind) for kind in rule.sources.split()]
        sources = [self._source(name, kind) for name, kind in zip(instruction.operands[1:], kinds, strict=True)]
        function = rule.function
        if isinstance(function, np.ufunc):
            return lambda active: function(*sources, out=target, where=active)
        return lambda active: np.copyto(target, function(*sources), where=active)

    def _move(self, instruction: Instruction) -> Step:
        """Move from register to register, or between a register and its halves, the lower one first."""
        kind = instruction.types[0]
        targets, sources = instruction.vector(0), instruction.vector(1)
        if len(targets) == len(sources) == 1:
            target, source = self._target(targets[0], kind), self._source(sources[0], kind)
            return lambda active: np.copyto(target, source, where=active)
        part = f"b{int(kind[1:]) // max(len(targets), len(sources))}"
        whole = self._target(targets[0], kind) if len(targets) == 1 else self._source(sources[0], kind)
        parts = whole.view(_TYPES[part]).reshape(self.count, -1)
        if len(targets) == 1:
            pairs = [(parts[:, at], self._source(name, part)) for at, name in enumerate(sources)]
        else:
            wanted = [(at, name) for at, name in enumerate(targets) if name != "_"]
            pairs = [(self._target(name, part), parts[:, at]) for at, name in wanted]

        def step(active: Active) -> None:
            for target, source in pairs:
                np.copyto(target, source, where=active)

        return step

    def _conversion(self, instruction: Instruction) -> Step:
        to, origin = instruction.types
        target = self._target(instruction.operands[0], to)
        sources = [self._source(name, origin) for name in instruction.operands[1:]]
        _converted(sources, to, origin)  # raises now if the opcode is not supported
        return lambda active: np.copyto(target, _converted(sources, to, origin), where=active)

    def _parameter(self, instruction: Instruction) -> Step:
        kind = instruction.types[0]
        target = self._target(instruction.operands[0], kind)
        bits = self.arguments.get(instruction.operands[1].strip("[] "), -1)
        value = np.array(bits % (1 << 64), np.uint64).astype(f"u{np.dtype(_TYPES[kind]).itemsize}").view(_TYPES[kind])
        return lambda active: np.copyto(target, value, where=active)

    def _load(self, instruction: Instruction) -> Step:
        targets = [self._target(name, instruction.types[0]) for name in instruction.vector(0)]
        access = self._access(instruction, instruction.operands[1], len(targets))

        def step(active: Active) -> None:
            threads, addresses = access(active)
            for target, value in zip(targets, self._loaded(instruction, threads, addresses), strict=True):
                target[threads] = value

        return step

    def _store(self, instruction: Instruction) -> Step:
        kind = _TYPES[instruction.types[0]]
        names = instruction.vector(1)
        # The stored value may be the lower part of a register.
        sources = [
            self._register(name) if name.startswith("%") else self._source(name, instruction.types[0]) for name in names
        ]
        access = self._access(instruction, instruction.operands[0], len(sources))

        def step(active: Active) -> None:
            threads, addresses = access(active)
            values = [np.broadcast_to(source, self.count)[threads].astype(kind) for source in sources]
            self._put(instruction, threads, addresses, np.stack(values))

        return step

    def _access(self, instruction: Instruction, operand: str, length: int) -> Callable[[Active], tuple[Array, Array]]:
        """Active threads, and (length, threads) addresses of the vector's elements."""
        size = np.dtype(_TYPES[instruction.types[0]]).itemsize
        shared = ".shared" in instruction.opcode
        base, offset = self._address(operand, shared)
        offsets = (offset + size * np.arange(length))[:, None]

        def access(active: Active) -> tuple[Array, Array]:
            threads = self._threads(active)
            addresses = np.broadcast_to(base, self.count)[threads].astype(np.int64) + offsets
            if (addresses[0] % (size * length)).any():
                raise Fault(f"address not aligned: {instruction.text}")
            return threads, addresses

        return access

    def _address(self, operand: str, shared: bool) -> tuple[Array, int]:
        """Register or constant, plus an offset."""
        match = _ADDRESS.fullmatch(operand)
        if match is None:
            raise Unknown(f"address {operand}")
        return self._source(match[1], "u32" if shared else "u64"), int(match[2] or 0)

    def _threads(self, active: Active) -> Array:
        return self.everyone if active is True else np.flatnonzero(active)

    def _loaded(self, instruction: Instruction, threads: Array, addresses: Array) -> Array:
        """Load from (k, threads) addresses, in the memory and with the type that the instruction names."""
        kind = _TYPES[instruction.types[0]]
        if ".shared" not in instruction.opcode:
            found: Array = self._tried(instruction, self.memory.load, addresses.reshape(-1), kind)
            return found.reshape(addresses.shape)
        where, cell, warp = self._in_blocks(instruction, threads, addresses)
        self.races.read(cell, warp, instruction.text)
        return self.shared.load(where, kind).reshape(addresses.shape)

    def _put(self, instruction: Instruction, threads: Array, addresses: Array, values: Array) -> None:
        """Store (k, threads) values. If several go to one address, PTX does not define which stays, so one is drawn."""
        values = values.reshape(-1)
        if ".shared" not in instruction.opcode:
            self._tried(instruction, self.memory.store, addresses.reshape(-1), values)
            return
        where, cell, warp = self._in_blocks(instruction, threads, addresses)
        order = self.draw.permutation(len(where))
        changed = self.shared.load(where, values.dtype.type) != values
        self.shared.store(where[order], values[order])
        disputed = self.shared.load(where, values.dtype.type) != values
        parts = values.itemsize // self.granule
        self.races.write(cell, warp, np.repeat(changed, parts), np.repeat(disputed, parts), instruction.text)

    def _tried(self, instruction: Instruction, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run an instruction and return its result. Errors name the instruction."""
        try:
            return function(*arguments)
        except Fault as error:
            raise Fault(f"{error}: {instruction.text}") from error

    def _in_blocks(self, instruction: Instruction, threads: Array, addresses: Array) -> tuple[Array, Array, Array]:
        """For (k, threads) addresses of shared memory: index into the memory of all blocks, cells, and warps."""
        size = np.dtype(_TYPES[instruction.types[0]]).itemsize
        if ((addresses < 0) | (addresses > self.program.shared - size)).any():
            raise Fault(f"outside of shared memory: {instruction.text}")
        where = (addresses + self.shared_begin[threads]).reshape(-1)
        warp = np.tile(self.warp[threads], len(addresses))
        parts = size // self.granule
        if parts == 1:
            return where, where // self.granule, warp
        cell = (where // self.granule)[:, None] + np.arange(parts)
        return where, cell.reshape(-1), np.repeat(warp, parts)

    def _matrix(self, instruction: Instruction, stored: bool, turned: bool) -> Step:
        """Move 8 x 8 matrices of 16-bit elements between shared memory and a warp.

        Row r of matrix m is 16 bytes at the address that lane 8 m + r holds. For each matrix, a lane has a register
        with two neighbours in a row (in a column if transposed).
        """
        names = instruction.vector(1 if stored else 0)
        registers = [self._register(name).view(np.uint16).reshape(self.count, 2) for name in names]
        access = self._access(instruction, instruction.operands[0 if stored else 1], 8)  # aligned 16 bytes
        lane = self.lane.astype(np.intp)

        def step(active: Active) -> None:
            self._together(active, LANES, instruction)
            threads, addresses = access(active)
            rows = np.zeros((self.count, 8), np.int64)
            rows[threads] = addresses.T
            for matrix, register in enumerate(registers):
                for half in range(2):
                    row, column = lane // 4, lane % 4 * 2 + half
                    if turned:
                        row, column = column, row
                    address = rows[self.warp_begin + 8 * matrix + row, column][threads][None]
                    if stored:
                        self._put(instruction, threads, address, register[threads, half])
                    else:
                        register[threads, half] = self._loaded(instruction, threads, address)[0]

        return step

    def _product(self, instruction: Instruction, rows: int, depth: int) -> Step:
        """(rows, depth) @ (depth, 8) + (rows, 8) in float64, distributed over a warp as PTX defines."""
        group, place = np.divmod(np.arange(LANES), 4)
        bands = rows // 8

        def fragment(count: int, row: Callable[[int], Array], column: Callable[[int], Array]) -> tuple[Array, Array]:
            """Row and column of each register (first axis) in each lane (second axis)."""
            return np.stack([row(i) for i in range(count)]), np.stack([column(i) for i in range(count)])

        left = fragment(rows * depth // LANES, lambda i: group + i % bands * 8, lambda i: place + i // bands * 4)
        right = fragment(depth * 8 // LANES, lambda i: place + i * 4, lambda i: group)
        result = fragment(rows * 8 // LANES, lambda i: group + i // 2 * 8, lambda i: place * 2 + i % 2)
        targets = [self._target(name, "f64") for name in instruction.vector(0)]
        sources = [[self._source(name, "f64") for name in instruction.vector(at)] for at in (1, 2, 3)]

        def whole(parts: list[Array], where: tuple[Array, Array], shape: tuple[int, int]) -> Array:
            """(warps, *shape) from registers."""
            matrix = np.empty((self.count // LANES, *shape))
            matrix[:, *where] = np.stack(parts).reshape(len(parts), -1, LANES).swapaxes(0, 1)
            return matrix

        def step(active: Active) -> None:
            self._together(active, LANES, instruction)
            a = whole(sources[0], left, (rows, depth))
            b = whole(sources[1], right, (depth, 8))
            total = (a @ b + whole(sources[2], result, (rows, 8)))[:, *result]
            for at, target in enumerate(targets):
                np.copyto(target, total[:, at].reshape(-1), where=active)

        return step

    def _shuffle(self, instruction: Instruction, butterfly: bool) -> Step:
        """Each lane gets the number of another lane in its warp."""
        name, origin, other, *clamp = instruction.operands
        if clamp != ["31", "-1"]:
            raise Unknown("shuffle within a part of a warp")
        target, source, chosen = self._target(name, "b32"), self._source(origin, "b32"), self._source(other, "u32")

        def step(active: Active) -> None:
            self._together(active, LANES, instruction)
            lane = (self.lane ^ chosen if butterfly else chosen) % LANES
            np.copyto(target, source[self.warp_begin + lane], where=active)

        return step

    def _reduction(self, instruction: Instruction, function: np.ufunc) -> Step:
        kind = instruction.types[0]
        target, source = self._target(instruction.operands[0], kind), self._source(instruction.operands[1], kind)

        def step(active: Active) -> None:
            self._together(active, LANES, instruction)
            np.copyto(target, np.repeat(function.reduce(source.reshape(-1, LANES), axis=1), LANES), where=active)

        return step

    def _barrier(self, instruction: Instruction) -> Step:
        if instruction.operands != ("0",):
            raise Unknown("barrier of a part of a block")

        def step(active: Active) -> None:
            self._together(active, self.threads, instruction)
            present = np.broadcast_to(np.asarray(active), self.count)[:: self.threads]
            cells = self.pitch // self.granule
            for block in np.flatnonzero(present):
                self.races.barrier(slice(block * cells, (block + 1) * cells))

        return step

    def _warp_barrier(self, instruction: Instruction) -> Step:
        """Nothing to wait for, because the lanes of a warp take every step together."""
        if instruction.operands != ("-1",):
            raise Unknown("barrier of a part of a warp")
        return lambda active: self._together(active, LANES, instruction)

    def _together(self, active: Active, size: int, instruction: Instruction) -> None:
        """Check that, in each warp or block, either all threads take part or none."""
        if active is not True:
            groups = active.reshape(-1, size)
            if (groups.any(axis=1) != groups.all(axis=1)).any():
                raise Fault(f"not reached by all threads that take part: {instruction.text}")
