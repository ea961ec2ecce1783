"""Attention where there is VPDPBUSD: blocks of queries of a head against all of its keys, in memory that the first two caches hold.

    once per head:      k as [16 keys][4 channels][16 lanes] and v as [4 keys][channels][4], signed bytes, in scratch
    per six queries:    acc = q . k (+ bias), and its maximum              six queries by 64 keys in registers
                        p = the exponential in 8 bits, and its sum         64 keys at a time: see `_Exponentials`
                        out = (p . v) * (c / sum)                          six queries by 64 channels in registers

q is read as stored, unsigned; -(z_q + 128) * (sum of k) is where each sum begins. z_k adds the same to all logits of a query, which their distance from the
maximum doesn't show. What is behind the last key, up to a multiple of 64, has p = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.numerics.constants import ATTENTION, THRESHOLDS, thresholds
from qcompiler.schedules.builder import Emitter, Requantize, accumulator, aligned_frame, loops, make_kernel, share, splat, task_count, view, when
from qcompiler.schedules.isa import call, load, save, scalar, shuffle
from qcompiler.schedules.portable.attention import MACS_PER_TASK, UNCOUNTED, Operands, Shape, arrays_of, check_attention, plain_masks
from qcompiler.schedules.portable.base import PortableRow
from qcompiler.schedules.portable.nest import interleave
from qcompiler.schedules.portable.threads import unravel
from qcompiler.schedules.table import Kernel, OpCall, register
from qcompiler.schedules.x86.isa import AVX512VNNI as ISA

LANES = ISA.lanes
BLOCKS = 4  # vectors of keys, or of channels, that a block of queries meets at a time
STEP = BLOCKS * LANES  # keys
QUERIES = 6  # of a block: with four vectors 24 accumulators
FLIP = -(0x7F7F7F80)  # 0x80808080: what makes four stored bytes signed ones
UNITS = 16  # of work that should exist at least, for threads to share


@dataclass(frozen=True)
class Tiling:
    """How the work is cut, and where things lie in a task's scratch (in words of 4 bytes)."""

    shape: Shape
    height: int  # queries of a block
    parts: int  # of a head's queries

    @staticmethod
    def of(s: Shape) -> Tiling:
        height = min(QUERIES, s.queries)
        heads = s.batch * s.kv_heads
        return Tiling(s, height, max(1, min(-(-s.queries // height), -(-UNITS // heads), s.macs // heads // MACS_PER_TASK)))

    @property
    def vectors(self) -> int:
        """Of keys."""
        return -(-self.shape.keys // LANES)

    @property
    def steps(self) -> int:
        """Of `STEP` keys, the last of which may have fewer vectors."""
        return -(-self.vectors // BLOCKS)

    @property
    def tail(self) -> int:
        """Vectors of the last step, if that is not a whole one."""
        return self.vectors % BLOCKS

    @property
    def quads(self) -> int:
        """Of keys."""
        return -(-self.shape.keys // 4)

    @property
    def dwords(self) -> int:
        """Of channels of q and k."""
        return self.shape.size // 4

    @property
    def channels(self) -> int:
        """Vectors of channels of v."""
        return -(-self.shape.value_size // LANES)

    @property
    def places(self) -> tuple[int, int, int, int, int]:
        """Where packed k, sums of k, packed v, logits and p begin; and the end."""
        sizes = [self.vectors * self.dwords * LANES, self.vectors * LANES, self.quads * self.channels * LANES, self.height * self.vectors * LANES]
        starts = np.cumsum([0, *sizes]).tolist()
        return (*starts, starts[-1] + self.height * self.steps * LANES)


class _Exponentials:
    """From four vectors of logits to 64 bytes: indices as int16, two look-ups of 32 entries (VPERMW), their product rounded (VPMULHRSW).

    Packs work in parts of 128 bits. Thresholds are laid out so, and one permutation of dwords puts the bytes in order.
    """

    ORDER = tuple(4 * (i % 4) + i // 4 for i in range(LANES))

    @staticmethod
    def constants(keys: int) -> np.ndarray:
        """int16: both tables, the thresholds of 64 keys, and ones in the bytes of the last step's keys."""
        places = [[LANES * (2 * pair + side) + 4 * part + i for part in range(4) for side in (0, 1) for i in range(4)] for pair in (0, 1)]
        last = np.where(np.arange(STEP) < (keys - 1) % STEP + 1, 255, 0).astype(np.uint8)
        return np.concatenate([ATTENTION.coarse, ATTENTION.fine, thresholds(THRESHOLDS)[np.concatenate(places)].astype(np.int16), last.view(np.int16)])

    def __init__(self, buffer: Any, masked: bool) -> None:
        self.coarse, self.fine, self.first, self.second, self.last = (T.bind(load(buffer, 2 * LANES * i, 2 * LANES)) for i in range(5))
        self.masked = masked

    def index(self, acc: Any, top: Any, multiplier: Any) -> Any:
        """int32 of the place in the table."""
        scaled = T.min(
            T.Cast(f"float32x{LANES}", T.broadcast(top, LANES) - acc) * T.broadcast(multiplier, LANES), scalar(float(ATTENTION.last), "float32", LANES)
        )
        if self.masked:  # an overflow of the difference is not looked at
            scaled = T.Select(acc == scalar(UNCOUNTED, "int32", LANES), scalar(float(ATTENTION.last), "float32", LANES), scaled)
        return T.bind(ISA.to_int(scaled))

    def pair(self, a: Any, b: Any, steps: Any) -> Any:
        """int16 of p, for two vectors of places."""
        n = 2 * LANES
        place = T.bind(call(f"int16x{n}", "llvm.x86.avx512.packssdw.512", a, b))
        coarse = call(f"int16x{n}", "llvm.x86.avx512.permvar.hi.512", self.coarse, T.shift_right(place, scalar(ATTENTION.fine_bits, "int16", n)))
        fine = call(f"int16x{n}", "llvm.x86.avx512.permvar.hi.512", self.fine, place)  # its lowest five bits count
        return T.bind(T.shift_right(call(f"int16x{n}", "llvm.x86.avx512.pmul.hr.sw.512", coarse, fine) + steps, scalar(7, "int16", n)))

    def bytes(self, logits: list[Any], top: Any, multiplier: Any, last: bool) -> Any:
        """16 words with the p of 64 keys, for one to four vectors of logits. last: no others follow."""
        places = [self.index(acc, top, multiplier) for acc in logits]
        pairs = [
            self.pair(places[i], places[min(i + 1, len(places) - 1)], steps)
            for i, steps in zip(range(0, len(places), 2), (self.first, self.second), strict=False)
        ]
        packed = T.reinterpret(f"int32x{LANES}", call(f"int8x{STEP}", "llvm.x86.avx512.packuswb.512", pairs[0], pairs[-1]))
        return self.only_keys(T.bind(shuffle([packed], self.ORDER)), last)

    def only_keys(self, packed: Any, last: bool) -> Any:
        return T.bitwise_and(packed, T.reinterpret(f"int32x{LANES}", self.last)) if last else packed


class _Heads:
    """Emits the work on the heads that share one of k and v."""

    def __init__(self, k: Emitter, x: Operands, tiling: Tiling) -> None:
        self.k, self.x, self.t, self.s = k, x, tiling, tiling.shape
        self.end, self.out = Requantize.of(k, k.op.attrs), view(k.output, k.op.output)
        self.value_zero = k.i32(k.op.attrs["zero_points"][2])
        self.masked = any(v is not None for v in (x.mask, x.lengths, x.causal))
        self.exponentials = _Exponentials(k.arrays[-1], self.masked)
        base = T.bind(k.task * tiling.places[-1])
        self.packed, self.sums, self.values, self.logits, self.p = (T.bind(base + p) for p in tiling.places[:-1])

    def word(self, at: Any) -> Any:
        """A word of scratch in every lane, as bytes."""
        return T.bind(T.reinterpret(f"int8x{STEP}", T.broadcast(self.k.scratch[at], LANES)))

    def vector(self, at: Any) -> Any:
        return T.bind(T.reinterpret(f"int8x{STEP}", load(self.k.scratch, at, LANES)))

    def key(self, number: Any) -> Any:
        return T.min(number, T.int32(self.s.keys - 1))

    def pack_keys(self, row: Any, group: Any) -> None:
        """k by tiles of as many keys as there are dwords in a part of their rows; then the first values of the sums."""
        t, x, scratch = self.t, self.x, self.k.scratch
        start = T.bind(-x.zeros[0])
        with loops(t.vectors) as (block,):
            place = T.bind(self.packed + block * (t.dwords * LANES))
            for first, lanes in _powers(t.dwords):
                for begin in range(0, LANES, lanes):
                    rows = []
                    for r in range(begin, begin + lanes):
                        at = x.keys.at([row, self.key(block * LANES + r), group * self.s.size + (x.columns[1] + 4 * first)])
                        words = T.reinterpret("int32" if lanes == 1 else f"int32x{lanes}", load(x.keys.buffer, at, 4 * lanes))
                        rows.append(T.bind(T.bitwise_xor(words, splat(T.int32(FLIP), lanes))))
                    for i, column in enumerate(interleave(rows, lanes) if lanes > 1 else rows):
                        save(scratch, place + ((first + i) * LANES + begin), column, lanes)
            total = accumulator(LANES)
            save(total, 0, scalar(0, "int32", LANES), LANES)
            with loops(t.dwords) as (i,):
                save(total, 0, ISA.dot(load(total, 0, LANES), [scalar(1, "int8", STEP)], [self.vector(place + i * LANES)]), LANES)
            save(scratch, self.sums + block * LANES, load(total, 0, LANES) * T.broadcast(start, LANES), LANES)

    def pack_values(self, row: Any, group: Any) -> None:
        t, x = self.t, self.x
        with loops(t.quads) as (quad,):
            for first, lanes in _powers(self.s.value_size):
                rows = []
                for r in range(4):
                    at = x.values.at([row, self.key(quad * 4 + r), group * self.s.value_size + (x.columns[2] + first)])
                    rows.append(T.bind(load(x.values.buffer, at, lanes)))
                for i, part in enumerate(interleave(rows, lanes)):
                    words = T.bitwise_xor(T.reinterpret(f"int32x{lanes // 4}" if lanes > 4 else "int32", part), splat(T.int32(FLIP), lanes // 4))
                    save(self.k.scratch, self.values + quad * (t.channels * LANES) + (first + i * lanes // 4), words, lanes // 4)

    def each_step(self, reached: Any, body: Callable[[Any, int, bool], None]) -> None:
        """`body(first key, vectors, whether it is the last)` for steps that hold `reached` keys (None: all)."""
        t = self.t
        ragged = bool(t.shape.keys % STEP)
        whole = t.steps - ragged
        if whole:
            count = whole if reached is None else T.bind(T.min(T.int32(whole), T.shift_right(reached + (STEP - 1), T.int32(6))))
            with loops((0, count) if reached is not None else whole) as (i,):
                body(T.bind(i * STEP), BLOCKS, False)
        if ragged:
            with when(None if reached is None or not whole else reached > T.int32(whole * STEP)):
                body(T.int32(whole * STEP), t.tail or BLOCKS, True)

    def block(self, row: Any, head: Any, first: Any) -> None:
        """`height` queries from the first one on."""
        t, x, s = self.t, self.x, self.s
        queries = [T.bind(first + r) for r in range(t.height)]
        limits = [x.limit(row, query) for query in queries]
        reached = limits[-1]  # the last query's keys are all that any counts
        largest = [accumulator(LANES) for _ in queries]
        for top in largest:
            save(top, 0, scalar(UNCOUNTED, "int32", LANES), LANES)
        self.each_step(reached, lambda j, n, last: self.products(row, head, queries, limits, largest, j, n, last))
        multiplier = T.bind(x.multipliers.buffer[head])
        tops = [T.bind(call("int32", "llvm.vector.reduce.smax", load(top, 0, LANES))) for top in largest]
        sums = [self.weights(r, top, multiplier, reached) for r, top in enumerate(tops)]
        read = s.keys
        if self.masked:
            totals = [accumulator(1) for _ in sums]
            for total, value in zip(totals, sums, strict=True):
                save(total, 0, value, 1)
            read = self.fill_rows_of_nothing(tops, totals, reached)
            sums = [T.bind(total[0]) for total in totals]
        self.mix(row, head, queries, sums, read)

    def products(self, row: Any, head: Any, queries: list[Any], limits: list[Any], largest: list[Any], j: Any, n: int, last: bool) -> None:
        """Logits of `n` vectors of keys from key j on."""
        t, x = self.t, self.x
        accs = [[accumulator(LANES) for _ in range(n)] for _ in queries]
        for v in range(n):
            start = T.bind(load(self.k.scratch, self.sums + j + v * LANES, LANES))
            for line in accs:
                save(line[v], 0, start, LANES)
        places = [T.bind(T.int32(0) + x.q.at([row, query, head * self.s.size + x.columns[0]])) for query in queries]
        keys = [T.bind(self.packed + (j + v * LANES) * t.dwords) for v in range(n)]
        with loops(t.dwords) as (i,):
            vectors = [self.vector(key + i * LANES) for key in keys]
            for place, line in zip(places, accs, strict=True):
                q = ISA.activation(x.q.buffer, place + i * 4, 4)
                for acc, key in zip(line, vectors, strict=True):
                    save(acc, 0, ISA.dot(load(acc, 0, LANES), q, [key]), LANES)
        for r, (line, query, limit, top) in enumerate(zip(accs, queries, limits, largest, strict=True)):
            found = [load(top, 0, LANES)]
            for v, acc in enumerate(line):
                present = min(LANES, self.s.keys - (t.steps - 1) * STEP - v * LANES) if last else LANES
                value = x.logit(load(acc, 0, LANES), (row, head, query), limit, T.bind(j + v * LANES), LANES, present)
                save(self.k.scratch, self.logits + (r * t.vectors + v) * LANES + j, value, LANES)
                if present < LANES:
                    value = T.Select(T.ramp(T.int32(0), 1, LANES) < scalar(present, "int32", LANES), value, scalar(UNCOUNTED, "int32", LANES))
                found.append(value)
            while len(found) > 1:
                found = [*found[2:], T.bind(T.max(found[0], found[1]))]
            save(top, 0, found[0], LANES)

    def weights(self, r: int, top: Any, multiplier: Any, reached: Any) -> Any:
        """p of query r of the block; returns their sum."""
        t, scratch = self.t, self.k.scratch
        total = accumulator(LANES)
        save(total, 0, scalar(0, "int32", LANES), LANES)

        def step(j: Any, n: int, last: bool) -> None:
            logits = [T.bind(load(scratch, self.logits + (r * t.vectors + v) * LANES + j, LANES)) for v in range(n)]
            p = T.bind(self.exponentials.bytes(logits, top, multiplier, last))
            save(scratch, self.place(r, j), p, LANES)
            save(total, 0, ISA.dot(load(total, 0, LANES), [T.reinterpret(f"int8x{STEP}", p)], [scalar(1, "int8", STEP)]), LANES)

        self.each_step(reached, step)
        return T.bind(call("int32", "llvm.vector.reduce.add", load(total, 0, LANES)))

    def place(self, r: int, j: Any) -> Any:
        """Of the p of query r of the block and of key j, a multiple of 4."""
        return self.p + r * self.t.steps * LANES + T.shift_right(j, T.int32(2))

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
                value = T.bind(T.broadcast(T.Select(nothing, T.int32(-1), T.int32(0)), LANES))
                save(total, 0, T.Select(nothing, T.int32(255 * s.keys), total[0]), 1)

                def fill(j: Any, n: int, last: bool, r: int = r, nothing: Any = nothing, value: Any = value) -> None:
                    behind = T.bool(False) if reached is None else j >= reached
                    with T.If(T.Or(nothing, behind)), T.Then():
                        save(self.k.scratch, self.place(r, j), self.exponentials.only_keys(value, last), LANES)

                self.each_step(None, fill)
        return read

    def mix(self, row: Any, head: Any, queries: list[Any], sums: list[Any], read: Any) -> None:
        """out = p . v, for the first `read` keys."""
        t, s = self.t, self.s
        factors = [self.x.factor(head, total) for total in sums]
        shares = [T.bind(total * self.value_zero) for total in sums]

        def tile(first: Any, n: int, last: bool) -> None:
            """`n` vectors of channels."""
            accs = [[accumulator(LANES) for _ in range(n)] for _ in queries]
            for line, part in zip(accs, shares, strict=True):
                for acc in line:
                    save(acc, 0, T.broadcast(-part, LANES), LANES)
            with loops((0, T.bind(T.shift_right(read + 3, T.int32(2)))) if self.masked else t.quads) as (quad,):
                place = T.bind(self.values + (quad * t.channels + first) * LANES)
                values = [self.vector(place + c * LANES) for c in range(n)]
                for r, line in enumerate(accs):
                    p = self.word(self.place(r, quad * 4))
                    for acc, value in zip(line, values, strict=True):
                        save(acc, 0, ISA.dot(load(acc, 0, LANES), [p], [value]), LANES)
            for line, query, factor in zip(accs, queries, factors, strict=True):
                at = T.bind(T.int32(0) + self.out.at([row, query, head * s.value_size + first * LANES]))
                for c, acc in enumerate(line):
                    value = T.bind(self.end(load(acc, 0, LANES), T.broadcast(factor, LANES), LANES))
                    present = min(LANES, s.value_size - (t.channels - 1) * LANES) if last and c == n - 1 else LANES
                    for begin, lanes in _powers(present):
                        part = value if lanes == LANES else shuffle([value], range(begin, begin + lanes))
                        save(self.out.buffer, at + (c * LANES + begin), part, lanes)

        whole, rest = divmod(t.channels, BLOCKS)
        whole, rest = (whole - 1, BLOCKS) if whole and not rest else (whole, rest)
        if whole:
            with loops(whole) as (i,):
                tile(T.bind(i * BLOCKS), BLOCKS, False)
        tile(T.int32(whole * BLOCKS), rest, True)


def _powers(extent: int) -> list[tuple[int, int]]:
    """(first, lanes): vectors of up to 16 elements, powers of two, that cover `extent` once."""
    found, first = [], 0
    while first < extent:
        lanes = min(LANES, 1 << ((extent - first).bit_length() - 1))
        found.append((first, lanes))
        first += lanes
    return found


def attention(op: OpCall, target: Target, row: str) -> Kernel:
    op = plain_masks(op)
    s = Shape.of(op)
    t = Tiling.of(s)
    units, tiles, shared = s.batch * s.kv_heads * t.parts, -(-s.queries // t.height), s.heads // s.kv_heads
    tasks = task_count(s.macs, units, MACS_PER_TASK)

    def emit(k: Emitter) -> None:
        k.task = aligned_frame(k.task, LANES, k.i32(0), k.i32(0))
        heads = _Heads(k, Operands(k, k.arrays[:-1]), t)
        with loops(share(k, units)) as (unit,):
            batch, group, part = unravel(unit, (s.batch, s.kv_heads, t.parts))
            batch = T.bind(T.int32(0) + batch)
            heads.pack_keys(batch, group)
            heads.pack_values(batch, group)
            per = -(-tiles // t.parts)
            span = (0, tiles) if t.parts == 1 else (T.bind(part * per), T.bind(T.min(part * per + per, tiles)))
            with loops(shared, span) as (i, tile):
                heads.block(batch, T.bind(group * shared + i), T.bind(T.min(tile * t.height, s.queries - t.height)))

    arrays = [*arrays_of(op), _Exponentials.constants(s.keys)]
    return make_kernel(row, op, target, emit, tasks=tasks, arrays=arrays, macs=s.macs, scratch=4 * tasks * t.places[-1])


def _check(op: OpCall) -> str | None:
    fault = check_attention(op)
    if fault is not None:
        return fault
    if any(o.dtype != "uint8" for o in op.tensors[:3]):
        return "queries, keys and values must be stored as uint8."
    if (np.asarray(op.operands[3]) < 0).any():
        return "multipliers of logits must not be negative."
    sizes = int(op.attrs["size"]), int(op.attrs["value_size"])
    return None if not any(n % 4 for n in sizes) else f"heads of {sizes[0]} and {sizes[1]} channels; supported: multiples of 4."


register("qc.attention", PortableRow(f"{ISA.name}/attention", attention, _check, isa=ISA.name))
