"""Image resizing by the index and weight lists that the compiler made: one gather, or four with exact integer weights."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.schedules.builder import (
    Emitter,
    Requantize,
    View,
    cast,
    load,
    loops,
    make_kernel,
    offset_of,
    recode,
    share,
    splat,
    store,
    task_count,
    vectors,
    view,
)
from qcompiler.schedules.portable.base import portable
from qcompiler.schedules.table import Kernel, OpCall

ONE = 1 << 10  # weights are multiples of 2^-10


def _nearest(k: Emitter, source: View, out: View, tables: dict[str, Any], pixel: tuple[Any, Any, Any]) -> None:
    n, oh, ow = pixel
    start = T.bind(source.at([n, tables["iy0"][oh], tables["ix0"][ow], 0]))

    def gather(c: Any, lanes: int) -> None:
        value = recode(load(source.buffer, start + c, lanes), source.dtype, out.dtype, lanes)
        store(out.buffer, out.at([*pixel, c]), value, lanes)

    vectors(out.shape[3], k.width, gather)


def fraction_bits(weights: Any) -> int:
    """The fewest bits behind the binary point that hold every weight."""
    return next(n for n in range(ONE.bit_length()) if not (np.asarray(weights) % (ONE >> n)).any())


def _corners(source: View, tables: dict[str, Any], pixel: tuple[Any, Any, Any]) -> list[tuple[Any, Any]]:
    """(where its channels begin, weight * 2^20) of the four pixels that a pixel of the output is blended from."""
    n, oh, ow = pixel
    wy, wx = T.bind(tables["wy"][oh]), T.bind(tables["wx"][ow])
    return [
        (T.bind(source.at([n, tables[y][oh], tables[x][ow], 0])), T.bind(v * u))
        for y, v in (("iy0", ONE - wy), ("iy1", wy))
        for x, u in (("ix0", ONE - wx), ("ix1", wx))
    ]


def _linear(k: Emitter, source: View, out: View, tables: dict[str, Any], pixel: tuple[Any, Any, Any]) -> None:
    end, step = Requantize.of(k, {}, 128.0), k.f32(2.0**-20)
    corners = _corners(source, tables, pixel)

    def blend(c: Any, lanes: int) -> None:
        # the weights add up to 2^20, so the storage offset is subtracted once, before the sum becomes a float
        acc = splat(T.int32(-offset_of(source.dtype) * ONE * ONE), lanes)
        for start, weight in corners:
            acc = T.bind(acc + cast("int32", load(source.buffer, start + c, lanes), lanes) * splat(weight, lanes))
        store(out.buffer, out.at([*pixel, c]), end(acc, splat(step, lanes), lanes), lanes)

    vectors(out.shape[3], k.width, blend)


def _linear_short(k: Emitter, source: View, out: View, tables: dict[str, Any], pixel: tuple[Any, Any, Any], bits: int) -> None:
    """`_linear` where weights are multiples of 2^-bits, bits <= 8: a sum of bytes, as uint8 stores them, fits 16 bits and needs no offset and no clamp."""
    corners = [(start, T.bind(T.Cast("uint16", T.shift_right(weight, T.int32(20 - bits))))) for start, weight in _corners(source, tables, pixel)]

    def blend(c: Any, lanes: int) -> None:
        acc = splat(tirx.const(0, "uint16"), lanes)
        for start, weight in corners:
            x = recode(load(source.buffer, start + c, lanes), source.dtype, "uint8", lanes)
            acc = T.bind(acc + cast("uint16", x, lanes) * splat(weight, lanes))
        if bits:  # to nearest, ties to even: (acc + half - 1 + bit 0 of the quotient) / 2^bits
            shift, half = (splat(tirx.const(v, "uint16"), lanes) for v in (bits, (1 << bits - 1) - 1))
            odd = T.bitwise_and(T.shift_right(acc, shift), splat(tirx.const(1, "uint16"), lanes))
            acc = T.shift_right(acc + half + odd, shift)
        store(out.buffer, out.at([*pixel, c]), recode(cast("uint8", acc, lanes), "uint8", out.dtype, lanes), lanes)

    vectors(out.shape[3], k.width, blend)


def resize2d(op: OpCall, target: Target, row: str) -> Kernel:
    """nearest: a gather. linear: `requantize(sum of corner * weight, 2^-20)`, |sum| <= 128 * 2^20."""
    a = op.attrs
    linear = a["method"] == "linear"
    bits = fraction_bits(a["wy"]) + fraction_bits(a["wx"]) if linear else 0
    names = ["iy0", "ix0"] + (["iy1", "ix1", "wy", "wx"] if linear else [])
    height, width = op.output.shape[1:3]
    lines = op.output.shape[0] * height
    tasks = task_count(math.prod(op.output.shape) * (4 if linear else 1), lines)

    def emit(k: Emitter) -> None:
        source, out = k.operands()[0], view(k.output, op.output)
        tables = dict(zip(names, k.arrays, strict=True))
        with loops(share(k, lines), width) as (line, ow):
            n, oh = T.bind(line // height), T.bind(line % height)
            pixel = (n, oh, ow)
            if not linear:
                _nearest(k, source, out, tables, pixel)
            elif k.avx2 and bits <= 8:  # enlarged 2, 4 or 8 times, say
                _linear_short(k, source, out, tables, pixel, bits)
            else:
                _linear(k, source, out, tables, pixel)

    return make_kernel(row, op, target, emit, tasks=tasks, arrays=[np.asarray(a[name], np.int32) for name in names])


portable("qc.resize2d", resize2d, own_channels=True)
