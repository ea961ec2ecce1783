"""Matrix product of two computed operands: a register tile of 4 rows times two vectors of int32."""

from __future__ import annotations

import itertools
import math
from typing import Any

from tvm.script.ir_builder import tirx as T

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
    vectors,
    view,
)
from qcompiler.schedules.portable.base import portable
from qcompiler.schedules.portable.elementwise import constants_of
from qcompiler.schedules.table import Kernel, OpCall
from qcompiler.targets import Target


def matmul(op: OpCall, target: Target, row: str) -> Kernel:
    """`acc = sum (a - za) * (b - zb)` over the last axis of a and the last but one of b; batch axes broadcast as in numpy."""
    at = op.attrs
    *batch, m, n = op.output.shape
    depth = op.operands[0].shape[-1]
    rows = min(4, 1 << (m.bit_length() - 1))
    count = math.prod(batch)
    macs = count * m * n * depth
    tasks = task_count(macs, max(batch, default=1) if count > 1 else m // rows, 500_000)

    def emit(k: Emitter) -> None:
        left, right = k.operands()
        a, b = left.broadcast([*batch, m, depth]), right.broadcast([*batch, depth, n])
        a_zero, b_zero = k.i32(at["a_zero_point"] + offset_of(a.dtype)), k.i32(at["b_zero_point"] + offset_of(b.dtype))
        multiplier = k.f32(at["multiplier"])
        out = view(k.output, op.output)
        low, high = (k.f32_or_none(at.get(name)) for name in ("float_low", "float_high"))
        end = None if out.dtype == "float32" else Requantize.of(k, at, 255.0 * 255.0 * depth * at["multiplier"])
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

            def pairs(c: Any, lanes: int) -> None:
                """`columns` for AVX2, which multiplies two adjacent int16 by two others and adds: two steps of the reduction at once."""
                accs = [[accumulator(8) for _ in range(lanes // 8)] for _ in range(rows)]
                for acc in itertools.chain(*accs):
                    store(acc, 0, splat(T.int32(0), 8), 8)
                a_zeros, b_zeros = (T.bind(splat(T.Cast("int16", z), 16)) for z in (a_zero, b_zero))

                def step(i: Any, single: bool) -> None:
                    steps = [load(b.buffer, b.at([*index, j, c]), lanes) for j in (i, i if single else i + 1)]
                    ys = [T.bind(y - b_zeros) for y in avx2.pairs_of(steps[0], steps[1], lanes)]
                    for r, acc in enumerate(accs):
                        place = T.bind(a.at([*index, first + r, i]))
                        if single:  # the second of each pair is multiplied by 0
                            word = T.bitwise_and(centered(a.buffer[place], a_zero, 1), T.int32(0xFFFF))
                            x = T.bind(T.reinterpret("int16x16", splat(word, 8)))
                        else:
                            word = T.reinterpret("int16", load(a.buffer, place, 2))
                            x = T.bind(cast("int16", T.reinterpret(f"{a.dtype}x16", splat(word, 8)), 16) - a_zeros)
                        for part, y in zip(acc, ys, strict=True):
                            store(part, 0, load(part, 0, 8) + avx2.multiply_pairs(x, y), 8)

                with loops(depth // 2) as (i,):
                    step(i * 2, single=False)
                if depth % 2:
                    step(T.int32(depth - 1), single=True)
                for r, acc in enumerate(accs):
                    finish(r, c, T.bind(T.Shuffle([load(part, 0, 8) for part in acc], list(range(lanes)))), lanes)

            def columns(c: Any, lanes: int) -> None:
                if k.avx2 and k.width == avx2.BYTES and lanes >= 8:
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

    return make_kernel(row, op, target, emit, tasks=tasks, arrays=constants_of(op), macs=macs)


portable("qc.matmul", matmul)
