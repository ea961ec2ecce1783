"""Operators whose elements depend on one another in order: running sums, the largest elements, scattered updates. Any element type."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.schedules.builder import Emitter, loops, make_kernel, share, task_count
from qcompiler.schedules.portable import threads
from qcompiler.schedules.portable.base import portable
from qcompiler.schedules.portable.elementwise import constants_of, tasks_of
from qcompiler.schedules.table import Kernel, OpCall

COMBINE: dict[str, Callable[[Any, Any], Any]] = {
    "none": lambda old, new: new,
    "add": lambda old, new: old + new,
    "mul": lambda old, new: old * new,
    "max": T.max,
    "min": T.min,
}


@contextmanager
def _each(k: Emitter, *extents: int) -> Iterator[list[Any]]:
    """This task's part (on a GPU: this thread's) of all multi-indices; tasks divide the first extent."""
    if k.gpu:
        with threads.each(k, *extents) as index:
            yield index
    else:
        with loops(share(k, extents[0]), *extents[1:]) as index:
            yield index


def _around(shape: tuple[int, ...], axis: int) -> tuple[int, int, int]:
    """(elements before, on and behind an axis)."""
    return math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])


def cumulative(op: OpCall, target: Target, row: str) -> Kernel:
    """Element by element along the axis, on the result itself: rows behind the axis are vectors."""
    outer, length, inner = _around(op.output.shape, op.attrs["axis"])
    exclusive, step = bool(op.attrs["exclusive"]), -1 if op.attrs["reverse"] else 1
    combine, neutral = COMBINE[op.attrs["reduction"]], {"add": 0, "mul": 1}[op.attrs["reduction"]]
    dtype = op.output.dtype

    def emit(k: Emitter) -> None:
        x, y = k.operands()[0].buffer, k.output
        columns = 1 if not k.gpu else inner
        with _each(k, outer, columns) as (o, column):
            width = inner // columns
            first = T.bind((o * length + (length - 1 if step < 0 else 0)) * inner + column)
            with loops(width) as (j,):
                T.buffer_store(y, tirx.const(neutral, dtype) if exclusive else x[first + j], [first + j])
            with loops((1, length)) as (i,):
                here = T.bind(first + i * step * inner)
                before = T.bind(here - step * inner)
                with loops(width) as (j,):
                    T.buffer_store(y, combine(y[before + j], x[(before if exclusive else here) + j]), [here + j])

    return make_kernel(row, op, target, emit, tasks=task_count(math.prod(op.output.shape), outer), arrays=constants_of(op), threads=outer * inner)


def top_k(op: OpCall, target: Target, row: str) -> Kernel:
    """Insertion into the sorted list of the k best so far, which is the result itself. Of equal elements the first comes first; NaN counts as the largest."""
    source = op.operands[0]
    outer, length, inner = _around(source.shape, op.attrs["axis"])
    k_best, largest = op.output.shape[op.attrs["axis"]], bool(op.attrs["largest"])
    floating = str(source.dtype).startswith("float")

    def better(a: Any, b: Any) -> Any:
        """Comes a before an earlier b?"""
        strictly = a > b if largest else a < b
        if not floating:
            return strictly
        first, second = (a, b) if largest else (b, a)
        return tirx.any(strictly, tirx.all(tirx.isnan(first), tirx.Not(tirx.isnan(second))))

    def emit(k: Emitter) -> None:
        x, y = k.operands()[0].buffer, k.output
        with _each(k, outer, inner) as (o, j):
            base, best = T.bind(o * length * inner + j), T.bind(o * k_best * inner + j)
            place = T.alloc_buffer((1,), "int32")

            def value(position: Any) -> Any:
                return x[base + T.Cast("int32", y[best + position * inner]) * inner]

            def insert(i: Any, position: Any) -> None:
                element = T.bind(x[base + i * inner])
                T.buffer_store(place, position, [0])
                # Both sides of a conjunction are evaluated: the index stays inside at place 0.
                with T.While(tirx.all(place[0] > 0, better(element, value(T.max(place[0] - 1, 0))))):
                    T.buffer_store(y, y[best + (place[0] - 1) * inner], [best + place[0] * inner])
                    T.buffer_store(place, place[0] - 1, [0])
                T.buffer_store(y, T.Cast("int64", i), [best + place[0] * inner])

            T.buffer_store(y, tirx.const(0, "int64"), [best])
            with loops((0, k_best)) as (i,):
                insert(i, i)
            if length > k_best:
                with T.serial(k_best, length) as i:
                    with T.If(better(x[base + i * inner], value(k_best - 1))), T.Then():
                        insert(i, T.int32(k_best - 1))

    return make_kernel(row, op, target, emit, tasks=tasks_of(op, 1000), arrays=constants_of(op), threads=outer * inner)


def scatter(op: OpCall, target: Target, row: str) -> Kernel:
    """The data, then one update after the other; one task. On a GPU a thread does this for a column of the rows."""
    data, indices, _ = op.operands
    rows, width = data.shape
    combine = COMBINE[op.attrs["reduction"]]

    def emit(k: Emitter) -> None:
        x, index, updates = (v.buffer for v in k.operands())
        y = k.output

        def columns(first: Any, count: int) -> None:
            with loops(rows, count) as (r, j):
                at = T.bind(r * width + first + j)
                T.buffer_store(y, x[at], [at])
            with loops(indices.shape[0]) as (m,):
                r = T.bind(index[m])
                with T.If(tirx.all(r >= tirx.const(0, "int64"), r < tirx.const(rows, "int64"))), T.Then():
                    with loops(count) as (j,):
                        at = T.bind(T.Cast("int32", r) * width + first + j)
                        T.buffer_store(y, combine(y[at], updates[m * width + first + j]), [at])

        if k.gpu:
            with threads.each(k, width) as (column,):
                columns(column, 1)
        else:
            columns(T.int32(0), width)

    return make_kernel(row, op, target, emit, arrays=constants_of(op), threads=width)


portable("qc.cumulative", cumulative, dense=True, flat=True)
portable("qc.top_k", top_k, dense=True, flat=True)
portable("qc.scatter", scatter, dense=True, flat=True)
