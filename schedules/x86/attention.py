"""Attention in vectors: blocks of queries of a head against all of its keys, in memory that the first two caches hold.

    once per head:      k as [keys of a vector][words of channels][lanes], v as [words of keys][channels], signed, in scratch (`exponentials.Unit`)
    per block:          acc = q . k (+ bias), and its maximum              by four vectors of keys in registers
                        p = the exponential in 8 bits, and its sum         a step of keys at a time (`exponentials.Exponentials`)
                        out = (p . v) * (c / sum)                          by four vectors of channels in registers

q is read as stored, unsigned; -(z_q + 128) * (sum of k) is where each sum begins. z_k adds the same to all logits of a query, which their distance from the
maximum doesn't show. What is behind the last key, up to a whole step, has p = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.schedules.builder import Emitter, Requantize, accumulator, aligned_frame, loops, make_kernel, share, task_count, view, when
from qcompiler.schedules.isa import call, load, save, scalar, shuffle
from qcompiler.schedules.portable.attention import MACS_PER_TASK, UNCOUNTED, Operands, Shape, arrays_of, check_attention, plain_masks
from qcompiler.schedules.portable.base import PortableRow
from qcompiler.schedules.portable.nest import interleave
from qcompiler.schedules.portable.threads import unravel
from qcompiler.schedules.table import Kernel, OpCall, register
from qcompiler.schedules.x86.exponentials import BLOCKS, PAIRS, VNNI256, VNNI512, Exponentials, Unit

UNITS = 16  # of work that should exist at least, for threads to share


@dataclass(frozen=True)
class Tiling:
    """How the work is cut, and where things lie in a task's scratch (in words)."""

    unit: Unit
    shape: Shape
    height: int  # queries of a block
    parts: int  # of a head's queries

    @staticmethod
    def of(unit: Unit, s: Shape) -> Tiling:
        height = min(unit.queries, s.queries)
        heads = s.batch * s.kv_heads
        return Tiling(unit, s, height, max(1, min(-(-s.queries // height), -(-UNITS // heads), s.macs // heads // MACS_PER_TASK)))

    @property
    def vectors(self) -> int:
        """Of keys."""
        return -(-self.shape.keys // self.unit.lanes)

    @property
    def steps(self) -> int:
        """The last one may have fewer vectors than four."""
        return -(-self.vectors // BLOCKS)

    @property
    def depth(self) -> int:
        """Words of channels of q and k."""
        return self.shape.size // self.unit.group

    @property
    def words(self) -> int:
        """Of keys."""
        return -(-self.shape.keys // self.unit.group)

    @property
    def channels(self) -> int:
        """Vectors of channels of v."""
        return -(-self.shape.value_size // self.unit.lanes)

    @property
    def line(self) -> int:
        """Words of the p of a query."""
        return self.steps * self.unit.step // self.unit.group

    @property
    def places(self) -> list[int]:
        """Where packed k, sums of k, packed v, logits, p and q begin; and the end."""
        n, height = self.unit.lanes, self.height
        sizes = [self.vectors * n * self.depth, self.vectors * n, self.words * self.channels * n, height * self.vectors * n, height * self.line]
        starts = np.cumsum([0, *sizes, -(-height * self.depth // 16) * 16])
        return [int(start) for start in starts]


class _Heads:
    """Emits the work on the heads that share one of k and v."""

    def __init__(self, k: Emitter, x: Operands, tiling: Tiling) -> None:
        self.k, self.x, self.t, self.s, self.u = k, x, tiling, tiling.shape, tiling.unit
        self.end, self.out = Requantize.of(k, k.op.attrs), view(k.output, k.op.output)
        self.value_zero = k.i32(k.op.attrs["zero_points"][2])
        self.masked = any(v is not None for v in (x.mask, x.lengths, x.causal))
        self.exponentials = Exponentials(self.u, k.arrays[-1], self.masked)
        base = T.bind(k.task * tiling.places[-1])
        self.packed, self.sums, self.values, self.logits, self.p, self.queries = (T.bind(base + p) for p in tiling.places[:-1])

    def word(self, at: Any) -> Any:
        """A word of scratch in every lane."""
        return T.bind(T.broadcast(self.k.scratch[at], self.u.lanes))

    def vector(self, at: Any) -> Any:
        return T.bind(load(self.k.scratch, at, self.u.lanes))

    def accumulators(self, rows: int, count: int) -> list[list[Any]]:
        return [[accumulator(self.u.lanes) for _ in range(count)] for _ in range(rows)]

    def add(self, acc: Any, a: Any, b: Any) -> None:
        save(acc, 0, self.u.dot(load(acc, 0, self.u.lanes), a, b), self.u.lanes)

    def key(self, number: Any) -> Any:
        return T.min(number, T.int32(self.s.keys - 1))

    def pack_keys(self, row: Any, group: Any) -> None:
        """k by tiles of as many keys as there are words in a part of their rows; then the first values of the sums."""
        t, x, u, n = self.t, self.x, self.u, self.u.lanes
        start = T.bind(-x.zeros[0])
        with loops(t.vectors) as (block,):
            place = T.bind(self.packed + block * (t.depth * n))
            for first, lanes in _powers(t.depth, n):
                for begin in range(0, n, lanes):
                    rows = []
                    for r in range(begin, begin + lanes):
                        at = x.keys.at([row, self.key(block * n + r), group * self.s.size + (x.columns[1] + u.group * first)])
                        rows.append(u.signed(load(x.keys.buffer, at, u.group * lanes), u.group * lanes))
                    for i, column in enumerate(interleave(rows, lanes) if lanes > 1 else rows):
                        save(self.k.scratch, place + ((first + i) * n + begin), column, lanes)
            ((total,),) = self.accumulators(1, 1)
            save(total, 0, scalar(0, "int32", n), n)
            with loops(t.depth) as (i,):
                self.add(total, u.ones, self.vector(place + i * n))
            save(self.k.scratch, self.sums + block * n, load(total, 0, n) * T.broadcast(start, n), n)

    def pack_values(self, row: Any, group: Any) -> None:
        t, x, u = self.t, self.x, self.u
        with loops(t.words) as (word,):
            for first, lanes in _powers(self.s.value_size, 16):
                rows = []
                for r in range(u.group):
                    at = x.values.at([row, self.key(word * u.group + r), group * self.s.value_size + (x.columns[2] + first)])
                    rows.append(T.bind(load(x.values.buffer, at, lanes)))
                count = lanes // u.group
                for i, part in enumerate(interleave(rows, lanes)):
                    save(self.k.scratch, self.values + word * (t.channels * u.lanes) + (first + i * count), u.signed(part, lanes), count)

    def copy_queries(self, row: Any, head: Any, queries: list[Any]) -> None:
        for r, query in enumerate(queries):
            for first, lanes in _powers(self.t.depth, self.u.lanes):
                at = self.x.q.at([row, query, head * self.s.size + (self.x.columns[0] + self.u.group * first)])
                words = self.u.unsigned(load(self.x.q.buffer, at, self.u.group * lanes), self.u.group * lanes)
                save(self.k.scratch, self.queries + (r * self.t.depth + first), words, lanes)

    def each_step(self, reached: Any, body: Callable[[Any, int, bool], None]) -> None:
        """`body(first key, vectors, whether it is the last)` for steps that hold `reached` keys (None: all)."""
        t, step = self.t, self.u.step
        ragged = bool(t.shape.keys % step)
        whole = t.steps - ragged
        if whole:
            count = whole if reached is None else T.bind(T.min(T.int32(whole), T.shift_right(reached + (step - 1), T.int32(step.bit_length() - 1))))
            with loops((0, count) if reached is not None else whole) as (i,):
                body(T.bind(i * step), BLOCKS, False)
        if ragged:
            with when(None if reached is None or not whole else reached > T.int32(whole * step)):
                body(T.int32(whole * step), t.vectors % BLOCKS or BLOCKS, True)

    def block(self, row: Any, head: Any, first: Any) -> None:
        """`height` queries from the first one on."""
        t, x, s, n = self.t, self.x, self.s, self.u.lanes
        queries = [T.bind(first + r) for r in range(t.height)]
        limits = [x.limit(row, query) for query in queries]
        reached = limits[-1]  # the last query's keys are all that any counts
        (largest,) = self.accumulators(1, t.height)
        for top in largest:
            save(top, 0, scalar(UNCOUNTED, "int32", n), n)
        self.copy_queries(row, head, queries)
        self.each_step(reached, lambda j, count, last: self.products((row, head), queries, limits, largest, j, count, last))
        multiplier = T.bind(x.multipliers.buffer[head])
        tops = [T.bind(call("int32", "llvm.vector.reduce.smax", load(top, 0, n))) for top in largest]
        sums = [self.weights(r, top, multiplier, reached) for r, top in enumerate(tops)]
        read = s.keys
        if self.masked:
            totals = [accumulator(1) for _ in sums]
            for total, value in zip(totals, sums, strict=True):
                save(total, 0, value, 1)
            read = self.fill_rows_of_nothing(tops, totals, reached)
            sums = [T.bind(total[0]) for total in totals]
        self.mix(row, head, queries, sums, read)

    def products(self, place: tuple[Any, Any], queries: list[Any], limits: list[Any], largest: list[Any], j: Any, count: int, last: bool) -> None:
        """Logits of `count` vectors of keys from key j on; place: batch row, head."""
        t, n = self.t, self.u.lanes
        accs = self.accumulators(len(queries), count)
        for v in range(count):
            start = self.vector(self.sums + j + v * n)
            for line in accs:
                save(line[v], 0, start, n)
        keys = [T.bind(self.packed + (j + v * n) * t.depth) for v in range(count)]
        with loops(t.depth) as (i,):
            vectors = [self.vector(key + i * n) for key in keys]
            for r, line in enumerate(accs):
                q = self.word(self.queries + r * t.depth + i)
                for acc, key in zip(line, vectors, strict=True):
                    self.add(acc, q, key)
        for r, (line, query, limit, top) in enumerate(zip(accs, queries, limits, largest, strict=True)):
            found = [load(top, 0, n)]
            for v, acc in enumerate(line):
                present = min(n, self.s.keys - (t.steps - 1) * self.u.step - v * n) if last else n
                value = self.x.logit(load(acc, 0, n), (*place, query), limit, T.bind(j + v * n), n, present)
                save(self.k.scratch, self.logits + (r * t.vectors + v) * n + j, value, n)
                if present < n:
                    value = T.Select(T.ramp(T.int32(0), 1, n) < scalar(present, "int32", n), value, scalar(UNCOUNTED, "int32", n))
                found.append(value)
            while len(found) > 1:
                found = [*found[2:], T.bind(T.max(found[0], found[1]))]
            save(top, 0, found[0], n)

    def weights(self, r: int, top: Any, multiplier: Any, reached: Any) -> Any:
        """p of query r of the block; returns their sum."""
        n = self.u.lanes
        ((total,),) = self.accumulators(1, 1)
        save(total, 0, scalar(0, "int32", n), n)

        def step(j: Any, count: int, last: bool) -> None:
            logits = [self.vector(self.logits + (r * self.t.vectors + v) * n + j) for v in range(count)]
            words = self.exponentials.words(logits, top, multiplier, j, last)
            self.save_weights(r, j, words)
            for part in words:
                self.add(total, part, self.u.ones)

        self.each_step(reached, step)
        return T.bind(call("int32", "llvm.vector.reduce.add", load(total, 0, n)))

    def save_weights(self, r: int, j: Any, words: list[Any]) -> None:
        """p of a step from key j on, of query r of the block."""
        start = T.bind(self.p + r * self.t.line + T.shift_right(j, T.int32(self.u.group // 2)))
        for i, part in enumerate(words):
            save(self.k.scratch, start + i * self.u.lanes, part, self.u.lanes)

    def fill_rows_of_nothing(self, tops: list[Any], totals: list[Any], reached: Any) -> Any:
        """Where no key counts for a query, all do alike. Returns how many keys count for any query of the block."""
        s = self.s
        empty = [T.bind(top == T.int32(UNCOUNTED)) for top in tops]
        found = empty[0]
        for other in empty[1:]:
            found = T.Or(found, other)
        read = T.int32(s.keys) if reached is None else T.bind(T.Select(found, T.int32(s.keys), reached))
        with T.If(found), T.Then():
            for r, (nothing, total) in enumerate(zip(empty, totals, strict=True)):
                most = -1 if self.u.group == 4 else 255 * 0x10001
                words = [T.bind(T.broadcast(T.Select(nothing, T.int32(most), T.int32(0)), self.u.lanes))] * (4 // self.u.group)
                save(total, 0, T.Select(nothing, T.int32(255 * s.keys), total[0]), 1)

                def fill(j: Any, _: int, last: bool, r: int = r, nothing: Any = nothing, words: list[Any] = words) -> None:
                    behind = T.bool(False) if reached is None else j >= reached
                    with T.If(T.Or(nothing, behind)), T.Then():
                        self.save_weights(r, j, self.exponentials.only_keys(words, last))

                self.each_step(None, fill)
        return read

    def mix(self, row: Any, head: Any, queries: list[Any], sums: list[Any], read: Any) -> None:
        """out = p . v, for the first `read` keys."""
        t, s, u, n = self.t, self.s, self.u, self.u.lanes
        factors = [self.x.factor(head, total) for total in sums]
        shares = [T.bind(total * self.value_zero) for total in sums]

        def tile(first: Any, count: int, last: bool) -> None:
            """`count` vectors of channels."""
            accs = self.accumulators(len(queries), count)
            for line, part in zip(accs, shares, strict=True):
                for acc in line:
                    save(acc, 0, T.broadcast(-part, n), n)
            with loops((0, T.bind(T.shift_right(read + (u.group - 1), T.int32(u.group // 2)))) if self.masked else t.words) as (word,):
                place = T.bind(self.values + (word * t.channels + first) * n)
                values = [self.vector(place + c * n) for c in range(count)]
                for r, line in enumerate(accs):
                    p = self.word(self.p + r * t.line + word)
                    for acc, value in zip(line, values, strict=True):
                        self.add(acc, p, value)
            for line, query, factor in zip(accs, queries, factors, strict=True):
                at = T.bind(T.int32(0) + self.out.at([row, query, head * s.value_size + first * n]))
                for c, acc in enumerate(line):
                    value = T.bind(self.end(load(acc, 0, n), T.broadcast(factor, n), n))
                    present = min(n, s.value_size - (t.channels - 1) * n) if last and c == count - 1 else n
                    for begin, lanes in _powers(present, n):
                        part = value if lanes == n else shuffle([value], range(begin, begin + lanes))
                        save(self.out.buffer, at + (c * n + begin), part, lanes)

        whole = (t.channels - 1) // BLOCKS
        if whole:
            with loops(whole) as (i,):
                tile(T.bind(i * BLOCKS), BLOCKS, False)
        tile(T.int32(whole * BLOCKS), t.channels - whole * BLOCKS, True)


def _powers(extent: int, most: int) -> list[tuple[int, int]]:
    """(first, lanes): vectors of powers of two of up to `most` elements that cover `extent` once."""
    found, first = [], 0
    while first < extent:
        lanes = min(most, 1 << ((extent - first).bit_length() - 1))
        found.append((first, lanes))
        first += lanes
    return found


def attention(unit: Unit, op: OpCall, target: Target, row: str) -> Kernel:
    op = plain_masks(op)
    s = Shape.of(op)
    t = Tiling.of(unit, s)
    units, tiles, shared = s.batch * s.kv_heads * t.parts, -(-s.queries // t.height), s.heads // s.kv_heads
    tasks = task_count(s.macs, units, MACS_PER_TASK)

    def emit(k: Emitter) -> None:
        k.task = aligned_frame(k.task, unit.lanes, k.i32(0), k.i32(0))
        heads = _Heads(k, Operands(k, k.arrays[:-1]), t)
        with loops(share(k, units)) as (unit_of_work,):
            batch, group, part = unravel(unit_of_work, (s.batch, s.kv_heads, t.parts))
            batch = T.bind(T.int32(0) + batch)
            heads.pack_keys(batch, group)
            heads.pack_values(batch, group)
            per = -(-tiles // t.parts)
            span = (0, tiles) if t.parts == 1 else (T.bind(part * per), T.bind(T.min(part * per + per, tiles)))
            with loops(shared, span) as (i, tile):
                heads.block(batch, T.bind(group * shared + i), T.bind(T.min(tile * t.height, s.queries - t.height)))

    arrays = [*arrays_of(op), Exponentials.constants(unit, s.keys)]
    return make_kernel(row, op, target, emit, tasks=tasks, arrays=arrays, macs=s.macs, scratch=4 * tasks * t.places[-1])


def check(unit: Unit, op: OpCall) -> str | None:
    fault = check_attention(op)
    if fault is not None:
        return fault
    if any(o.dtype != "uint8" for o in op.tensors[:3]):
        return "queries, keys and values must be stored as uint8."
    if (np.asarray(op.operands[3]) < 0).any():
        return "multipliers of logits must not be negative."
    sizes = int(op.attrs["size"]), int(op.attrs["value_size"])
    return None if not any(n % unit.group for n in sizes) else f"heads of {sizes[0]} and {sizes[1]} channels; supported: multiples of {unit.group}."


for _unit in (VNNI512, VNNI256, PAIRS):
    _name = _unit.isa.name
    register("qc.attention", PortableRow(f"{_name}/attention", partial(attention, _unit), partial(check, _unit), isa=_name))
