"""Pixels brought to another size along one axis: an integer sum of a few neighbours for each, with weights that the compiler made.

Along rows a whole line of the image is summed at a time, in vectors; along columns each pixel's channels by themselves.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.numerics.resample import BITS
from qcompiler.schedules.builder import Emitter, accumulator, cast, clamp, load, loops, make_kernel, share, splat, store, task_count, vectors, view
from qcompiler.schedules.portable.base import portable
from qcompiler.schedules.table import Kernel, OpCall


def resample(op: OpCall, target: Target, row: str) -> Kernel:
    """`clip((2^21 + sum(w * x)) >> 22, 0, 255)`: the sum of at most 255 * 1.5 * 2^22 fits int32."""
    axis, first = op.attrs["axis"], np.asarray(op.attrs["first"], np.int32)
    weights = np.asarray(op.attrs["weights"], np.int32)
    taps = weights.size // first.size
    n, height, width, channels = op.output.shape
    lines = n * height
    tasks = task_count(math.prod(op.output.shape) * taps, lines)

    def emit(k: Emitter) -> None:
        source, out = k.operands()[0], view(k.output, op.output)

        def summed(start: Any, place: Any, at: Any, step: int, lanes: int) -> None:
            acc = accumulator(lanes)
            store(acc, 0, splat(T.int32(1 << (BITS - 1)), lanes), lanes)
            with loops(taps) as (t,):
                x = cast("int32", load(source.buffer, start + t * step, lanes), lanes)
                store(acc, 0, load(acc, 0, lanes) + x * splat(k.arrays[1][at * taps + t], lanes), lanes)
            value = clamp(T.shift_right(load(acc, 0, lanes), splat(T.int32(BITS), lanes)), T.int32(0), T.int32(255), lanes)
            store(out.buffer, place, cast("uint8", value, lanes), lanes)

        with loops(share(k, lines)) as (line,):
            image, y = T.bind(line // height), T.bind(line % height)
            if axis == 1:
                read = T.bind(source.at([image, k.arrays[0][y], 0, 0]))
                vectors(width * channels, k.width, lambda c, lanes: summed(read + c, out.at([image, y, 0, 0]) + c, y, source.strides[1], lanes))
                return
            with loops(width) as (x,):
                read = T.bind(source.at([image, y, k.arrays[0][x], 0]))
                for c in range(channels):
                    summed(read + c, out.at([image, y, x, c]), x, source.strides[2], 1)

    return make_kernel(row, op, target, emit, tasks=tasks, arrays=[first, weights])


portable("qc.resample", resample, dense=True)
