"""Building blocks of kernels written directly as TIR: the function frame, vector arithmetic, and loop nests over strided views.

A kernel body is a Python function of an `Emitter`; each call in it appends statements. Vectors are TIR expressions with `lanes` elements,
scalars the case `lanes == 1`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import tvm_ffi
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.numerics.arithmetic import limits
from qcompiler.schedules import avx2
from qcompiler.schedules.table import Kernel, Layout, OpCall, kernel_key, once, written

GRAIN = 50_000  # elements of elementwise work that are worth a task of their own
BLOCK = 256  # GPU threads per block

# -- the function frame --------------------------------------------------------------------------------------------------------------------


@dataclass
class Emitter:
    """A kernel while it is written. `inputs` and `arrays` (constants) are flat buffers; `width` is the vector width in bytes; `avx2`: the target has AVX2;
    `armv7`: it is a 32-bit Arm.

    On a GPU `task` is the number of a thread, `tasks` counts all threads of the launch, `group` and `thread` are the indices of the block and of
    the thread in it, and code is scalar (`width` is 1).
    """

    op: OpCall
    task: Any
    tasks: int
    inputs: list[Any]
    arrays: list[Any]
    output: Any  # the first one
    width: int
    _scalars: Any
    group: Any = None
    thread: Any = None
    avx2: bool = False
    armv7: bool = False
    scratch: Any = None  # int32 words
    counters: Any = None  # int32 words
    outputs: list[Any] = field(default_factory=list)  # all; one, but for tails
    values: list[int] = field(default_factory=list)

    @property
    def gpu(self) -> bool:
        return self.thread is not None

    def i32(self, value: int) -> Any:
        """An int32 scalar that lies in the kernel's constants, so that code does not depend on it."""
        self.values.append(int(value))
        return T.bind(self._scalars[len(self.values) - 1])

    def f32_or_none(self, value: float | None) -> Any:
        return None if value is None else self.f32(value)

    def f32(self, value: float) -> Any:
        """A float32 scalar that lies in the kernel's constants (its bits, in the int32 array)."""
        self.values.append(int(np.float32(value).view(np.int32)))
        return T.bind(T.reinterpret("float32", self._scalars[len(self.values) - 1]))

    def operands(self) -> list[View]:
        """A view of each operand, in the operator's order; constants are read from `arrays`, in order."""
        inputs, arrays, views = iter(self.inputs), iter(self.arrays), []
        for operand in self.op.operands:
            if isinstance(operand, Layout):
                views.append(view(next(inputs), operand))
            else:
                views.append(view(next(arrays), Layout(operand.shape, str(operand.dtype))))
        return views


def make_kernel(
    row: str,
    op: OpCall,
    target: Target,
    emit: Callable[[Emitter], None],
    *,
    tasks: int = 1,
    arrays: Sequence[np.ndarray] = (),
    macs: int = 0,
    threads: int = 0,
    block: int = BLOCK,
    params: Mapping[str, Any] | None = None,
    scratch: int = 0,
    counters: int = 0,
    facts: object = None,
) -> Kernel:
    """The kernel whose body `emit` writes: `func(task, inputs..., arrays..., scalars, outputs...)`. Its key is a hash of the code itself.
    `scratch`: bytes that all tasks share, one more pointer after the output; `counters`: see `Kernel`. `facts`: all that decides code and scalars beside the
    row, attributes, layouts and sizes of arrays; where given, equal code is written once: constants are packed again and again.

    On a GPU there is no `task` argument, and at least `threads` threads (0: one for 4 elements of the output) run in blocks of `block`.
    """
    launch = (max(1, -(-(threads or -(-op.output.elements // 4)) // block)), block) if target.gpu else None
    tasks = launch[0] * block if launch else max(1, tasks)

    def code() -> tuple[Any, list[int], str]:
        with IRBuilder() as builder:
            with T.prim_func(s_tir=True, is_private=True):
                T.func_attr({"tirx.noalias": True})
                task = None if launch else T.arg("task", T.int32())
                pointers = [T.arg(f"x{i}", T.handle()) for i in range(len(op.tensors))]
                constants = [T.arg(f"c{i}", T.handle()) for i in range(len(arrays))]
                scalars, outs = T.arg("scalars", T.handle()), [T.arg(f"out{i or ''}", T.handle()) for i in range(len(op.written))]
                extra = [(T.arg(name, T.handle()), size) if size else None for name, size in (("scratch", scratch // 4), ("counters", counters))]
                memory, zeros = (flat(*e, "int32") if e else None for e in extra)
                inputs = [flat(p, layout.elements, layout.dtype) for p, layout in zip(pointers, op.tensors, strict=True)]
                packed = [flat(p, a.size, str(a.dtype)) for p, a in zip(constants, arrays, strict=True)]
                outputs = [flat(p, layout.elements, layout.dtype) for p, layout in zip(outs, op.written, strict=True)]
                with threads_of(*launch) if launch else nullcontext((task, None, None)) as (number, group, thread):
                    numbers, width = flat(scalars, 64, "int32"), vector_bytes(target)
                    isa = has_avx2(target), target.architecture == "armv7a"
                    emitter = Emitter(op, number, tasks, inputs, packed, outputs[0], width, numbers, group, thread, *isa, memory, zeros, outputs)
                    emit(emitter)
        func = builder.get()
        return func, emitter.values or [0], kernel_key(row, tvm_ffi.structural_hash(func), tasks, emitter.width)

    func, values, key = code() if facts is None else once((row, op, target, tasks, launch, scratch, counters, facts), arrays, code)
    constants = [np.ascontiguousarray(a) for a in arrays] + [np.array(values, np.int32)]
    return Kernel(written(func), 0 if launch else tasks, constants, key, row, scratch, macs, dict(params or {}), launch, counters)


@contextmanager
def threads_of(blocks: int, block: int) -> Iterator[tuple[Any, Any, Any]]:
    """A launch of `blocks` blocks; yields the number of a thread among all, the index of its block, and its index in the block."""
    with T.launch_thread("blockIdx.x", blocks) as b, T.launch_thread("threadIdx.x", block) as t:
        yield T.bind(b * block + t), T.bind(b + 0), T.bind(t + 0)


def aligned_frame(value: Any, lanes: int, store_at: Any, load_at: Any) -> Any:
    """`value` (int32), handed through a vector of `lanes` on the stack, so that LLVM aligns the frame to vectors. Both indices are 0 when the kernel runs.

    LLVM spills vectors to aligned slots only in functions that had an aligned stack variable before register allocation (it reserves a frame
    pointer then). Without one, reloads of spilled vectors straddle cache lines, which costs 5x5 depthwise kernels a quarter of their speed. Two
    indices that LLVM can't know to be equal keep the variable alive.
    """
    slot = T.alloc_buffer((2,), f"int32x{lanes}")
    T.buffer_store(slot, T.broadcast(value, lanes), [store_at])
    return T.bind(tirx.Shuffle([slot[load_at]], [tirx.const(0, "int32")]))


def flat(pointer: Any, elements: int, dtype: str) -> Any:
    return T.decl_buffer((max(elements, 1),), dtype, data=pointer)


def vector_bytes(target: Target) -> int:
    """Bytes of the widest vector worth using on a target: 64, 32 or 16; 1 on a GPU, whose threads are scalar."""
    if target.gpu:
        return 1
    return 64 if "avx512bw" in target.features else 32 if "avx2" in target.features else 16


def has_avx2(target: Target) -> bool:
    return "avx2" in target.features or "avx512bw" in target.features


def task_count(work: int, limit: int, grain: int = GRAIN) -> int:
    """How many tasks to make of `work` elements when at most `limit` are possible."""
    return max(1, min(limit, work // grain, 64))


# -- vectors -------------------------------------------------------------------------------------------------------------------------------


def vector(dtype: str, lanes: int) -> str:
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def cast(dtype: str, value: Any, lanes: int) -> Any:
    return T.Cast(vector(dtype, lanes), value)


def splat(value: Any, lanes: int) -> Any:
    return value if lanes == 1 else T.broadcast(value, lanes)


def load(buffer: Any, index: Any, lanes: int, stride: int = 1) -> Any:
    """`lanes` elements from `index` on; stride 0 repeats one element."""
    if lanes == 1:
        return buffer[index]
    return T.broadcast(buffer[index], lanes) if stride == 0 else buffer[T.ramp(index, stride, lanes)]


def store(buffer: Any, index: Any, value: Any, lanes: int) -> None:
    T.buffer_store(buffer, value, [index if lanes == 1 else T.ramp(index, 1, lanes)])


def prefetch(buffer: Any, index: Any) -> None:
    """Asks a CPU for the cache line of an element that is read soon; nothing happens where there is none."""
    read, all_levels, data = (tirx.const(v, "int32") for v in (0, 3, 1))
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(buffer[index]), read, all_levels, data))


def accumulator(lanes: int, dtype: str = "int32") -> Any:
    """A local vector that LLVM keeps in registers, as every index into it is a constant."""
    return T.alloc_buffer((lanes,), dtype)


def offset_of(dtype: str) -> int:
    """What storage of this type adds to a canonical value."""
    return 128 if dtype == "uint8" else 0


def canonical(dtype: str) -> str:
    """The type of the numbers that are stored as `dtype`."""
    return "int8" if dtype == "uint8" else dtype


def recode(value: Any, source: str, target: str, lanes: int) -> Any:
    """An 8-bit vector stored as `source`, as `target` stores it: int8 and uint8 storage differ in the top bit."""
    if source == target:
        return value
    return T.reinterpret(vector(target, lanes), T.bitwise_xor(value, splat(tirx.const(-128 if source == "int8" else 128, source), lanes)))


def centered(value: Any, zero: Any, lanes: int) -> Any:
    """int32 of `stored - zero`, `zero` an int32 scalar that includes the storage offset.

    Of 8-bit values |stored - zero| <= 255, so the difference is taken in int16: LLVM then knows that products of two of them fit its 16-bit multipliers.
    """
    if str(value.ty).startswith("int16"):
        return cast("int32", value, lanes) - splat(zero, lanes)
    return cast("int32", centered_bytes(value, zero, lanes), lanes)


def centered_bytes(value: Any, zero: Any, lanes: int) -> Any:
    """`centered` of 8-bit values, as int16."""
    return cast("int16", value, lanes) - splat(T.Cast("int16", zero), lanes)


def round_word(value: Any, lanes: int) -> Any:
    """An int32 vector whose low 22 bits are those of rint(value), for a float vector with |value| <= 2^21.

    1.5 * 2^23 + v has a unit in the last place of 1, so the addition rounds v to an integer, ties to even, and leaves it in the low
    bits of the mantissa (1.5 * 2^23 = 0x4B400000 has none of them set). `value` comes out of a clamp, so there is no multiplication
    that could be contracted with this addition.
    """
    return T.reinterpret(vector("int32", lanes), value + splat(tirx.const(12582912.0, "float32"), lanes))


def clamp(value: Any, low: Any, high: Any, lanes: int) -> Any:
    """min, then max: a NaN becomes `high` (comparisons with NaN are false, and `min(a, b)` is `a < b ? a : b`). None: no bound."""
    value = value if high is None else T.min(value, splat(high, lanes))
    return value if low is None else T.max(value, splat(low, lanes))


def to_int(k: Emitter, value: Any, low: float, high: float, lanes: int) -> Any:
    """int32 of rint(clip(value, low, high)), ties to even; within 2^31 every machine converts alike."""
    return rounded(k, clamp(value, tirx.const(float(low), "float32"), tirx.const(float(high), "float32"), lanes), lanes)


def rounded(k: Emitter, value: Any, lanes: int) -> Any:
    """int32 of rint(value), ties to even, for |value| < 2^31."""
    return T.call_pure_extern("int32", "__float2int_rn", value) if k.gpu else cast("int32", T.nearbyint(value), lanes)


def float_of_int64(k: Emitter, value: Any) -> Any:
    """float32 of an int64 scalar >= 0, rounded once.

    Armv7 has no instruction for it, and LLVM expects the result of GCC's __floatdisf in a register where that does not return it. There the number is
    shifted to 31 bits, the last of which says whether any bit was lost, so that the conversion of int32 rounds as one of all bits would.
    """
    if not k.armv7:
        return T.bind(T.Cast("float32", value))
    bits = T.bind(T.max(T.int32(33) - T.Cast("int32", tirx.clz(value)), T.int32(0)))
    kept = T.bind(T.shift_right(value, T.Cast("int64", bits)))
    lost = T.Select(T.shift_left(kept, T.Cast("int64", bits)) == value, T.int32(0), T.int32(1))
    power = T.reinterpret("float32", T.shift_left(bits + 127, T.int32(23)))
    return T.bind(T.Cast("float32", T.bind(T.bitwise_or(T.Cast("int32", kept), lost))) * power)


def quotient(k: Emitter, a: Any, b: Any) -> Any:
    """a / b of float32 scalars, correctly rounded."""
    return T.bind(T.call_pure_extern("float32", "__fdiv_rn", a, b) if k.gpu else a / b)


def root(k: Emitter, a: Any) -> Any:
    """The square root of a float32 scalar, correctly rounded."""
    return T.bind(T.call_pure_extern("float32", "__fsqrt_rn", a) if k.gpu else T.sqrt(a))


@dataclass(frozen=True)
class Requantize:
    """The end of an integer kernel: `clip(x, low - z, high - z)`, rounded, plus z, in the output's storage."""

    low: Any
    high: Any
    zero: Any  # z plus the storage offset, as the output's type
    dtype: str
    register: int = 0  # bytes of a register of AVX2 or AVX512
    bounds: tuple[Any, Any] | None = None  # low and high as stored, where clipping may come after rounding

    @staticmethod
    def of(k: Emitter, attrs: Mapping[str, Any], limit: float = math.inf) -> Requantize:
        """From the attributes zero_point, low and high, with the defaults of `qcompiler.numerics.operators`. `limit`: no |x| is greater."""
        dtype, zero_point, offset = k.op.output.dtype, attrs.get("zero_point", 0), offset_of(k.op.output.dtype)
        low, high = limits(canonical(dtype), attrs.get("low"), attrs.get("high"))
        zero = T.bind(T.Cast(dtype, k.i32(zero_point + offset)))
        bounds = tuple(T.bind(T.Cast(dtype, k.i32(int(b) + offset))) for b in (low, high)) if k.avx2 and limit < 2**30 else None
        return Requantize(k.f32(low - zero_point), k.f32(high - zero_point), zero, dtype, k.width if k.avx2 else 0, bounds)

    def store_value(self, scaled: Any, lanes: int) -> Any:
        """The stored vector for a float32 vector that is already multiplied. Bytes (or 16 bits) wrap; the sum is in range by the clamp."""
        if lanes in (8, 16, 32, 64) and lanes <= self.register:
            scaled = T.bind(scaled if self.bounds else clamp(scaled, self.low, self.high, lanes))
            value = T.bind(avx2.narrowed(scaled, T.Cast("int16", self.zero), self.dtype, lanes))
            return clamp(value, *self.bounds, lanes) if self.bounds else value
        return cast(self.dtype, round_word(clamp(scaled, self.low, self.high, lanes), lanes), lanes) + splat(self.zero, lanes)

    def store_word(self, scaled: Any, lanes: int) -> Any:
        """The same in the low byte of an int32 vector (the other bits are anything): for values that are packed into words anyway."""
        return round_word(clamp(scaled, self.low, self.high, lanes), lanes) + splat(T.Cast("int32", self.zero), lanes)

    def __call__(self, acc: Any, multiplier: Any, lanes: int) -> Any:
        """One conversion, one multiplication (`multiplier`: a float32 vector)."""
        return self.store_value(cast("float32", acc, lanes) * multiplier, lanes)


# -- views ---------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """A strided window of a flat buffer; strides and offset in elements, stride 0 repeats."""

    buffer: Any
    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    def window(self, begin: Sequence[int], shape: Sequence[int]) -> View:
        start = self.offset + sum(b * s for b, s in zip(begin, self.strides, strict=True))
        return replace(self, shape=tuple(shape), offset=start)

    def permuted(self, axes: Sequence[int]) -> View:
        return replace(self, shape=tuple(self.shape[a] for a in axes), strides=tuple(self.strides[a] for a in axes))

    def broadcast(self, shape: Sequence[int]) -> View:
        """numpy broadcasting."""
        missing = len(shape) - len(self.shape)
        own = (1,) * missing + self.shape
        strides = (0,) * missing + self.strides
        assert all(d in (1, s) for d, s in zip(own, shape, strict=True)), (self.shape, shape)
        return replace(self, shape=tuple(shape), strides=tuple(0 if d == 1 else s for d, s in zip(own, strides, strict=True)))

    def at(self, index: Sequence[Any]) -> Any:
        """Flat index of an element."""
        total: Any = self.offset
        for i, s in zip(index, self.strides, strict=True):
            if s:
                total = total + i * s
        return total


def dense_strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides, step = [], 1
    for extent in reversed(shape):
        strides.append(step)
        step *= extent
    return tuple(reversed(strides))


def view(buffer: Any, layout: Layout) -> View:
    if layout.dense:
        return View(buffer, layout.dtype, layout.shape, dense_strides(layout.shape))
    height, width = layout.rows
    pitch = layout.channel_pitch
    return View(buffer, layout.dtype, layout.shape, (height * width * pitch, width * pitch, pitch, 1), layout.index(0, 0, 0, 0))


# -- loops ---------------------------------------------------------------------------------------------------------------------------------


def pieces(extent: int, lanes: int) -> list[tuple[int, int, int]]:
    """(first, count, lanes): runs of vectors that cover `extent` elements; the last vector may overlap the one before it."""
    lanes = min(lanes, 1 << (extent.bit_length() - 1))
    count = extent // lanes
    rest = extent - count * lanes
    runs = [(0, count, lanes)]
    if rest:
        last = 1 << (rest - 1).bit_length()
        runs.append((extent - last, 1, last))
    return runs


@contextmanager
def loops(*extents: Any) -> Iterator[list[Any]]:
    """Nested serial loops; an extent may be a pair (begin, end). Loops of extent 1 are left out."""
    with ExitStack() as stack:
        index = []
        for extent in extents:
            begin, end = extent if isinstance(extent, tuple) else (0, extent)
            single = isinstance(begin, int) and isinstance(end, int) and end - begin == 1
            index.append(T.int32(begin) if single else stack.enter_context(T.serial(begin, end)))
        yield index


@contextmanager
def when(condition: Any) -> Iterator[None]:
    """Statements under a condition; None: always."""
    if condition is None:
        yield
    else:
        with T.If(condition), T.Then():
            yield


def share(k: Emitter, extent: int, unit: int = 1) -> Any:
    """This task's part of `extent` loop iterations, as an argument of `loops`; parts are multiples of `unit`."""
    if k.tasks == 1:
        return extent
    units = -(-extent // unit)
    chunk = -(-units // k.tasks) * unit
    begin = T.bind(T.min(k.task * chunk, extent))
    return begin, T.bind(T.min(begin + chunk, extent))


def vectors(extent: int, lanes: int, body: Callable[[Any, int], None]) -> None:
    """`body(start, lanes)` for vectors that cover `extent` elements."""
    for first, count, size in pieces(extent, lanes):
        with loops(count) as (i,):
            body(i * size + first if count > 1 else T.int32(first), size)


def tiles(k: Emitter, extent: int, lanes: int) -> Any:
    """This task's tiles of `lanes` elements, as an argument of `loops`; tile t begins at `min(t * lanes, extent - lanes)`.

    A ragged last tile is moved back, so it overlaps the one before it: both belong to the same task.
    """
    whole, last = extent // lanes, -(-extent // lanes)
    part = share(k, whole)
    if not isinstance(part, tuple):
        return last
    begin, end = part
    return begin, end if last == whole else T.bind(T.Select(T.And(end == whole, begin < end), T.int32(last), end))
