"""Attention on a GPU: a block has a query of a head, its threads every `ROW_THREADS`-th key, then every such channel. Logits lie in scratch."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.schedules.builder import Emitter, Requantize, make_kernel, view
from qcompiler.schedules.cuda.base import gpu_row, local
from qcompiler.schedules.cuda.rows import ROW_THREADS, Fold, along, barrier
from qcompiler.schedules.portable.attention import UNCOUNTED, Operands, Shape, arrays_of, check_attention, plain_masks
from qcompiler.schedules.portable.threads import unravel
from qcompiler.schedules.table import Kernel, OpCall


def attention(op: OpCall, target: Target, row: str) -> Kernel:
    """The kernel of GPUs."""
    op = plain_masks(op)
    s = Shape.of(op)
    rows = s.batch * s.heads * s.queries

    def emit(k: Emitter) -> None:
        x, end, out = Operands(k), Requantize.of(k, op.attrs), view(k.output, op.output)
        batch, head, query = place = tuple(unravel(k.group, (s.batch, s.heads, s.queries)))
        group, line, limit = T.bind(x.shared(head)), T.bind(k.group * s.keys), x.limit(batch, query)
        largest, total, acc = Fold(k, "int32", UNCOUNTED, largest=True), Fold(k, "int32", 0), local(1)

        def logit(j: Any) -> None:
            T.buffer_store(acc, T.int32(0), [0])
            with T.serial(0, s.size) as c:
                T.buffer_store(acc, acc[0] + T.Cast("int32", x.query(batch, head, query, c, 1)) * T.Cast("int32", x.key(batch, group, j, c, 1)), [0])
            value = x.logit(acc[0], place, limit, j, 1)
            T.buffer_store(k.scratch, value, [line + j])
            largest.add(value)

        along(k, s.keys, logit)
        top, multiplier = largest.result(), T.bind(x.multipliers.buffer[head])
        nothing = x.nothing(top)

        def exponential(j: Any) -> None:
            p = x.weight(T.bind(k.scratch[line + j]), top, nothing, multiplier, j, 1)
            T.buffer_store(k.scratch, p, [line + j])
            total.add(p)

        along(k, s.keys, exponential)
        factor = x.factor(head, total.result())

        def channel(c: Any) -> None:
            T.buffer_store(acc, T.int32(0), [0])
            with T.serial(0, s.keys) as j:
                T.buffer_store(acc, acc[0] + k.scratch[line + j] * x.value(batch, group, j, c, 1), [0])
            T.buffer_store(out.buffer, end(acc[0], factor, 1), [out.at([batch, query, head * s.value_size + c])])

        barrier()
        along(k, s.value_size, channel)

    return make_kernel(row, op, target, emit, arrays=arrays_of(op), macs=s.macs, threads=rows * ROW_THREADS, block=ROW_THREADS, scratch=4 * rows * s.keys)


gpu_row("qc.attention", attention, check_attention)
