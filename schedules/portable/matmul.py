"""Matrix product of two computed operands: a register tile of 4 rows times two vectors of int32, on AVX2 by products of pairs."""

from __future__ import annotations

import itertools
import math
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


def matmul(op: OpCall, target: Target, row: str) -> Kernel:
    """`acc = sum (a - za) * (b - zb)` over the last axis of a and the last but one of b; batch axes broadcast as in numpy."""
    at = op.attrs
    *batch, m, n = op.output.shape
    depth = op.operands[0].shape[-1]
    rows = min(4, 1 << (m.bit_length() - 1))
    count = math.prod(batch)
    macs = count * m * n * depth
    tasks = task_count(macs, max(batch, default=1) if count > 1 else m // rows, 500_000)

    paired = vector_bytes(target) == avx2.BYTES and n >= 8
    steps = -(-depth // 2)  # of the reduction, two elements at a time

    def emit(k: Emitter) -> None:
        left, right = k.operands()
        a, b = left.broadcast([*batch, m, depth]), right.broadcast([*batch, depth, n])
        a_zero, b_zero = k.i32(at["a_zero_point"] + offset_of(a.dtype)), k.i32(at["b_zero_point"] + offset_of(b.dtype))
        multiplier = k.f32(at["multiplier"])
        out = view(k.output, op.output)
        low, high = (k.f32_or_none(at.get(name)) for name in ("float_low", "float_high"))
        end = None if out.dtype == "float32" else Requantize.of(k, at, 255.0 * 255.0 * depth * at["multiplier"])
        words: Any = T.bind(k.task * (rows * steps)) if paired else None  # where those of this task begin
        extents: list[Any] = list(batch)
        if count > 1:
            widest = max(range(len(batch)), key=lambda d: batch[d])
            extents[widest] = share(k, batch[widest])
        along = -(-m // rows) if count > 1 else tiles(k, m, rows)
        with loops(*extents, along) as (*index, tile):
            first = T.bind(T.min(tile * rows, m - rows))

            def finish(r: int, c: Any, value: Any, lanes: int) -> None:
                scale = splat(multiplier, lanes)
                result = clamp(cast("float32", value, lanes) * scale, low, high, lanes) if end is None else end(value, scale, lanes)
                store(out.buffer, out.at([*index, first + r, c]), result, lanes)

            def store_pairs() -> None:
                """Rows of a without their zero point, as pairs of int16 in words of scratch; an odd last one is paired with 0."""
                zeros, whole = splat(T.Cast("int16", a_zero), 16), depth // 16
                for r in range(rows):
                    start, place = T.bind(a.at([*index, first + r, 0])), words + r * steps
                    with loops(whole) as (i,):
                        x = cast("int16", load(a.buffer, start + i * 16, 16), 16) - zeros
                        store(k.scratch, place + i * 8, T.reinterpret("int32x8", x), 8)
                    for i in range(whole * 8, steps):
                        even, odd = (centered(a.buffer[start + j], a_zero, 1) if j < depth else T.int32(0) for j in (2 * i, 2 * i + 1))
                        store(k.scratch, place + i, T.bitwise_or(T.bitwise_and(even, T.int32(0xFFFF)), T.shift_left(odd, T.int32(16))), 1)

            def pairs(c: Any, lanes: int) -> None:
                """`columns` for AVX2, which multiplies two adjacent int16 by two others and adds: two steps of the reduction at once."""
                accs = [[accumulator(8) for _ in range(lanes // 8)] for _ in range(rows)]
                for acc in itertools.chain(*accs):
                    store(acc, 0, splat(T.int32(0), 8), 8)
                zeros = T.bind(splat(T.Cast("int16", b_zero), 16))
                with loops(steps) as (i,):
                    second = T.min(i * 2 + 1, depth - 1) if depth % 2 else i * 2 + 1
                    even, odd = (load(b.buffer, b.at([*index, j, c]), lanes) for j in (i * 2, second))
                    ys = [T.bind(y - zeros) for y in avx2.pairs_of(even, odd, lanes)]
                    for r, acc in enumerate(accs):
                        x = T.bind(T.reinterpret("int16x16", splat(k.scratch[words + r * steps + i], 8)))
                        for part, y in zip(acc, ys, strict=True):
                            store(part, 0, load(part, 0, 8) + avx2.multiply_pairs(x, y), 8)
                for r, acc in enumerate(accs):
                    finish(r, c, T.bind(T.Shuffle([load(part, 0, 8) for part in acc], list(range(lanes)))), lanes)

            if paired:
                store_pairs()

            def columns(c: Any, lanes: int) -> None:
                if paired and lanes >= 8:
                    pairs(c, lanes)
                    return
                accs = [accumulator(lanes) for _ in range(rows)]
                for acc in accs:
                    store(acc, 0, splat(T.int32(0), lanes), lanes)
                with loops(depth) as (i,):
                    y = T.bind(centered(load(b.buffer, b.at([*index, i, c]), lanes), b_zero, lanes))
                    for r, acc in enumerate(accs):
                        x = T.bind(centered(a.buffer[a.at([*index, first + r, i])], a_zero, 1))
                        store(acc, 0, load(acc, 0, lanes) + splat(x, lanes) * y, lanes)
                for r, acc in enumerate(accs):
                    finish(r, c, load(acc, 0, lanes), lanes)

            vectors(n, k.width // 2, columns)

    return make_kernel(row, op, target, emit, tasks=tasks, arrays=constants_of(op), macs=macs, scratch=4 * tasks * rows * steps if paired else 0)


portable("qc.matmul", matmul)
