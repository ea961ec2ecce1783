"""Float operators over rows: softmax, normalizations, reductions, look-ups in a table. Tasks divide the rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.schedules.builder import Emitter, View, accumulator, load, loops, make_kernel, share, splat, store, view
from qcompiler.schedules.floats import math as floats
from qcompiler.schedules.floats.math import f32, fma, horizontal, runs
from qcompiler.schedules.floats.pointwise import LANES
from qcompiler.schedules.portable.base import portable
from qcompiler.schedules.portable.elementwise import constants_of, tasks_of
from qcompiler.schedules.portable.nest import shared
from qcompiler.schedules.table import Kernel, Layout, OpCall

Term = Callable[[Any, int], Any]  # (flat index, lanes) -> vector
GRAIN = 10_000


def folded(extent: int, term: Term, combine: Callable[[Any, Any], Any], start: float) -> Any:
    """All elements `term(i)` for i below `extent`, combined in one order on every target: 16 partial results, their halves, then the ragged end."""
    total = None
    for first, count, lanes in runs(extent, LANES):
        if count == 1:
            part = T.bind(term(T.int32(first), lanes))
        else:
            acc = accumulator(lanes, "float32")
            store(acc, 0, f32(start, lanes), lanes)
            with loops(count) as (i,):
                store(acc, 0, combine(load(acc, 0, lanes), term(T.bind(i * lanes + first), lanes)), lanes)
            part = load(acc, 0, lanes)
        found = horizontal(part, lanes, combine)
        total = found if total is None else T.bind(combine(total, found))
    return total


def each(extent: int, body: Callable[[Any, int], None]) -> None:
    """`body(i, lanes)` for disjoint vectors that cover `extent` elements."""
    for first, count, lanes in runs(extent, LANES):
        with loops(count) as (i,):
            body(T.bind(i * lanes + first), lanes)


def largest(a: Any, b: Any) -> Any:
    return T.max(a, b)


def plus(a: Any, b: Any) -> Any:
    return a + b


def _over_rows(op: OpCall, target: Target, row: str, body: Callable[[Emitter, View, View, Any, Any], None]) -> Kernel:
    """`body(k, x, y, start of the row in x, in y)` for every row of operand 0 and of the output."""

    def emit(k: Emitter) -> None:
        x, y = k.operands()[0], view(k.output, op.output)
        with loops(*(shared(k, op.output.shape[:-1]) if len(op.output.shape) > 1 else [])) as index:
            body(k, x, y, T.bind(T.int32(0) + x.at([*index, 0])), T.bind(T.int32(0) + y.at([*index, 0])))

    return make_kernel(row, op, target, emit, tasks=tasks_of(op, GRAIN) if len(op.output.shape) > 1 else 1, arrays=constants_of(op))


def softmax(op: OpCall, target: Target, row: str) -> Kernel:
    """Over the last axis: `e^(x - max) / sum`."""
    width = op.output.shape[-1]

    def body(k: Emitter, x: View, y: View, source: Any, out: Any) -> None:
        top = folded(width, lambda i, n: load(x.buffer, source + i, n), largest, -math.inf)
        each(width, lambda i, n: store(y.buffer, out + i, floats.exp(load(x.buffer, source + i, n) - splat(top, n), n), n))
        total = folded(width, lambda i, n: load(y.buffer, out + i, n), plus, 0.0)
        each(width, lambda i, n: store(y.buffer, out + i, load(y.buffer, out + i, n) / splat(total, n), n))

    return _over_rows(op, target, row, body)


def layer_norm(op: OpCall, target: Target, row: str) -> Kernel:
    """Over the last axis: `(x - mean) / sqrt(mean((x - mean)^2) + epsilon) * gamma + beta`."""
    width = op.output.shape[-1]

    def body(k: Emitter, x: View, y: View, source: Any, out: Any) -> None:
        gamma, beta = k.arrays
        count = tirx.const(width, "float32")
        mean = T.bind(folded(width, lambda i, n: load(x.buffer, source + i, n), plus, 0.0) / count)

        def centered(i: Any, n: int) -> Any:
            return T.bind(load(x.buffer, source + i, n) - splat(mean, n))

        inverse = _inverse_root(k, folded_squares(width, centered), count)
        each(width, lambda i, n: store(y.buffer, out + i, fma(centered(i, n) * splat(inverse, n), load(gamma, i, n), load(beta, i, n), n), n))

    return _over_rows(op, target, row, body)


def rms_norm(op: OpCall, target: Target, row: str) -> Kernel:
    """Over the last axis: `x / sqrt(mean(x^2) + epsilon) * gamma`."""
    width = op.output.shape[-1]

    def body(k: Emitter, x: View, y: View, source: Any, out: Any) -> None:
        (gamma,) = k.arrays

        def value(i: Any, n: int) -> Any:
            return T.bind(load(x.buffer, source + i, n))

        inverse = _inverse_root(k, folded_squares(width, value), tirx.const(width, "float32"))
        each(width, lambda i, n: store(y.buffer, out + i, value(i, n) * splat(inverse, n) * load(gamma, i, n), n))

    return _over_rows(op, target, row, body)


def folded_squares(extent: int, term: Term) -> Any:
    """The sum of squares, each fused with its addition."""
    total = None
    for first, count, lanes in runs(extent, LANES):
        acc = accumulator(lanes, "float32")
        store(acc, 0, f32(0.0, lanes), lanes)
        with loops(count) as (i,):
            value = term(T.bind(i * lanes + first), lanes)
            store(acc, 0, fma(value, value, load(acc, 0, lanes), lanes), lanes)
        found = horizontal(load(acc, 0, lanes), lanes, plus)
        total = found if total is None else T.bind(total + found)
    return total


def _inverse_root(k: Emitter, total: Any, count: Any) -> Any:
    """`1 / sqrt(total / count + epsilon)`."""
    return T.bind(tirx.const(1.0, "float32") / floats.root(total / count + k.f32(k.op.attrs["epsilon"]), 1))


CHAINS = 4  # sums of every fourth pixel grow side by side: an addition waits for the one before it
STRETCH = 256  # pixels that are summed before a longer sum takes them in, so that long sums lose no more than short ones


def group_norm(op: OpCall, target: Target, row: str) -> Kernel:
    """Over the pixels of [N, pixels..., C] and each of `groups` runs of channels: `(x - mean) / sqrt(mean((x - mean)^2) + epsilon) * gamma + beta`.

    Three passes: sums per channel, squares per channel, results. Tasks have groups of their own; vectors run along channels, over several groups where
    those are narrow.
    """
    (rows, *axes, channels), groups = op.output.shape, op.attrs["groups"]
    pixels, width = math.prod(axes), channels // groups
    together = next(n for n in range(1, groups + 1) if groups % n == 0 and (n * width >= LANES or n == groups))
    blocks, span = groups // together, together * width

    def emit(k: Emitter) -> None:
        (x,), (gamma, beta), (source, *_), out = k.inputs, k.arrays, k.operands(), view(k.output, op.output)
        scratch = T.decl_buffer((2 * rows * channels,), "float32", data=k.scratch.data)
        count = tirx.const(pixels * width, "float32")
        with loops(share(k, rows * blocks)) as (block,):
            first = T.bind(tirx.truncmod(block, blocks) * span)
            image = T.bind(tirx.truncdiv(block, blocks))
            start = T.bind(image * (pixels * channels) + first)
            means = T.bind(block * (2 * span))  # in scratch, one per channel
            factors = T.bind(means + span)

            def fold(place: Any, term: Callable[[Any, Any, Any, int], Any], finish: Callable[[Any], Any]) -> None:
                """Each channel's `place` becomes what `finish` makes of the sum of its group. term: (channel, element, sum so far, lanes)."""
                each(span, lambda c, n: store(scratch, place + c, _over_pixels(pixels, n, lambda p, sum: term(c, start + p * channels + c, sum, n)), n))
                with loops(together) as (group,):
                    at = T.bind(place + group * width)
                    value = finish(folded(width, lambda i, n: load(scratch, at + i, n), plus, 0.0))
                    each(width, lambda i, n: store(scratch, at + i, splat(value, n), n))

            def square(c: Any, at: Any, sum: Any, n: int) -> Any:
                apart = T.bind(load(x, at, n) - load(scratch, means + c, n))
                return fma(apart, apart, sum, n)

            def write(c: Any, n: int) -> None:
                mean, shift = T.bind(load(scratch, means + c, n)), T.bind(load(beta, first + c, n))
                factor = T.bind(load(scratch, factors + c, n) * load(gamma, first + c, n))
                with loops(*axes) as index:
                    where = [image, *index, T.bind(first + c)]
                    store(out.buffer, T.bind(out.at(where)), fma(load(x, T.bind(source.at(where)), n) - mean, factor, shift, n), n)

            fold(means, lambda c, at, sum, n: sum + load(x, at, n), lambda total: T.bind(total / count))
            fold(factors, square, lambda total: _inverse_root(k, total, count))
            each(span, write)

    tasks = max(1, min(rows * blocks, op.output.elements // GRAIN, 64))
    return make_kernel(row, op, target, emit, tasks=tasks, arrays=constants_of(op), scratch=8 * rows * channels)


def _over_pixels(pixels: int, n: int, term: Callable[[Any, Any], Any]) -> Any:
    """The vector that `term(pixel, sum so far)` grows to over all pixels."""
    whole = accumulator(n, "float32")
    store(whole, 0, f32(0.0, n), n)
    for first, stretches, length in ((0, pixels // STRETCH, STRETCH), (pixels // STRETCH * STRETCH, 1, pixels % STRETCH)):
        if not stretches or not length:
            continue
        with loops(stretches) as (stretch,):
            start = T.bind(stretch * STRETCH + first)
            chains = [accumulator(n, "float32") for _ in range(min(CHAINS, length))]
            for chain in chains:
                store(chain, 0, f32(0.0, n), n)
            with loops(length // len(chains)) as (step,):
                for i, chain in enumerate(chains):
                    store(chain, 0, term(T.bind(start + step * len(chains) + i), load(chain, 0, n)), n)
            for i in range(length % len(chains)):
                store(chains[i], 0, term(T.bind(start + (length - 1 - i)), load(chains[i], 0, n)), n)
            total = load(chains[0], 0, n)
            for chain in chains[1:]:
                total = total + load(chain, 0, n)
            store(whole, 0, load(whole, 0, n) + total, n)
    return load(whole, 0, n)


_REDUCTIONS: dict[str, tuple[Callable[[Any, Any], Any], float]] = {
    "mean": (plus, 0.0),
    "variance": (plus, 0.0),
    "sum": (plus, 0.0),
    "max": (largest, -math.inf),
    "min": (T.min, math.inf),
}


def reduce(op: OpCall, target: Target, row: str) -> Kernel:
    """attrs: function ("mean", "variance" (of the elements: the mean square of what they differ from their mean), "sum", "max", "min") of the adjacent axes
    [first, last) of operand 0."""
    shape, first, last = op.operands[0].shape, op.attrs["first"], op.attrs["last"]
    outer, extent, inner = (math.prod(part) for part in (shape[:first], shape[first:last], shape[last:]))
    combine, start = _REDUCTIONS[op.attrs["function"]]
    mean, variance = op.attrs["function"] in ("mean", "variance"), op.attrs["function"] == "variance"

    def emit(k: Emitter) -> None:
        (x,) = k.inputs

        def finish(value: Any, n: int) -> Any:
            return value / f32(float(extent), n) if mean else value

        if inner == 1:
            with loops(share(k, outer)) as (r,):
                source = T.bind(r * extent)
                value = finish(folded(extent, lambda i, n: load(x, source + i, n), combine, start), 1)
                if variance:
                    center = T.bind(value)
                    value = finish(folded_squares(extent, lambda i, n: T.bind(load(x, source + i, n) - splat(center, n))), 1)
                T.buffer_store(k.output, value, [r])
            return
        with loops(share(k, outer)) as (r,):
            source, out = T.bind(r * (extent * inner)), T.bind(r * inner)

            def column(at: Any, n: int) -> None:
                acc = accumulator(n, "float32")
                store(acc, 0, f32(start, n), n)
                with loops(extent) as (i,):
                    store(acc, 0, combine(load(acc, 0, n), load(x, source + i * inner + at, n)), n)
                if variance:
                    center = T.bind(finish(load(acc, 0, n), n))
                    store(acc, 0, f32(start, n), n)
                    with loops(extent) as (i,):
                        apart = T.bind(load(x, source + i * inner + at, n) - center)
                        store(acc, 0, fma(apart, apart, load(acc, 0, n), n), n)
                store(k.output, out + at, finish(load(acc, 0, n), n), n)

            each(inner, column)

    tasks = max(1, min(outer, math.prod(shape) // 50_000, 64))
    return make_kernel(row, op, target, emit, tasks=tasks)


def take(op: OpCall, target: Target, row: str) -> Kernel:
    """Rows of a constant table [R, ...] by int32 or int64 indices; an index beyond the table reads its first or last row."""
    table, indices = op.operands
    count, length = table.shape[0], math.prod(table.shape[1:])

    def emit(k: Emitter) -> None:
        (where,), (entries,) = k.inputs, k.arrays
        with loops(share(k, op.output.elements // length)) as (i,):
            low, high = (tirx.const(bound, str(indices.dtype)) for bound in (0, count - 1))
            source, out = T.bind(T.Cast("int32", T.max(low, T.min(high, where[i]))) * length), T.bind(i * length)
            each(length, lambda at, n: store(k.output, out + at, load(entries, source + at, n), n))

    return make_kernel(row, op, target, emit, tasks=tasks_of(op), arrays=constants_of(op))


def _runtime_then_constants(op: OpCall) -> str | None:
    fits = isinstance(op.operands[0], Layout) and all(isinstance(o, np.ndarray) for o in op.operands[1:])
    return None if fits else "the first operand must be computed at run time, and the others must be constants."


portable("qc.f32.softmax", softmax, check=_runtime_then_constants)
portable("qc.f32.layer_norm", layer_norm, check=_runtime_then_constants)
portable("qc.f32.rms_norm", rms_norm, check=_runtime_then_constants)
portable("qc.f32.group_norm", group_norm, check=_runtime_then_constants, dense=True)
portable("qc.f32.reduce", reduce, check=_runtime_then_constants, dense=True, flat=True)
portable("qc.f32.take", take, dense=True, flat=True)
