"""Matrix product of two computed operands on tensor cores: a warp has 16 rows and a few times 32 columns, with operands straight from memory.

    acc = sum a * b - z_b * (sum of a's row) - z_a * (sum of b's column) + depth * z_a * z_b

The sums of rows and columns are products with ones, and lie where the lane has its acc.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.schedules.builder import Emitter, Requantize, clamp, make_kernel, view, when
from qcompiler.schedules.cuda.base import local
from qcompiler.schedules.cuda.cards import card_of
from qcompiler.schedules.cuda.fragments import COLUMNS, DEPTH, ONES, ROWS, Lane, filled, multiply, read_columns, read_row
from qcompiler.schedules.cuda.pool import write
from qcompiler.schedules.portable.elementwise import constants_of
from qcompiler.schedules.portable.threads import alignment, in_words, unravel, words
from qcompiler.schedules.table import Kernel, Need, OpCall, register

WARPS = 4  # of a block, each by itself


class MatmulRow:
    """`qc.matmul` of operands with whole words along their last axes."""

    name = "cuda-mma/matmul"
    isa = "cuda-mma"
    own_channels = False

    def refuse(self, op: OpCall, target: Target) -> str | None:
        a, b = op.operands
        if any(str(o.dtype) != "int8" for o in (a, b)):
            return f"the operands are {a.dtype} and {b.dtype}; supported: int8."
        if len(a.shape) < 2 or len(b.shape) < 2 or a.shape[-1] % 4 or b.shape[-1] % 4:
            return "rows of the operands are no whole words of 4 bytes."
        return None

    def needs(self, op: OpCall, target: Target) -> list[Need]:
        return [Need(pitch=4 if len(t.shape) == 4 else 1) for t in op.tensors]

    def space(self, op: OpCall, target: Target) -> dict[str, list[Any]]:
        return {"parts": [1, 2, 4]}

    def default(self, op: OpCall, target: Target) -> dict[str, Any]:
        """As many columns of a warp as leave enough warps for all multiprocessors."""
        processors = card_of(target).processors
        return {"parts": next((p for p in (4, 2) if COLUMNS * p <= op.output.shape[-1] and tile_count(op, p) >= 8 * processors), 1)}

    def build(self, op: OpCall, params: Mapping[str, Any], target: Target) -> Kernel:
        parts = int(params["parts"])

        def emit(k: Emitter) -> None:
            warp, count = T.bind(T.shift_right(k.task, T.int32(5))), tile_count(op, parts)
            with when(warp < count if count % WARPS else None):
                Tile(k, parts, warp).emit()

        threads = 32 * tile_count(op, parts)
        macs = math.prod(op.output.shape) * op.operands[0].shape[-1]
        return make_kernel(self.name, op, target, emit, arrays=constants_of(op), macs=macs, threads=threads, block=32 * WARPS, params=params)


def tile_count(op: OpCall, parts: int) -> int:
    *batch, m, n = op.output.shape
    return math.prod(batch) * -(-m // ROWS) * -(-n // (COLUMNS * parts))


class Tile:
    """What a warp does, while it is written."""

    def __init__(self, k: Emitter, parts: int, warp: Any) -> None:
        self.k, self.parts, a = k, parts, k.op.attrs
        *batch, self.m, self.n = k.op.output.shape
        self.depth = k.op.operands[0].shape[-1]
        left, right = k.operands()
        self.a, self.b, self.out = left.broadcast([*batch, self.m, self.depth]), right.broadcast([*batch, self.depth, self.n]), view(k.output, k.op.output)
        assert in_words(left) and in_words(right)
        self.a_zero, self.b_zero = int(a["a_zero_point"]), int(a["b_zero_point"])
        self.multiplier = k.f32(a["multiplier"])
        self.end = None if self.out.dtype == "float32" else Requantize.of(k, a)
        self.low, self.high = (k.f32_or_none(a.get(name)) for name in ("float_low", "float_high"))
        self.lane = Lane(k)
        *self.index, row, part = unravel(warp, (*batch, -(-self.m // ROWS), -(-self.n // (COLUMNS * parts))))
        self.rows = [T.bind(row * ROWS + (self.lane.row + 8 * i)) for i in (0, 1)]
        self.column = T.bind(part * (COLUMNS * parts))

    def emit(self) -> None:
        self.sums, self.of_rows, self.of_columns = filled(16 * self.parts), filled(4), filled(16 * self.parts)
        self.ones, self.left, self.right = filled(4, ONES), local(4), local(8)
        near = [T.bind(T.min(row, T.int32(self.m - 1))) for row in self.rows]  # behind the last row: computed, not stored
        starts = [T.bind(T.int32(0) + self.a.at([*self.index, row, 0])) for row in near]
        with T.serial(0, -(-self.depth // DEPTH)) as step:
            self.step(starts, T.bind(self.lane.first + step * DEPTH))
        for i in (0, 1):
            with when(self.rows[i] < self.m if self.m % ROWS else None):
                self.write_row(i)

    def step(self, starts: list[Any], first: Any) -> None:
        """32 places of the reduction, of which this lane's are `first` and on."""
        aligned = math.gcd(8, alignment(self.a), self.depth)
        for i in (0, 1):
            read_row(self.left, [i, 2 + i], words(self.a.buffer), starts[i], first, self.depth, aligned)
        if self.a_zero and self.depth % DEPTH:  # places behind the last one have no column's bytes
            for i in range(4):
                T.buffer_store(self.ones, T.Select(first + 4 * (i // 2) < self.depth, T.int32(ONES), T.int32(0)), [i])
        if self.b_zero:
            T.buffer_store(self.right, T.int32(ONES), [0])
            T.buffer_store(self.right, T.int32(ONES), [1])
            multiply(self.of_rows, 0, self.left, 0, self.right, 0)
        places = [T.bind(T.min(first + i, T.int32(self.depth - 1)) if self.depth % DEPTH else first + i) for i in range(8)]
        rows = [T.bind(T.int32(0) + self.b.at([*self.index, place, 0])) for place in places]
        for part in range(self.parts):
            column = T.bind(self.column + (self.lane.row * 4 + part * COLUMNS))
            read_columns(self.right, words(self.b.buffer), rows, column, self.n, COLUMNS * self.parts)
            for t in range(4):
                multiply(self.sums, 4 * (4 * part + t), self.left, 0, self.right, 2 * t)
                if self.a_zero:
                    multiply(self.of_columns, 4 * (4 * part + t), self.ones, 0, self.right, 2 * t)

    def write_row(self, i: int) -> None:
        """8 adjacent columns of every 32, at once where rows have no fewer."""
        constant = self.depth * self.a_zero * self.b_zero
        of_row = T.bind(T.int32(constant) - self.of_rows[2 * i] * self.b_zero) if self.b_zero else None
        for part, halves in itertools.product(range(self.parts), ((0,), (1,)) if self.n % 8 else ((0, 1),)):
            column = T.bind(self.column + (self.lane.first + (part * COLUMNS + 4 * halves[0])))
            values = []
            for half, t in itertools.product(halves, range(4)):
                at = 4 * (4 * part + t)
                value = self.sums[at + 2 * i + half]
                value = value - self.of_columns[at + half] * self.a_zero if self.a_zero else value
                values.append(T.Cast("float32", value if of_row is None else value + of_row) * self.multiplier)
            with when(column < self.n if self.n % (COLUMNS * self.parts) else None):
                self.write(T.bind(T.int32(0) + self.out.at([*self.index, self.rows[i], column])), values)

    def write(self, at: Any, scaled: list[Any]) -> None:
        if self.out.dtype == "int8" and self.end and in_words(self.out):
            write(self.out, at, [T.bind(self.end.store_word(v, 1)) for v in scaled])
            return
        for i, v in enumerate(scaled):
            T.buffer_store(self.out.buffer, self.end.store_value(v, 1) if self.end else clamp(v, self.low, self.high, 1), [at + i])


register("qc.matmul", MatmulRow())
