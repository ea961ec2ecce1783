"""Matrix product of two computed operands on a GPU: a thread computes adjacent columns of a row."""

from __future__ import annotations

import math

from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.schedules.builder import Emitter, Requantize, clamp, make_kernel, view
from qcompiler.schedules.cuda.base import Reader, gpu_row, local, run_length
from qcompiler.schedules.cuda.pool import write
from qcompiler.schedules.portable.elementwise import constants_of
from qcompiler.schedules.portable.threads import each
from qcompiler.schedules.table import Kernel, OpCall


def matmul(op: OpCall, target: Target, row: str) -> Kernel:
    """`acc = sum (a - za) * (b - zb)` over the last axis of a and the last but one of b; batch axes broadcast as in numpy."""
    at = op.attrs
    *batch, m, n = op.output.shape
    depth = op.operands[0].shape[-1]

    def emit(k: Emitter) -> None:
        left, right = k.operands()
        a, b = left.broadcast([*batch, m, depth]), right.broadcast([*batch, depth, n])
        a_zero, b_zero, multiplier = k.i32(at["a_zero_point"]), k.i32(at["b_zero_point"]), k.f32(at["multiplier"])
        out = view(k.output, op.output)
        low, high = (k.f32_or_none(at.get(name)) for name in ("float_low", "float_high"))
        end = None if out.dtype == "float32" else Requantize.of(k, at)
        run = run_length(b, out) if end else run_length(b)
        read = Reader(b, run)
        with each(k, *batch, m, n // run) as (*index, line, part):
            accs = local(run)
            for i in range(run):
                T.buffer_store(accs, T.int32(0), [i])
            with T.serial(0, depth) as step:
                x = T.bind(T.Cast("int32", a.buffer[a.at([*index, line, step])]) - a_zero)
                for i, y in enumerate(read(T.bind(T.int32(0) + b.at([*index, step, part * run])))):
                    T.buffer_store(accs, accs[i] + x * (y - b_zero), [i])
            start = T.bind(T.int32(0) + out.at([*index, line, part * run]))
            scaled = [T.Cast("float32", accs[i]) * multiplier for i in range(run)]
            if end:
                write(out, start, [T.bind(end.store_word(v, 1)) for v in scaled])
            else:
                for i, v in enumerate(scaled):
                    T.buffer_store(out.buffer, clamp(v, low, high, 1), [start + i])

    threads = math.prod(batch) * m * -(-n // 4)
    return make_kernel(row, op, target, emit, arrays=constants_of(op), macs=math.prod(batch) * m * n * depth, threads=threads)


gpu_row("qc.matmul", matmul)
