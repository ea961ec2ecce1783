"""`qc.f32.attention`: softmax(scale * q k' + bias) v, four rows of one head at a time; neither logits nor probabilities are ever stored but for those rows.

    per task, per head: k' is written as [channel, key] to scratch; then per four rows: logits and their maxima, exponentials and their sums, products with v

Sums run over channels, and over keys, in their order; those of exponentials as in `rows.folded`: one order on every target.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.schedules.builder import Emitter, View, accumulator, load, loops, make_kernel, share, splat, store, task_count, vector_bytes, view
from qcompiler.schedules.floats import math as floats
from qcompiler.schedules.floats.math import f32, fma, runs
from qcompiler.schedules.floats.pointwise import LANES
from qcompiler.schedules.floats.rows import each, folded, largest, plus
from qcompiler.schedules.portable.base import portable
from qcompiler.schedules.portable.elementwise import constants_of
from qcompiler.schedules.portable.nest import elementwise
from qcompiler.schedules.table import Kernel, Layout, OpCall

ROWS = 4
MACS_PER_TASK = 500_000


def attention(op: OpCall, target: Target, row: str) -> Kernel:
    """q [B, S, H, D], k [B, T, H, D], v [B, T, H, Dv], bias (constant or not) that broadcasts to [B, H, S, T]; attrs: scale.
    A row whose logits are all -inf is 0."""
    batch, rows, heads, depth = op.operands[0].shape
    columns, out = op.operands[2].shape[1], op.output.shape[3]
    height = min(ROWS, 1 << (rows.bit_length() - 1))
    macs = batch * heads * rows * columns * (depth + out)
    parts = 1 if batch * heads >= 8 else min(-(-rows // height), -(-16 // (batch * heads)))  # of each head's rows
    tasks = task_count(macs, batch * heads * parts, MACS_PER_TASK)
    pitch = -(-columns // LANES) * LANES
    words = (depth + height) * pitch
    wide = 4 if vector_bytes(target) == 64 else 1  # vectors of 16 that a row's sums are held in

    def emit(k: Emitter) -> None:
        q, keys, v, *masks = k.operands()
        bias = masks[0].broadcast((batch, heads, rows, columns)) if masks else None
        scratch = T.decl_buffer((tasks * words,), "float32", data=k.scratch.data)
        base = T.bind(k.task * words)
        result, scale = view(k.output, op.output), k.f32(op.attrs["scale"])
        alone = dataclasses.replace(k, tasks=1)
        tiles = -(-rows // height)
        per = -(-tiles // parts)
        with loops(share(k, batch * heads * parts)) as (unit,):
            part = T.bind(tirx.truncmod(unit, parts))
            head = T.bind(tirx.truncmod(tirx.truncdiv(unit, parts), heads))
            image = T.bind(tirx.truncdiv(unit, parts * heads))
            source = View(keys.buffer, "float32", (depth, columns), (1, heads * depth), T.bind(T.int32(0) + keys.at([image, 0, head, 0])))
            turned = View(scratch, "float32", (depth, columns), (pitch, 1), base)
            elementwise(alone, [source], turned, lambda x, n: x[0])
            with T.serial(part * per, T.min(tiles, part * per + per)) as tile:
                first = T.bind(T.min(tile * height, rows - height))
                places = [T.bind(base + (depth + r) * pitch) for r in range(height)]
                starts = [T.bind(T.int32(0) + q.at([image, first + r, head, 0])) for r in range(height)]
                block = _Block(scratch, base, pitch, columns, places)
                masked = None if bias is None else [T.bind(T.int32(0) + bias.at([image, head, first + r, 0])) for r in range(height)]
                block.logits(q, starts, depth, wide, lambda r, at, acc, n: _scaled(scale, bias, masked, r, at, acc, n))
                sums = [block.exponentials(r) for r in range(height)]
                outs = [T.bind(T.int32(0) + result.at([image, first + r, head, 0])) for r in range(height)]
                block.mix(v, T.bind(T.int32(0) + v.at([image, 0, head, 0])), heads * out, out, wide, result, outs, sums)

    return make_kernel(row, op, target, emit, tasks=tasks, arrays=constants_of(op), macs=macs, scratch=4 * tasks * words)


def _scaled(scale: Any, bias: View | None, starts: list[Any] | None, r: int, at: Any, acc: Any, n: int) -> Any:
    if bias is None or starts is None:
        return acc * splat(scale, n)
    return fma(acc, splat(scale, n), load(bias.buffer, starts[r] + at, n), n)


class _Block:
    """A few rows of one head: `places` is where each row's logits, then exponentials, lie in scratch; k' lies at `base`, `pitch` apart."""

    def __init__(self, scratch: Any, base: Any, pitch: int, columns: int, places: list[Any]) -> None:
        self.scratch, self.base, self.pitch, self.columns, self.places = scratch, base, pitch, columns, places

    def logits(self, q: View, starts: list[Any], depth: int, wide: int, scaled: Any) -> None:
        for first, count, lanes in runs(self.columns, LANES):
            groups = [(first, count // wide, wide), (first + count // wide * wide * lanes, count % wide, 1)] if lanes == LANES else [(first, count, 1)]
            for begin, turns, vectors in groups:
                if not turns:
                    continue
                with loops(turns) as (i,):
                    at = T.bind(i * (vectors * lanes) + begin)
                    accs = [[_zero(lanes) for _ in range(vectors)] for _ in starts]
                    with loops(depth) as (d,):
                        line = T.bind(self.base + d * self.pitch + at)
                        keys = [T.bind(load(self.scratch, line + j * lanes, lanes)) for j in range(vectors)]
                        for start, row in zip(starts, accs, strict=True):
                            x = T.bind(splat(q.buffer[start + d], lanes))
                            for acc, key in zip(row, keys, strict=True):
                                store(acc, 0, fma(x, key, load(acc, 0, lanes), lanes), lanes)
                    for r, row in enumerate(accs):
                        for j, acc in enumerate(row):
                            store(self.scratch, self.places[r] + at + j * lanes, scaled(r, at + j * lanes, load(acc, 0, lanes), lanes), lanes)

    def exponentials(self, r: int) -> Any:
        """e^(logit - largest) in place of the logits of row r; returns their sum, 1 where all are 0."""
        place, zero = self.places[r], tirx.const(0.0, "float32")
        top = folded(self.columns, lambda i, n: load(self.scratch, place + i, n), largest, -math.inf)
        top = T.bind(T.Select(top == tirx.const(-math.inf, "float32"), zero, top))
        each(self.columns, lambda i, n: store(self.scratch, place + i, floats.exp(load(self.scratch, place + i, n) - splat(top, n), n), n))
        total = folded(self.columns, lambda i, n: load(self.scratch, place + i, n), plus, 0.0)
        return T.bind(T.Select(total == zero, tirx.const(1.0, "float32"), total))

    def mix(self, v: View, start: Any, step: int, width: int, wide: int, result: View, outs: list[Any], sums: list[Any]) -> None:
        """Sums of values, `step` apart, weighted by the exponentials, over the sums of these."""
        for first, count, lanes in runs(width, LANES):
            for begin, turns, vectors in ((first, count // wide, wide), (first + count // wide * wide * lanes, count % wide, 1)):
                if not turns:
                    continue
                with loops(turns) as (i,):
                    at = T.bind(i * (vectors * lanes) + begin)
                    accs = [[_zero(lanes) for _ in range(vectors)] for _ in outs]
                    with loops(self.columns) as (t,):
                        line = T.bind(start + t * step + at)
                        values = [T.bind(load(v.buffer, line + j * lanes, lanes)) for j in range(vectors)]
                        for place, row in zip(self.places, accs, strict=True):
                            p = T.bind(splat(self.scratch[place + t], lanes))
                            for acc, value in zip(row, values, strict=True):
                                store(acc, 0, fma(p, value, load(acc, 0, lanes), lanes), lanes)
                    for out, total, row in zip(outs, sums, accs, strict=True):
                        for j, acc in enumerate(row):
                            store(result.buffer, out + at + j * lanes, load(acc, 0, lanes) / splat(total, lanes), lanes)


def _zero(lanes: int) -> Any:
    made = accumulator(lanes, "float32")
    store(made, 0, f32(0.0, lanes), lanes)
    return made


def _check(op: OpCall) -> str | None:
    if not all(isinstance(o, Layout) for o in op.operands[:3]):
        return "queries, keys and values must be computed at run time."
    return None if all(np.dtype(str(o.dtype)) == np.float32 for o in op.operands) else "operands must be float32."


portable("qc.f32.attention", attention, check=_check, dense=True)
