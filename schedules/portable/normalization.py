"""Operators over rows of the last axis: layer and RMS normalization, softmax. A task has rows of its own; vectors run along a row."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.numerics.constants import MAX_NORMALIZED, NORM_BITS, NORM_LIMIT, SOFTMAX, Exponential
from qcompiler.schedules import avx2
from qcompiler.schedules.builder import (
    Emitter,
    Requantize,
    accumulator,
    cast,
    float_of_int64,
    load,
    loops,
    make_kernel,
    offset_of,
    quotient,
    root,
    rounded,
    share,
    splat,
    store,
    task_count,
    to_int,
    vectors,
    view,
)
from qcompiler.schedules.isa import call
from qcompiler.schedules.portable.base import portable
from qcompiler.schedules.portable.elementwise import constants_of
from qcompiler.schedules.portable.threads import unravel
from qcompiler.schedules.table import Kernel, OpCall

GRAIN = 20_000  # elements that are worth a task
LEAST = -(2**15)  # of the numbers that a softmax reads
MAX_CLASSES = 2**16  # of a softmax: the sum of exponentials fits int32


def rows_of(k: Emitter, shape: tuple[int, ...], body: Callable[[list[Any]], None]) -> None:
    """`body(outer index)` for this task's rows."""
    with loops(share(k, math.prod(shape[:-1]))) as (row,):
        body(unravel(row, shape[:-1]))


def row_tasks(op: OpCall) -> int:
    return task_count(math.prod(op.output.shape), math.prod(op.output.shape[:-1]), GRAIN)


def runs(extent: int, lanes: int, body: Callable[[Any, int], None]) -> None:
    """`body(start, lanes)` for vectors, then single elements, that cover `extent` elements once: for sums, and for what is written in place."""
    whole = extent // lanes
    if whole:
        with loops(whole) as (i,):
            body(T.bind(i * lanes) if whole > 1 else T.int32(0), lanes)
    if extent % lanes:
        with loops((whole * lanes, extent)) as (i,):
            body(i, 1)


class Fold:
    """A sum or a maximum that grows by vectors of `lanes` elements, and by single ones."""

    def __init__(self, lanes: int, dtype: str, start: int, largest: bool = False) -> None:
        self.lanes, self.largest, self.dtype = lanes, largest, dtype
        self.parts = {n: accumulator(n, dtype) for n in sorted({1, lanes})}
        for n, part in self.parts.items():
            store(part, 0, splat(tirx.const(start, dtype), n), n)

    def joined(self, a: Any, b: Any) -> Any:
        return T.max(a, b) if self.largest else a + b

    def add(self, value: Any, lanes: int) -> None:
        part = self.parts[lanes]
        store(part, 0, self.joined(load(part, 0, lanes), value), lanes)

    def result(self) -> Any:
        if self.lanes == 1:
            return T.bind(self.parts[1][0])
        name = "llvm.vector.reduce.smax" if self.largest else "llvm.vector.reduce.add"
        return T.bind(self.joined(call(self.dtype, name, load(self.parts[self.lanes], 0, self.lanes)), self.parts[1][0]))


# -- layer and RMS normalization --------------------------------------------------------------------------------------------------------


class Normalization:
    """The arithmetic of `qc.layer_norm` and `qc.rms_norm`. In the first, what storage adds to x cancels as a zero point does."""

    def __init__(self, k: Emitter) -> None:
        op = k.op
        self.k, self.layer, self.channels = k, op.name == "qc.layer_norm", op.output.shape[-1]
        self.source, self.gain, self.shift = k.operands()
        self.end = Requantize.of(k, op.attrs, 2.0 * NORM_LIMIT * 2.0**-NORM_BITS)
        # |d| * r is at most sqrt(N); a product far below the limit needs no clip
        self.clipped = 1.01 * math.sqrt(self.channels) * np.abs(np.asarray(op.operands[1], np.float64)).max() >= NORM_LIMIT
        self.epsilon, self.unit = k.f32(op.attrs["epsilon"]), k.f32(2.0**-NORM_BITS)
        self.zero = None if self.layer else k.i32(op.attrs["x_zero_point"] + offset_of(self.source.dtype))
        self.squared = "int64" if self.source.dtype == "int16" else "int32"  # 2^15 squares of bytes fit int32

    def number(self, index: list[Any], c: Any, lanes: int) -> Any:
        value = cast("int32", load(self.source.buffer, self.source.at([*index, c]), lanes), lanes)
        return T.bind(value if self.zero is None else value - splat(self.zero, lanes))

    def sums(self, index: list[Any]) -> tuple[Any, Any]:
        """Of the numbers (where they count) and of their squares."""
        if self.k.avx2:
            return self.sums_of_pairs(index)
        lanes = min(self.k.width // 4, 1 << (self.channels.bit_length() - 1))
        total, squares = Fold(lanes, "int32", 0), Fold(lanes, self.squared, 0)

        def count(c: Any, n: int) -> None:
            x = self.number(index, c, n)
            if self.layer:
                total.add(x, n)
            squares.add(cast(self.squared, x * x, n), n)

        runs(self.channels, lanes, count)
        return total.result(), squares.result()

    def sums_of_pairs(self, index: list[Any]) -> tuple[Any, Any]:
        """The same by VPMADDWD: two squares of int16 are at most 2^31, as uint32."""
        words = self.k.width // 4
        long, halves = self.squared == "int64", words // 2
        total, squares = Fold(words, "int32", 0), Fold(halves if long else words, self.squared, 0)

        def count(c: Any, n: int) -> None:
            if n == 1:
                x = self.number(index, c, 1)
                total.add(x, 1)
                squares.add(cast(self.squared, x * x, 1), 1)
                return
            x = T.bind(cast("int16", load(self.source.buffer, self.source.at([*index, c]), n), n))
            x = x if self.zero is None else T.bind(x - splat(T.Cast("int16", self.zero), n))
            if self.layer:
                total.add(avx2.multiply_pairs(x, splat(T.int16(1), n), words), words)
            product = avx2.multiply_pairs(x, x, words)
            if not long:
                squares.add(product, words)
                return
            two = T.bind(T.reinterpret(f"uint64x{halves}", product))
            squares.add(
                T.reinterpret(f"int64x{halves}", T.bitwise_and(two, splat(T.uint64(2**32 - 1), halves)) + T.shift_right(two, splat(T.uint64(32), halves))),
                halves,
            )

        runs(self.channels, 2 * words, count)
        return total.result(), squares.result()

    def inverse(self, total: Any, squares: Any) -> Any:
        """r, from the sum of numbers and of their squares."""
        square, s = T.Cast("int64", squares), T.Cast("int64", total)
        variance = square * T.int64(self.channels) - s * s if self.layer else square
        return quotient(self.k, T.float32(1), root(self.k, float_of_int64(self.k, T.bind(variance)) + self.epsilon))

    def result(self, index: list[Any], c: Any, total: Any, r: Any, lanes: int) -> Any:
        """What is to be stored, of channels from c on."""
        x = self.number(index, c, lanes)
        d = x * splat(T.int32(self.channels), lanes) - splat(total, lanes) if self.layer else x
        scaled = cast("float32", d, lanes) * splat(r, lanes) * load(self.gain.buffer, c, lanes)
        u = to_int(self.k, scaled, -NORM_LIMIT, NORM_LIMIT, lanes) if self.clipped else rounded(self.k, scaled, lanes)
        u = u + load(self.shift.buffer, c, lanes)
        return self.end(u, splat(self.unit, lanes), lanes)

    def write(self, index: list[Any], c: Any, total: Any, r: Any, lanes: int) -> None:
        out = view(self.k.output, self.k.op.output)
        store(out.buffer, out.at([*index, c]), self.result(index, c, total, r, lanes), lanes)


def normalize(op: OpCall, target: Target, row: str) -> Kernel:
    """Two passes over a row: sums, then results."""

    def emit(k: Emitter) -> None:
        norm = Normalization(k)

        def body(index: list[Any]) -> None:
            s, squares = norm.sums(index)
            r = norm.inverse(s, squares)
            vectors(norm.channels, k.width, lambda c, n: norm.write(index, c, s, r, n))

        rows_of(k, op.output.shape, body)

    return make_kernel(row, op, target, emit, tasks=row_tasks(op), arrays=constants_of(op))


def check_normalize(op: OpCall) -> str | None:
    if not all(isinstance(o, np.ndarray) for o in op.operands[1:3]):
        return "gain and shift must be constants."
    return f"more than {MAX_NORMALIZED} channels." if op.output.shape[-1] > MAX_NORMALIZED else None


# -- softmax ----------------------------------------------------------------------------------------------------------------------------


def index_of(k: Emitter, distance: Any, multiplier: Any, e: Exponential, lanes: int) -> Any:
    """The place of an exponential in its table, for an int32 distance from the maximum."""
    return T.bind(to_int(k, cast("float32", distance, lanes) * splat(multiplier, lanes), 0, e.last, lanes))


class Softmax:
    """The arithmetic of `qc.softmax`; exponentials lie in scratch."""

    def __init__(self, k: Emitter) -> None:
        self.k, self.source, self.out, self.end = k, k.operands()[0], view(k.output, k.op.output), Requantize.of(k, k.op.attrs)
        self.multiplier, self.steps, self.table = k.f32(k.op.attrs["multiplier"]), k.f32(k.op.attrs["steps"]), k.arrays[-1]

    def number(self, index: list[Any], c: Any, lanes: int) -> Any:
        return cast("int32", load(self.source.buffer, self.source.at([*index, c]), lanes), lanes)

    def exponential(self, index: list[Any], c: Any, top: Any, line: Any, lanes: int) -> Any:
        """Stored in scratch, and returned."""
        place = index_of(self.k, splat(top, lanes) - self.number(index, c, lanes), self.multiplier, SOFTMAX, lanes)
        if self.k.avx2 and lanes >= avx2.WORDS:
            pairs = T.reinterpret(f"int32x{lanes}", avx2.adjacent(self.table, place, lanes))
            e = T.bind(T.bitwise_and(pairs, splat(T.int32(0xFFFF), lanes)))
        else:
            e = T.bind(cast("int32", self.table[place], lanes))
        store(self.k.scratch, line + c, e, lanes)
        return e

    def factor(self, total: Any) -> Any:
        return quotient(self.k, self.steps, T.Cast("float32", total))

    def write(self, index: list[Any], c: Any, factor: Any, line: Any, lanes: int) -> None:
        store(self.out.buffer, self.out.at([*index, c]), self.end(load(self.k.scratch, line + c, lanes), splat(factor, lanes), lanes), lanes)


def softmax(op: OpCall, target: Target, row: str) -> Kernel:
    """Three passes over a row: the maximum; the exponentials and their sum; the quotients."""
    classes, tasks = op.output.shape[-1], row_tasks(op)

    def emit(k: Emitter) -> None:
        s = Softmax(k)
        lanes = min(k.width // 4, 1 << (classes.bit_length() - 1))
        line = T.bind(k.task * classes)

        def body(index: list[Any]) -> None:
            largest, total = Fold(lanes, "int32", LEAST, largest=True), Fold(lanes, "int32", 0)
            runs(classes, lanes, lambda c, n: largest.add(s.number(index, c, n), n))
            top = largest.result()
            runs(classes, lanes, lambda c, n: total.add(s.exponential(index, c, top, line, n), n))
            factor = s.factor(total.result())
            vectors(classes, lanes, lambda c, n: s.write(index, c, factor, line, n))

        rows_of(k, op.output.shape, body)

    return make_kernel(row, op, target, emit, tasks=tasks, arrays=softmax_arrays(op), scratch=4 * tasks * classes)


def softmax_arrays(op: OpCall) -> list[np.ndarray]:
    """The table of exponentials ends in one more, since entries are read by twos."""
    return [*constants_of(op), np.append(SOFTMAX.table, 0).astype(np.int16)]


def check_softmax(op: OpCall) -> str | None:
    return f"more than {MAX_CLASSES} classes." if op.output.shape[-1] > MAX_CLASSES else None


portable("qc.layer_norm", normalize, check=check_normalize)
portable("qc.rms_norm", normalize, check=check_normalize)
portable("qc.softmax", softmax, check=check_softmax)
