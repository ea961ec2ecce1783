"""Matrix product of two computed operands: a register tile of 4 rows (8 with AVX512) times two vectors of int32, on x86 by products of pairs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.schedules import avx2
from qcompiler.schedules.builder import (
    Emitter,
    Requantize,
    accumulator,
    cast,
    centered,
    clamp,
    has_avx2,
    load,
    loops,
    make_kernel,
    offset_of,
    share,
    splat,
    store,
    task_count,
    tiles,
    vector_bytes,
    vectors,
    view,
)
from qcompiler.schedules.portable.base import portable
from qcompiler.schedules.portable.elementwise import constants_of
from qcompiler.schedules.table import Kernel, OpCall


@dataclass(frozen=True)
class Extents:
    """Of a product [batch..., m, depth] by [batch..., depth, n], and how it is cut. `paired`: sums of a vector of products of pairs of int16, as AVX2 and
    AVX512 have them; 0: one step at a time."""

    batch: tuple[int, ...]
    m: int
    n: int
    depth: int
    paired: int

    @staticmethod
    def of(op: OpCall, target: Target) -> Extents:
        *batch, m, n = op.output.shape
        return Extents(tuple(batch), m, n, op.operands[0].shape[-1], vector_bytes(target) // 4 if has_avx2(target) and n >= avx2.WORDS else 0)

    @property
    def rows(self) -> int:
        """Of a register tile: 4 (8 with 32 registers), or the largest power of two that m has."""
        return min(8 if self.paired > avx2.WORDS else 4, 1 << (self.m.bit_length() - 1))

    @property
    def steps(self) -> int:
        """Of the reduction, two elements at a time."""
        return -(-self.depth // 2)

    @property
    def count(self) -> int:
        """Products of the batch."""
        return math.prod(self.batch)

    @property
    def macs(self) -> int:
        return self.count * self.m * self.n * self.depth

    @property
    def tasks(self) -> int:
        """They share the longest batch axis, or the rows of a lone product."""
        return task_count(self.macs, max(self.batch, default=1) if self.count > 1 else self.m // self.rows, 500_000)


class Product:
    """The kernel while it is written. `index` and `first`: the batch indices and the first row of the tile at hand."""

    def __init__(self, k: Emitter, extents: Extents) -> None:
        at, e = k.op.attrs, extents
        left, right = k.operands()
        self.k, self.extents = k, extents
        self.a, self.b = left.broadcast([*e.batch, e.m, e.depth]), right.broadcast([*e.batch, e.depth, e.n])
        self.a_zero, self.b_zero = k.i32(at["a_zero_point"] + offset_of(self.a.dtype)), k.i32(at["b_zero_point"] + offset_of(self.b.dtype))
        self.multiplier = k.f32(at["multiplier"])
        self.out = view(k.output, k.op.output)
        self.low, self.high = (k.f32_or_none(at.get(name)) for name in ("float_low", "float_high"))
        self.end = None if self.out.dtype == "float32" else Requantize.of(k, at, 255.0 * 255.0 * e.depth * at["multiplier"])
        self.index: list[Any] = []
        self.first: Any = None

    def emit(self) -> None:
        k, e = self.k, self.extents
        words = T.bind(k.task * (e.rows * e.steps)) if e.paired else None  # where those of this task begin
        axes: list[Any] = list(e.batch)
        if e.count > 1:
            widest = max(range(len(axes)), key=lambda d: e.batch[d])
            axes[widest] = share(k, e.batch[widest])
        along = -(-e.m // e.rows) if e.count > 1 else tiles(k, e.m, e.rows)
        with loops(*axes, along) as (*self.index, tile):
            self.first = T.bind(T.min(tile * e.rows, e.m - e.rows))
            if e.paired:
                self.store_pairs(words)
            vectors(e.n, k.width // 2, lambda c, lanes: self.by_pairs(words, c, lanes) if e.paired and lanes >= avx2.WORDS else self.by_elements(c, lanes))

    def store_pairs(self, words: Any) -> None:
        """Rows of a without their zero point, as pairs of int16 in scratch from `words` on; an odd last one is paired with 0."""
        a, k, e = self.a, self.k, self.extents
        zeros, whole = splat(T.Cast("int16", self.a_zero), 16), e.depth // 16
        for r in range(e.rows):
            start, place = T.bind(a.at([*self.index, self.first + r, 0])), words + r * e.steps
            with loops(whole) as (i,):
                x = cast("int16", load(a.buffer, start + i * 16, 16), 16) - zeros
                store(k.scratch, place + i * 8, T.reinterpret("int32x8", x), 8)
            for i in range(whole * 8, e.steps):
                even, odd = (centered(a.buffer[start + j], self.a_zero, 1) if j < e.depth else T.int32(0) for j in (2 * i, 2 * i + 1))
                store(k.scratch, place + i, T.bitwise_or(T.bitwise_and(even, T.int32(0xFFFF)), T.shift_left(odd, T.int32(16))), 1)

    def by_pairs(self, words: Any, c: Any, lanes: int) -> None:
        """`lanes` columns from `c` on by VPMADDWD, which multiplies two adjacent int16 by two others and adds: two steps of the reduction at once."""
        b, e = self.b, self.extents
        width = min(e.paired, lanes)
        accs = [_zeros(lanes // width, width) for _ in range(e.rows)]
        zeros = T.bind(splat(T.Cast("int16", self.b_zero), 2 * width))
        with loops(e.steps) as (i,):
            second = T.min(i * 2 + 1, e.depth - 1) if e.depth % 2 else i * 2 + 1
            even, odd = (load(b.buffer, b.at([*self.index, j, c]), lanes) for j in (i * 2, second))
            ys = [T.bind(y - zeros) for y in avx2.pairs_of(even, odd, lanes, width)]
            for r, acc in enumerate(accs):
                x = T.bind(T.reinterpret(f"int16x{2 * width}", splat(self.k.scratch[words + r * e.steps + i], width)))
                for part, y in zip(acc, ys, strict=True):
                    store(part, 0, load(part, 0, width) + avx2.multiply_pairs(x, y, width), width)
        for r, acc in enumerate(accs):
            self.finish(r, c, T.bind(T.Shuffle([load(part, 0, width) for part in acc], list(range(lanes)))), lanes)

    def by_elements(self, c: Any, lanes: int) -> None:
        """`lanes` columns from `c` on, one step of the reduction at a time."""
        a, b, e = self.a, self.b, self.extents
        accs = _zeros(e.rows, lanes)
        with loops(e.depth) as (i,):
            y = T.bind(centered(load(b.buffer, b.at([*self.index, i, c]), lanes), self.b_zero, lanes))
            for r, acc in enumerate(accs):
                x = T.bind(centered(a.buffer[a.at([*self.index, self.first + r, i])], self.a_zero, 1))
                store(acc, 0, load(acc, 0, lanes) + splat(x, lanes) * y, lanes)
        for r, acc in enumerate(accs):
            self.finish(r, c, load(acc, 0, lanes), lanes)

    def finish(self, r: int, c: Any, value: Any, lanes: int) -> None:
        """Requantize and store the sums of row `r` of the tile."""
        scale = splat(self.multiplier, lanes)
        result = self.end(value, scale, lanes) if self.end is not None else clamp(cast("float32", value, lanes) * scale, self.low, self.high, lanes)
        store(self.out.buffer, self.out.at([*self.index, self.first + r, c]), result, lanes)


def _zeros(count: int, lanes: int) -> list[Any]:
    """Cleared accumulators, each of `lanes` sums."""
    accs = [accumulator(lanes) for _ in range(count)]
    for acc in accs:
        store(acc, 0, splat(T.int32(0), lanes), lanes)
    return accs


def matmul(op: OpCall, target: Target, row: str) -> Kernel:
    """`acc = sum (a - za) * (b - zb)` over the last axis of a and the last but one of b; batch axes broadcast as in numpy."""
    e = Extents.of(op, target)
    scratch = 4 * e.tasks * e.rows * e.steps if e.paired else 0
    return make_kernel(row, op, target, lambda k: Product(k, e).emit(), tasks=e.tasks, arrays=constants_of(op), macs=e.macs, scratch=scratch)


portable("qc.matmul", matmul)
