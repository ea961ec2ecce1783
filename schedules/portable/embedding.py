"""Rows of a table for ids: embeddings."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.schedules.builder import Emitter, Requantize, centered, load, make_kernel, offset_of, recode, splat, store, task_count, vectors, view
from qcompiler.schedules.portable.base import portable
from qcompiler.schedules.portable.elementwise import constants_of
from qcompiler.schedules.portable.normalization import rows_of
from qcompiler.schedules.portable.threads import each
from qcompiler.schedules.table import Kernel, OpCall


def gather(op: OpCall, target: Target, row: str) -> Kernel:
    """A task has ids of its own; on a GPU a thread has elements."""
    a, channels = op.attrs, op.output.shape[-1]
    size = op.operands[0].shape[0]
    scaled = len(op.operands) > 2
    tasks = task_count(math.prod(op.output.shape), math.prod(op.output.shape[:-1]))

    def emit(k: Emitter) -> None:
        table, ids, *factors = k.operands()
        out = view(k.output, op.output)
        end = Requantize.of(k, a) if scaled else None
        zero = k.i32(a.get("table_zero_point", 0) + offset_of(table.dtype)) if scaled else None

        def found(index: list[Any]) -> Any:
            one = ids.buffer[ids.at(index)]
            wide = T.bind(one if ids.dtype == "int64" else T.Cast("int64", one))
            place = T.Select(wide < T.int64(0), wide + T.int64(size), wide)
            return T.bind(T.Cast("int32", T.max(T.min(place, T.int64(size - 1)), T.int64(0))))

        def element(index: list[Any], place: Any, c: Any, n: int) -> None:
            value = load(table.buffer, table.at([place, c]), n)
            if end:
                factor = factors[0].buffer[place if factors[0].shape[0] > 1 else 0]
                value = end(centered(value, zero, n), splat(factor, n), n)
            else:
                value = recode(value, table.dtype, out.dtype, n)
            store(out.buffer, out.at([*index, c]), value, n)

        if k.gpu:
            with each(k, *op.output.shape) as index:
                element(index[:-1], found(index[:-1]), index[-1], 1)
            return

        def body(index: list[Any]) -> None:
            place = found(index)
            vectors(channels, k.width, lambda c, n: element(index, place, c, n))

        rows_of(k, op.output.shape, body)

    return make_kernel(row, op, target, emit, tasks=tasks, arrays=constants_of(op), threads=math.prod(op.output.shape))


def _check(op: OpCall) -> str | None:
    if len(op.operands) > 2 and not isinstance(op.operands[2], np.ndarray):
        return "multipliers must be constants."
    if str(op.operands[1].dtype) not in ("int32", "int64"):
        return f"ids are {op.operands[1].dtype}; supported: int32, int64."
    return None


portable("qc.gather", gather, check=_check)
