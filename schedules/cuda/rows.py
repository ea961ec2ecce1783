"""Operators over rows of the last axis on a GPU: a block has a row, its threads every `ROW_THREADS`-th element of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.schedules.builder import Emitter, make_kernel, view
from qcompiler.schedules.cuda.base import gpu_row, local
from qcompiler.schedules.cuda.tail import EndingRow, Tail, tail_arrays
from qcompiler.schedules.portable.elementwise import constants_of
from qcompiler.schedules.portable.normalization import LEAST, Normalization, Softmax, check_normalize, check_softmax, softmax_arrays
from qcompiler.schedules.portable.threads import unravel
from qcompiler.schedules.table import Kernel, OpCall

WARP, ROW_THREADS = 32, 128


def along(k: Emitter, extent: int, body: Callable[[Any], None]) -> None:
    """`body(i)` for this thread's part of a row's elements."""
    with T.serial(0, -(-extent // ROW_THREADS)) as step:
        i = T.bind(step * ROW_THREADS + k.thread)
        with T.If(i < extent), T.Then():
            body(i)


class Fold:
    """A sum or a maximum of integers that the threads of a block `add`. All of them must ask for the `result`, once."""

    def __init__(self, k: Emitter, dtype: str, start: int, largest: bool = False) -> None:
        self.k, self.largest, self.mine = k, largest, local(1, dtype)
        self.shared = T.alloc_buffer((ROW_THREADS // WARP,), dtype, scope="shared")
        T.buffer_store(self.mine, tirx.const(start, dtype), [0])

    def joined(self, a: Any, b: Any) -> Any:
        return T.max(a, b) if self.largest else a + b

    def add(self, value: Any) -> None:
        T.buffer_store(self.mine, self.joined(self.mine[0], value), [0])

    def result(self) -> Any:
        """Lanes hand each other what they have; then all threads read what the warps have."""
        k, name = self.k, "qc_warp_max" if self.largest else "qc_warp_sum"
        of_warp = T.bind(T.call_extern(str(self.mine.dtype), name, self.mine[0]))
        with T.If(T.bitwise_and(k.thread, T.int32(WARP - 1)) == 0), T.Then():
            T.buffer_store(self.shared, of_warp, [T.shift_right(k.thread, T.int32(5))])
        barrier()
        total = self.shared[0]
        for i in range(1, ROW_THREADS // WARP):
            total = self.joined(total, self.shared[i])
        return T.bind(total)


def barrier() -> None:
    """What a block's threads wrote before it, to shared or to global memory, all of them see after it."""
    T.evaluate(T.tvm_storage_sync("shared"))


def normalize(op: OpCall, target: Target, row: str) -> Kernel:
    """`qc.layer_norm` and `qc.rms_norm`."""
    outer = op.output.shape[:-1]

    def emit(k: Emitter) -> None:
        norm, index = Normalization(k), unravel(k.group, outer)
        total, squares = Fold(k, "int32", 0), Fold(k, "int64", 0)

        def count(c: Any) -> None:
            x = norm.number(index, c, 1)
            total.add(x)
            squares.add(T.Cast("int64", x * x))

        along(k, norm.channels, count)
        s = total.result()
        r = norm.inverse(s, squares.result())
        tail, outs = Tail(k, k.arrays[len(own) :]), [view(*pair) for pair in zip(k.outputs, op.written, strict=True)]

        def write(c: Any) -> None:
            value = T.bind(norm.result(index, c, s, r, 1))
            ended = tail([T.Cast("int32", value)], lambda buffer: [buffer[c]]) if op.tail else []
            for out, result in zip(outs, ([] if op.inner else [value]) + ended, strict=True):
                T.buffer_store(out.buffer, T.Cast(out.dtype, result), [out.at([*index, c])])

        along(k, norm.channels, write)

    own = constants_of(op)
    return make_kernel(row, op, target, emit, arrays=[*own, *tail_arrays(op)], threads=math.prod(outer) * ROW_THREADS, block=ROW_THREADS)


def softmax(op: OpCall, target: Target, row: str) -> Kernel:
    """`qc.softmax`: a thread reads only those exponentials that it wrote."""
    *outer, classes = op.output.shape

    def emit(k: Emitter) -> None:
        s, index, line = Softmax(k), unravel(k.group, outer), T.bind(k.group * classes)
        largest, total = Fold(k, "int32", LEAST, largest=True), Fold(k, "int32", 0)
        along(k, classes, lambda c: largest.add(s.number(index, c, 1)))
        top = largest.result()
        along(k, classes, lambda c: total.add(s.exponential(index, c, top, line, 1)))
        factor = s.factor(total.result())
        along(k, classes, lambda c: s.write(index, c, factor, line, 1))

    rows = math.prod(outer)
    return make_kernel(row, op, target, emit, arrays=softmax_arrays(op), threads=rows * ROW_THREADS, block=ROW_THREADS, scratch=4 * rows * classes)


gpu_row("qc.layer_norm", normalize, check_normalize, EndingRow)
gpu_row("qc.rms_norm", normalize, check_normalize, EndingRow)
gpu_row("qc.softmax", softmax, check_softmax)
