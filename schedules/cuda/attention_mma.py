"""Attention on tensor cores: a block has 16 queries of a head, its warps every so many-th 32 keys. Logits are in registers, and computed twice.

    keys           acc = q . k, and the largest of those that count       q in registers, k straight from memory
    block          the largest of all warps
    keys again     p, 8 bits, packed as the left operand;  sums += p . v  unsigned bytes by signed ones
    block          the warps' sums, added up;  out = (sums - z_v * sum of p) * (c / sum of p)

z_k adds the same to all logits of a query, which their distance from the largest doesn't show. z_q is taken off by products with ones, which
add up a key's bytes where the lane has its logits.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.numerics.constants import ATTENTION
from qcompiler.schedules.builder import Emitter, Requantize, make_kernel, view, when
from qcompiler.schedules.cuda.base import local
from qcompiler.schedules.cuda.cards import card_of
from qcompiler.schedules.cuda.fragments import COLUMNS, DEPTH, ONES, ROWS, Lane, filled, multiply, over_row, read_columns, read_row
from qcompiler.schedules.cuda.gemm import barrier
from qcompiler.schedules.cuda.gemm_plan import SHARED
from qcompiler.schedules.cuda.pool import write
from qcompiler.schedules.portable.attention import UNCOUNTED, Operands, Shape, arrays_of, check_attention, plain_masks
from qcompiler.schedules.portable.threads import alignment, pack, unravel, words
from qcompiler.schedules.table import Kernel, Layout, Need, OpCall, register

WIDEST = 256  # channels of a value: a lane's sums of 16 queries are half as many registers


class AttentionRow:
    """`qc.attention` of heads with whole words of channels."""

    name = "cuda-mma/attention"
    isa = "cuda-mma"
    own_channels = False

    def refuse(self, op: OpCall, target: Target) -> str | None:
        reason = check_attention(op)
        if reason:
            return reason
        s, layouts = Shape.of(op), [o for o in op.operands[:3] if isinstance(o, Layout)]
        if any(o.dtype != "int8" for o in layouts):
            return f"queries, keys and values are {', '.join(o.dtype for o in layouts)}; supported: int8."
        if any(n % 4 for n in (s.size, s.value_size, *op.attrs["columns"], *(o.shape[-1] for o in layouts))):
            return "heads are no whole words of 4 channels."
        return None if s.value_size <= WIDEST else f"a value has {s.value_size} channels; supported: up to {WIDEST}."

    def needs(self, op: OpCall, target: Target) -> list[Need]:
        return [Need() for _ in op.tensors]

    def space(self, op: OpCall, target: Target) -> dict[str, list[Any]]:
        return {"warps": [1, 2, 4, 8]}

    def default(self, op: OpCall, target: Target) -> dict[str, Any]:
        """So many warps that every multiprocessor has some, none without keys."""
        s, processors = Shape.of(op), card_of(target).processors
        fitting = [w for w in self.space(op, target)["warps"] if w == 1 or (w <= -(-s.keys // DEPTH) and shared_bytes(s, w) <= SHARED)]
        return {"warps": next((w for w in fitting if blocks(s) * w >= 8 * processors), fitting[-1])}

    def build(self, op: OpCall, params: Mapping[str, Any], target: Target) -> Kernel:
        op, warps = plain_masks(op), int(params["warps"])
        s = Shape.of(op)
        if shared_bytes(s, warps) > SHARED:
            raise ValueError(f"{self.name}: {warps} warps need {shared_bytes(s, warps)} bytes of shared memory")

        def emit(k: Emitter) -> None:
            Block(k, s, warps).emit()

        threads = 32 * warps
        return make_kernel(self.name, op, target, emit, arrays=arrays_of(op), macs=s.macs, threads=blocks(s) * threads, block=threads, params=params)


def blocks(s: Shape) -> int:
    return s.batch * s.heads * -(-s.queries // ROWS)


def shared_bytes(s: Shape, warps: int) -> int:
    """The exponentials, the warps' largest logits and sums of p, and the sums of all warps but the first."""
    return 2 * (ATTENTION.last + 1) + 4 * (2 * warps * ROWS + (warps - 1) * ROWS * -(-s.value_size // COLUMNS) * COLUMNS)


class Block:
    """One kernel while it is written."""

    def __init__(self, k: Emitter, s: Shape, warps: int) -> None:
        self.k, self.s, self.warps = k, s, warps
        self.x, self.end, self.out = Operands(k), Requantize.of(k, k.op.attrs), view(k.output, k.op.output)
        self.q_zero, _, self.v_zero = k.op.attrs["zero_points"]
        self.lane, self.warp = Lane(k), T.bind(T.shift_right(k.thread, T.int32(5)))
        self.batch, self.head, tile = unravel(k.group, (s.batch, s.heads, -(-s.queries // ROWS)))
        self.group = T.bind(self.x.shared(self.head))
        self.queries = [T.bind(tile * ROWS + (self.lane.row + 8 * i)) for i in (0, 1)]
        self.near = [T.bind(T.min(query, T.int32(s.queries - 1))) for query in self.queries]  # behind the last query: computed, not stored
        self.limits = [self.x.limit(self.batch, query) for query in self.near]
        self.parts, self.steps = -(-s.value_size // COLUMNS), -(-s.size // DEPTH)
        self.multiplier = T.bind(self.x.multipliers.buffer[self.head])

    def emit(self) -> None:
        self.share_table()
        self.left = local(4 * self.steps)
        start = [self.x.q.at([self.batch, query, self.head * self.s.size + self.x.columns[0]]) for query in self.near]
        for i, step in itertools.product((0, 1), range(self.steps)):
            self.read(self.left, [4 * step + i, 4 * step + 2 + i], 0, T.bind(T.int32(0) + start[i]), step)
        self.sums, self.bytes, self.ones = local(16), local(16), filled(4, ONES)
        tops = self.largest()
        nothing = [self.x.nothing(top) for top in tops]
        totals, outs = self.weighted(tops, nothing)
        self.finish(totals, outs)

    def read(self, to: Any, places: list[int], operand: int, at: Any, step: int) -> None:
        """32 bytes of a query (operand 0) or key (1)."""
        source = (self.x.q, self.x.keys)[operand]
        aligned = math.gcd(8, alignment(source), self.x.columns[operand], self.s.size)
        read_row(to, places, words(source.buffer), at, T.bind(self.lane.first + step * DEPTH), self.s.size, aligned)

    def share_table(self) -> None:
        """The exponentials: lanes look up different ones, which shared memory does at once."""
        count, threads = ATTENTION.last + 1, 32 * self.warps
        table = T.alloc_buffer((count,), "int16", scope="shared")
        source, to = words(self.x.table), T.decl_buffer((count // 2,), "int32", data=table.data, scope="shared")
        with T.serial(0, count // 2 // threads) as i:
            at = T.bind(i * threads + self.k.thread)
            T.buffer_store(to, source[at], [at])
        self.x.table = table
        barrier()

    # -- 32 keys ------------------------------------------------------------------------------------------------------------------------------

    def each_step(self, body: Callable[[Any], None]) -> None:
        """`body(first key)` for this warp's steps."""
        steps = -(-self.s.keys // DEPTH)
        with T.serial(0, -(-steps // self.warps)) as i:
            step = T.bind(i * self.warps + self.warp)
            with when(step < steps if steps % self.warps else None):
                body(T.bind(step * DEPTH))

    def multiply_keys(self, first: Any) -> None:
        """Product u's columns are keys 8 * j + 2 * u and the next of every j: such that a lane has the logits of 8 adjacent keys, `lane.first` and on."""
        row, right = self.lane.row, local(2)
        key = T.bind(first + (T.shift_right(row, T.int32(1)) * 8 + T.bitwise_and(row, T.int32(1))))
        for i in range(16):
            T.buffer_store(self.sums, T.int32(0), [i])
            if self.q_zero:
                T.buffer_store(self.bytes, T.int32(0), [i])
        for u in range(4):
            at = self.x.keys.at([self.batch, self.inside(key + 2 * u), self.group * self.s.size + self.x.columns[1]])
            at = T.bind(T.int32(0) + at)
            for step in range(self.steps):
                self.read(right, [0, 1], 1, at, step)
                multiply(self.sums, 4 * u, self.left, 4 * step, right, 0)
                if self.q_zero:
                    multiply(self.bytes, 4 * u, self.ones, 0, right, 0)

    def inside(self, key: Any) -> Any:
        """The key, or the last one where there is none: computed, of no weight."""
        return T.bind(T.min(key, T.int32(self.s.keys - 1)) if self.s.keys % DEPTH else key)

    def key(self, first: Any, i: int) -> tuple[Any, Any]:
        """(number of this lane's key i of 8, whether there is one; None: there is)."""
        key = T.bind(first + (self.lane.first + i))
        return self.inside(key), T.bind(key < self.s.keys) if self.s.keys % DEPTH else None

    def logit(self, key: Any, row: int, i: int) -> Any:
        product = self.sums[4 * (i // 2) + 2 * row + i % 2]
        if self.q_zero:
            product = product - self.x.zeros[0] * self.bytes[4 * (i // 2) + i % 2]
        return self.x.logit(product, (self.batch, self.head, self.near[row]), self.limits[row], key, 1)

    # -- all keys ---------------------------------------------------------------------------------------------------------------------------

    def largest(self) -> list[Any]:
        """The largest logit that counts, of both rows."""
        tops = filled(2, UNCOUNTED)

        def body(first: Any) -> None:
            self.multiply_keys(first)
            for i in range(8):
                key, there = self.key(first, i)
                for row in (0, 1):
                    value = self.logit(key, row, i)
                    T.buffer_store(tops, T.max(tops[row], value if there is None else T.Select(there, value, T.int32(UNCOUNTED))), [row])

        self.each_step(body)
        return self.together("max", [tops[0], tops[1]])

    def together(self, name: str, mine: list[Any]) -> list[Any]:
        """The sum or the maximum, of both rows, of all lanes and warps."""
        values = [over_row(name, value) for value in mine]
        if self.warps == 1:
            return values
        shared = T.alloc_buffer((self.warps * ROWS,), "int32", scope="shared")
        for i, value in enumerate(values):
            T.buffer_store(shared, value, [self.warp * ROWS + (self.lane.row + 8 * i)])  # 4 lanes write the same
        barrier()
        found = []
        for i in (0, 1):
            theirs = [shared[w * ROWS + (self.lane.row + 8 * i)] for w in range(self.warps)]
            total = theirs[0]
            for value in theirs[1:]:
                total = T.max(total, value) if name == "max" else total + value
            found.append(T.bind(total))
        return found

    def weighted(self, tops: list[Any], nothing: list[Any]) -> tuple[list[Any], Any]:
        """(sums of p of both rows, this warp's sums of p . v)."""
        totals, outs, p, right = filled(2), filled(16 * self.parts), local(4), local(8)

        def body(first: Any) -> None:
            self.multiply_keys(first)
            found: list[list[Any]] = [[], []]
            keys = [self.key(first, i) for i in range(8)]
            for row, (i, (key, there)) in itertools.product((0, 1), enumerate(keys)):
                value = self.x.weight(self.logit(key, row, i), tops[row], nothing[row], self.multiplier, key, 1)
                found[row].append(value if there is None else T.bind(T.Select(there, value, T.int32(0))))
                T.buffer_store(totals, totals[row] + found[row][-1], [row])
            for row, half in itertools.product((0, 1), (0, 1)):
                T.buffer_store(p, pack(found[row][4 * half : 4 * half + 4]), [row + 2 * half])
            at = self.group * self.s.value_size + self.x.columns[2]
            starts = [T.bind(T.int32(0) + self.x.values.at([self.batch, key, at])) for key, _ in keys]
            for part in range(self.parts):
                column = T.bind(self.lane.row * 4 + part * COLUMNS)
                read_columns(right, words(self.x.values.buffer), starts, column, self.s.value_size)
                for t in range(4):
                    multiply(outs, 4 * (4 * part + t), p, 0, right, 2 * t, unsigned=True)

        self.each_step(body)
        return self.together("sum", [totals[0], totals[1]]), outs

    def finish(self, totals: list[Any], outs: Any) -> None:
        count, lane = int(outs.shape[0]), T.bind(T.bitwise_and(self.k.thread, T.int32(31)))
        if self.warps > 1:
            shared = T.alloc_buffer(((self.warps - 1) * count * 32,), "int32", scope="shared")
            with T.If(self.warp > 0), T.Then():
                for i in range(count):
                    T.buffer_store(shared, outs[i], [((self.warp - 1) * count + i) * 32 + lane])
            barrier()
        with when(self.warp == 0 if self.warps > 1 else None):
            if self.warps > 1:
                with T.serial(0, self.warps - 1) as other:
                    for i in range(count):
                        T.buffer_store(outs, outs[i] + shared[(other * count + i) * 32 + lane], [i])
            for row in (0, 1):
                with when(self.queries[row] < self.s.queries if self.s.queries % ROWS else None):
                    self.write_row(row, totals[row], outs)

    def write_row(self, row: int, total: Any, outs: Any) -> None:
        """8 adjacent channels of every 32, at once where heads are as wide."""
        factor = self.x.factor(self.head, total)
        shift = T.bind(self.x.zeros[2] * total) if self.v_zero else None
        for part, halves in itertools.product(range(self.parts), ((0,), (1,)) if self.s.value_size % 8 else ((0, 1),)):
            channel = T.bind(self.lane.first + (part * COLUMNS + 4 * halves[0]))
            sums = [outs[4 * (4 * part + t) + 2 * row + half] for half in halves for t in range(4)]
            scaled = [T.Cast("float32", v if shift is None else v - shift) * factor for v in sums]
            with when(channel < self.s.value_size if self.s.value_size % COLUMNS else None):
                at = T.bind(T.int32(0) + self.out.at([self.batch, self.queries[row], self.head * self.s.value_size + channel]))
                if self.out.dtype == "int8":
                    write(self.out, at, [T.bind(self.end.store_word(v, 1)) for v in scaled])
                else:
                    for i, v in enumerate(scaled):
                        T.buffer_store(self.out.buffer, self.end.store_value(v, 1), [at + i])


register("qc.attention", AttentionRow())
