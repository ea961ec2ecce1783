"""Attention as one operator: up to four queries of a head at a time, their logits in scratch, never as a tensor.

    for each key:      acc[query] = q . k                                     both operands read once per four queries
    along the keys:    acc += bias; the largest of those that count           vectors of keys
    along the keys:    acc becomes p, the exponential in 8 bits, and its sum
    for each key:      out[query] += p * v                                    vectors of channels
    then               out * (c / sum)

A task has blocks of queries of its own. Keys behind the last one that counts for a block (by causality or length) are not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.numerics.constants import ATTENTION, MAX_LOGIT, THRESHOLDS, attention_fault, thresholds
from qcompiler.schedules import avx2
from qcompiler.schedules.builder import (
    Emitter,
    Requantize,
    View,
    accumulator,
    cast,
    centered_bytes,
    load,
    loops,
    make_kernel,
    offset_of,
    quotient,
    share,
    splat,
    store,
    task_count,
    vectors,
    view,
)
from qcompiler.schedules.isa import call, shuffle
from qcompiler.schedules.portable.base import portable
from qcompiler.schedules.portable.normalization import Fold, index_of, runs
from qcompiler.schedules.portable.threads import unravel
from qcompiler.schedules.table import Kernel, Layout, OpCall

QUERIES = 4  # of a block
# The logit of a key that doesn't count; others are above -2^30. Not the least int32: TVM moves constants across comparisons, and that one has no negative.
UNCOUNTED = -(2**31 - 1)
MACS_PER_TASK = 500_000


@dataclass(frozen=True)
class Shape:
    """What the operands' shapes and the attributes say."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    size: int
    value_size: int

    @staticmethod
    def of(op: OpCall) -> Shape:
        (batch, queries, _), keys, a = op.operands[0].shape, op.operands[1].shape[1], op.attrs
        return Shape(batch, queries, keys, *(int(a[name]) for name in ("heads", "kv_heads", "size", "value_size")))

    @property
    def macs(self) -> int:
        return self.batch * self.heads * self.queries * self.keys * (self.size + self.value_size)


class Operands:
    """Reads the operands of the operator; `row`, `head`, `query` are scalars, and keys and channels the start of vectors. Shared by all targets."""

    def __init__(self, k: Emitter, arrays: Sequence[Any] | None = None) -> None:
        """arrays: those of `arrays_of`; None: all of the kernel's."""
        a, arrays = k.op.attrs, k.arrays if arrays is None else arrays
        self.k, self.shape, self.columns = k, Shape.of(k.op), [int(c) for c in a["columns"]]
        views = k.operands()
        self.q, self.keys, self.values, self.multipliers, self.out_multipliers = views[:5]
        self.zeros = [k.i32(z + offset_of(v.dtype)) for z, v in zip(a["zero_points"], views, strict=False)]
        extras = dict(zip(a.get("extra", ()), views[5:], strict=True))
        self.bias, self.mask, self.lengths = (extras.get(name) for name in ("bias", "mask", "lengths"))
        *_, self.table, self.steps = arrays[: len(arrays) - (self.bias is not None)]
        self.factors = arrays[-1] if self.bias is not None else None
        self.one_factor = len(a.get("bias_multipliers", ())) == 1
        self.causal = a.get("causal")

    def query(self, row: Any, head: Any, query: Any, channel: Any, lanes: int) -> Any:
        """int16 of q - z_q: as int32 beside the product, so that LLVM sees 16-bit factors there."""
        at = self.q.at([row, query, head * self.shape.size + (self.columns[0] + channel)])
        return centered_bytes(load(self.q.buffer, at, lanes), self.zeros[0], lanes)

    def shared(self, head: Any) -> Any:
        """The head of k and v that a head of q reads."""
        return T.truncdiv(head * self.shape.kv_heads, self.shape.heads)

    def key(self, row: Any, group: Any, key: Any, channel: Any, lanes: int) -> Any:
        at = self.keys.at([row, key, group * self.shape.size + (self.columns[1] + channel)])
        return centered_bytes(load(self.keys.buffer, at, lanes), self.zeros[1], lanes)

    def value(self, row: Any, group: Any, key: Any, channel: Any, lanes: int) -> Any:
        at = self.values.at([row, key, group * self.shape.value_size + (self.columns[2] + channel)])
        return cast("int32", centered_bytes(load(self.values.buffer, at, lanes), self.zeros[2], lanes), lanes)

    def limit(self, row: Any, query: Any) -> Any:
        """How many keys may count, by length and causality: an int32 in [0, T]; None: all."""
        found = None
        if self.lengths is not None:
            length = T.Cast("int64", self.lengths.buffer[self.lengths.at([row])])
            found = T.Cast("int32", T.max(T.min(length, T.int64(self.shape.keys)), T.int64(0)))
        if self.causal is not None:
            reach = T.max(T.min(query + (int(self.causal) + 1), T.int32(self.shape.keys)), T.int32(0))
            found = reach if found is None else T.min(found, reach)
        return None if found is None else T.bind(found)

    def _extra(self, tensor: View, row: Any, head: Any, query: Any, key: Any, lanes: int, present: int) -> Any:
        """Of a tensor [B', 1 or H, 1 or S, T]; only the first `present` lanes are read."""
        index = [T.truncmod(row, tensor.shape[0]), *(i if e > 1 else 0 for i, e in zip((head, query), tensor.shape[1:3], strict=True)), key]
        if present == lanes:
            return load(tensor.buffer, tensor.at(index), lanes)
        read = [load(tensor.buffer, tensor.at([*index[:3], key + first]), n) for first, n in _pieces(present, lanes)]
        return shuffle([*read, splat(tirx.const(0, tensor.dtype), lanes)], range(lanes))

    def _added(self, row: Any, head: Any, query: Any, key: Any, lanes: int, present: int) -> Any:
        """int32 of the bias times its multiplier; None without one."""
        if self.bias is None or self.factors is None:
            return None
        value = cast("int32", self._extra(self.bias, row, head, query, key, lanes, present), lanes) - splat(T.int32(offset_of(self.bias.dtype)), lanes)
        return value * splat(self.factors[0 if self.one_factor else head], lanes)

    def _masked(self, row: Any, head: Any, query: Any, key: Any, lanes: int, present: int) -> Any:
        """Whether the mask lets keys count; None without one."""
        if self.mask is None:
            return None
        value = self._extra(self.mask, row, head, query, key, lanes, present)
        return value != splat(tirx.const(offset_of(self.mask.dtype), self.mask.dtype), lanes)

    def factor(self, head: Any, total: Any) -> Any:
        """The multiplier of a row's result, from the sum of its p."""
        return quotient(self.k, self.out_multipliers.buffer[head], T.Cast("float32", total))

    def logit(self, product: Any, place: tuple[Any, Any, Any], limit: Any, key: Any, lanes: int, present: int = 0) -> Any:
        """q . k with its bias, or `UNCOUNTED`; `place`: batch row, head, query; `limit`: see there. present: how many keys there are, the others being
        behind the last one (0: all)."""
        added, counts = self._added(*place, key, lanes, present or lanes), self._masked(*place, key, lanes, present or lanes)
        acc = product if added is None else product + added
        if limit is not None:
            reached = (T.ramp(key, 1, lanes) if lanes > 1 else key) < splat(limit, lanes)
            counts = reached if counts is None else T.And(counts, reached)
        return T.bind(acc if counts is None else T.Select(counts, acc, splat(T.int32(UNCOUNTED), lanes)))

    def nothing(self, top: Any) -> Any:
        """Whether no key counts, by the greatest logit; None: that can't be."""
        can_be = self.mask is not None or self.lengths is not None or self.causal is not None
        return T.bind(top == T.int32(UNCOUNTED)) if can_be else None

    def weight(self, acc: Any, top: Any, nothing: Any, multiplier: Any, key: Any, lanes: int) -> Any:
        """p of a logit."""
        near = acc if nothing is None else T.max(acc, splat(T.int32(-MAX_LOGIT), lanes))  # no difference may leave int32
        index = index_of(self.k, splat(top, lanes) - near, multiplier, ATTENTION, lanes)
        if nothing is not None:
            far = T.Select(nothing, T.int32(0), T.int32(ATTENTION.last))
            index = T.bind(T.Select(acc == splat(T.int32(UNCOUNTED), lanes), splat(far, lanes), index))
        e = cast("int32", self.table[index], lanes)
        step = load(self.steps, T.bitwise_and(key, T.int32(THRESHOLDS - 1)), lanes)
        return T.bind(T.shift_right(e + step, splat(T.int32(7), lanes)))


def plain_masks(op: OpCall) -> OpCall:
    """Booleans are read as bytes."""

    def plain(o: Layout | np.ndarray) -> Layout | np.ndarray:
        return o if str(o.dtype) != "bool" else replace(o, dtype="int8") if isinstance(o, Layout) else o.astype("int8")

    return replace(op, operands=[plain(o) for o in op.operands])


def arrays_of(op: OpCall) -> list[np.ndarray]:
    """Constant operands, the exponentials and their thresholds, and the bias's multipliers, if there is one."""
    operands = [np.asarray(o) for o in op.operands if isinstance(o, np.ndarray)]
    factors = [np.asarray(op.attrs["bias_multipliers"], np.int32)] if "bias" in op.attrs.get("extra", ()) else []
    return [*operands, ATTENTION.table.astype(np.int16), thresholds(THRESHOLDS).astype(np.int32), *factors]


def attention(op: OpCall, target: Target, row: str) -> Kernel:
    """The kernel of CPUs."""
    op = plain_masks(op)
    s = Shape.of(op)
    whole, rest = divmod(s.queries, QUERIES)
    units = s.batch * s.heads * (whole + rest)
    tasks = task_count(s.macs, units, MACS_PER_TASK)

    def emit(k: Emitter) -> None:
        x, end = Operands(k), Requantize.of(k, op.attrs)
        base = T.bind(k.task * (QUERIES * s.keys))
        with loops(share(k, units)) as (unit,):
            batch, head, block = unravel(unit, (s.batch, s.heads, whole + rest))
            if whole and rest:
                with T.If(block < whole):
                    with T.Then():
                        _block(x, end, (batch, head, T.bind(block * QUERIES)), QUERIES, base)
                    with T.Else():
                        _block(x, end, (batch, head, T.bind(block + whole * (QUERIES - 1))), 1, base)
            else:
                count = QUERIES if whole else 1
                _block(x, end, (batch, head, T.bind(block * count)), count, base)

    return make_kernel(row, op, target, emit, tasks=tasks, arrays=arrays_of(op), macs=s.macs, scratch=4 * tasks * QUERIES * s.keys)


def _block(x: Operands, end: Requantize, place: tuple[Any, Any, Any], count: int, base: Any) -> None:
    """`count` queries from `place` (batch row, head, query) on; `base`: of their words in scratch."""
    row, head, first = place
    k, s = x.k, x.shape
    group = T.bind(x.shared(head))
    queries = [T.bind(first + r) for r in range(count)]
    limits = [x.limit(row, query) for query in queries]
    reached = T.int32(s.keys) if limits[-1] is None else limits[-1]  # the last query's keys are all that any counts
    lines = [T.bind(base + r * s.keys) for r in range(count)]
    _logits(x, (row, head, group), queries, lines, reached)
    sums, read = [], reached
    for r, query in enumerate(queries):
        total, nothing = _exponentials(x, (row, head, query), limits[r], lines[r])
        sums.append(total)
        read = read if nothing is None else T.max(read, T.Select(nothing, T.int32(s.keys), T.int32(0)))
    read = T.bind(T.int32(0) + read)
    factors = [x.factor(head, total) for total in sums]
    out = view(k.output, k.op.output)

    def channels(c: Any, n: int) -> None:
        accs = [accumulator(n) for _ in queries]
        for acc in accs:
            store(acc, 0, splat(T.int32(0), n), n)
        with T.serial(0, read) as j:
            v = T.bind(x.value(row, group, j, c, n))
            for acc, line in zip(accs, lines, strict=True):
                p = splat(T.Cast("int32", T.Cast("int16", k.scratch[line + j])), n)  # 16-bit multipliers will do
                store(acc, 0, load(acc, 0, n) + p * v, n)
        for acc, query, factor in zip(accs, queries, factors, strict=True):
            at = out.at([row, query, head * s.value_size + c])
            store(out.buffer, at, end(load(acc, 0, n), splat(factor, n), n), n)

    vectors(s.value_size, max(1, k.width // 2), channels)


def _pieces(extent: int, lanes: int) -> list[tuple[int, int]]:
    """(first, lanes): vectors of powers of two that cover `extent` elements once."""
    found, first = [], 0
    while first < extent:
        n = min(lanes, 1 << ((extent - first).bit_length() - 1))
        found.append((first, n))
        first += n
    return found


def _logits(x: Operands, place: tuple[Any, Any, Any], queries: list[Any], lines: list[Any], reached: Any) -> None:
    """scratch[line + key] = q . k."""
    (row, head, group), k = place, x.k
    pieces = _pieces(x.shape.size, avx2.PAIRS if k.avx2 else max(1, k.width // 2))
    loaded = [[T.bind(x.query(row, head, query, c, n)) for c, n in pieces] for query in queries]
    with T.serial(0, reached) as j:
        keys = [T.bind(x.key(row, group, j, c, n)) for c, n in pieces]
        for line, parts in zip(lines, loaded, strict=True):
            T.buffer_store(k.scratch, _dot(k, parts, keys, [n for _, n in pieces]), [line + j])


def _dot(k: Emitter, q: list[Any], key: list[Any], lanes: list[int]) -> Any:
    """The sum of products of int16 vectors: vectors of as many lanes are added before their lanes are."""
    sums: dict[int, Any] = {}
    for a, b, n in zip(q, key, lanes, strict=True):
        paired = k.avx2 and n == avx2.PAIRS
        product, width = (avx2.multiply_pairs(a, b), avx2.WORDS) if paired else (cast("int32", a, n) * cast("int32", b, n), n)
        sums[width] = product if width not in sums else sums[width] + product
    totals = [v if n == 1 else call("int32", "llvm.vector.reduce.add", v) for n, v in sums.items()]
    return sum(totals[1:], totals[0])


def _exponentials(x: Operands, place: tuple[Any, Any, Any], limit: Any, line: Any) -> tuple[Any, Any]:
    """scratch[line + key] becomes p; returns its sum, and whether no key counts (None: that can't be)."""
    k, keys = x.k, x.shape.keys
    lanes = min(k.width // 4, 1 << (keys.bit_length() - 1), THRESHOLDS)
    largest, total = Fold(lanes, "int32", UNCOUNTED, largest=True), Fold(lanes, "int32", 0)

    def logit(j: Any, n: int) -> None:
        acc = x.logit(load(k.scratch, line + j, n), place, limit, j, n)
        store(k.scratch, line + j, acc, n)
        largest.add(acc, n)

    runs(keys, lanes, logit)
    top, multiplier = largest.result(), T.bind(x.multipliers.buffer[place[1]])
    nothing = x.nothing(top)

    def exponential(j: Any, n: int) -> None:
        p = x.weight(T.bind(load(k.scratch, line + j, n)), top, nothing, multiplier, j, n)
        store(k.scratch, line + j, p, n)
        total.add(p, n)

    runs(keys, lanes, exponential)
    return total.result(), nothing


def check_attention(op: OpCall) -> str | None:
    if not all(isinstance(o, np.ndarray) for o in op.operands[3:5]):
        return "multipliers must be constants."
    if not all(isinstance(o, Layout) for o in op.operands[:3]):
        return "queries, keys and values must be computed at run time."
    return attention_fault([o.shape for o in op.operands], op.attrs)


portable("qc.attention", attention, check=check_attention)
