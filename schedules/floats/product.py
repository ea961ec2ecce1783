"""`qc.f32.matmul`: the product of two computed tensors, in register tiles of four rows; sums run along the reduction in its order.

task -> rows of one product of the batch -> columns, as wide as registers allow -> reduction
"""

from __future__ import annotations

import math
from typing import Any

from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.schedules.builder import Emitter, accumulator, load, loops, make_kernel, share, splat, store, task_count, vector_bytes, view
from qcompiler.schedules.floats.math import f32, fma, runs
from qcompiler.schedules.floats.pointwise import LANES
from qcompiler.schedules.portable.base import portable
from qcompiler.schedules.portable.elementwise import constants_of
from qcompiler.schedules.table import Kernel, OpCall

ROWS = 4
MACS_PER_TASK = 200_000


def matmul(op: OpCall, target: Target, row: str) -> Kernel:
    """a [..., M, K], b [..., K, N], either one constant or not; batch axes broadcast as in numpy."""
    *batch, m, n = op.output.shape
    depth = op.operands[0].shape[-1]
    height = min(ROWS, 1 << (m.bit_length() - 1))
    macs, count, lines = math.prod(op.output.shape) * depth, math.prod(batch), -(-m // height)
    wide = 4 if vector_bytes(target) == 64 else 1  # vectors of 16 that a row's sums are held in

    def emit(k: Emitter) -> None:
        left, right = k.operands()
        a, b, out = left.broadcast([*batch, m, depth]), right.broadcast([*batch, depth, n]), view(k.output, op.output)

        def columns(index: list[Any], first: Any, at: Any, vectors: int, lanes: int) -> None:
            accs = [[accumulator(lanes, "float32") for _ in range(vectors)] for _ in range(height)]
            for acc in (acc for line in accs for acc in line):
                store(acc, 0, f32(0.0, lanes), lanes)
            starts = [T.bind(T.int32(0) + a.at([*index, first + r, 0])) for r in range(height)]
            base = T.bind(b.at([*index, 0, at]))
            with loops(depth) as (d,):
                line = T.bind(base + d * b.strides[-2])
                ys = [T.bind(load(b.buffer, line + j * lanes, lanes)) for j in range(vectors)]
                for start, sums in zip(starts, accs, strict=True):
                    x = T.bind(splat(a.buffer[start + d * a.strides[-1]], lanes))
                    for acc, y in zip(sums, ys, strict=True):
                        store(acc, 0, fma(x, y, load(acc, 0, lanes), lanes), lanes)
            for r, sums in enumerate(accs):
                place = T.bind(out.at([*index, first + r, at]))
                for j, acc in enumerate(sums):
                    store(out.buffer, place + j * lanes, load(acc, 0, lanes), lanes)

        with loops(share(k, count * lines)) as (unit,):
            first = T.bind(T.min(T.truncmod(unit, lines) * height, m - height))
            index, rest = list[Any](), T.bind(T.truncdiv(unit, lines))
            for extent in reversed(batch):
                index.insert(0, T.bind(T.truncmod(rest, extent)))
                rest = T.bind(T.truncdiv(rest, extent))
            for begin, turns, lanes in runs(n, LANES):
                groups = [(begin, turns // wide, wide), (begin + turns // wide * wide * lanes, turns % wide, 1)] if lanes == LANES else [(begin, turns, 1)]
                for at, times, vectors in groups:
                    if times:
                        with loops(times) as (i,):
                            columns(index, first, T.bind(i * (vectors * lanes) + at), vectors, lanes)

    tasks = task_count(macs, count * lines, MACS_PER_TASK)
    return make_kernel(row, op, target, emit, tasks=tasks, arrays=constants_of(op), macs=macs)


def _check(op: OpCall) -> str | None:
    if any(str(o.dtype) != "float32" for o in op.operands) or min(len(o.shape) for o in op.operands) < 2:
        return "operands must be float32, of two axes or more."
    return None


portable("qc.f32.matmul", matmul, check=_check, dense=True)
