"""Pooling and means. Windows are clamped to the image, so no halo is needed; columns whose window is whole run without clamps."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.numerics.spec import magnitude
from qcompiler.schedules.builder import (
    Emitter,
    Requantize,
    accumulator,
    canonical,
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
    tiles,
    vector_bytes,
    vectors,
    view,
)
from qcompiler.schedules.portable.base import portable
from qcompiler.schedules.portable.elementwise import constants_of
from qcompiler.schedules.table import Kernel, Layout, OpCall


@dataclass(frozen=True)
class Window:
    """One spatial dimension of a pooling window: tap t of output o reads input `o * stride - pad + t * dilation`."""

    size: int
    taps: int
    stride: int
    pad: int
    dilation: int
    outputs: int

    @staticmethod
    def of(op: OpCall) -> tuple[Window, Window]:
        a, x = op.attrs, op.operands[0]
        dilation = a.get("dilation") or [1, 1]
        return tuple(  # type: ignore[return-value]
            Window(x.shape[1 + d], a["kernel"][d], a["strides"][d], a["padding"][d], dilation[d], op.output.shape[1 + d]) for d in (0, 1)
        )

    def valid(self, output: int) -> range:
        """Taps of an output that lie inside the image (may be empty)."""
        first = output * self.stride - self.pad
        low = max(0, -(first // self.dilation))
        return range(low, max(low, min(self.taps, (self.size - 1 - first) // self.dilation + 1)))

    def whole(self) -> tuple[int, int]:
        """The range [begin, end) of outputs all of whose taps are inside the image."""
        inside = [o for o in range(self.outputs) if len(self.valid(o)) == self.taps]
        return (inside[0], inside[-1] + 1) if inside else (0, 0)

    def bounds(self) -> np.ndarray:
        """int32 [outputs, 2]: first and last valid tap of each output."""
        return np.array([[r.start, r.stop - 1] for r in map(self.valid, range(self.outputs))], np.int32)


def check_window(op: OpCall) -> str | None:
    for name, window in zip(("row", "column"), Window.of(op), strict=True):
        if any(not len(window.valid(o)) for o in range(window.outputs)):
            return f"a window of an output {name} lies in the padding entirely; every window must touch the image."
    return None


def _pool(op: OpCall, k: Emitter, tables: list[Any], lanes: int, body: Callable[[list[Any], list[list[Any]], Any, int], None]) -> None:
    """`body([n, oh, ow], addresses[kh][kw], channel, lanes)` for every pixel and channel vector.

    Addresses are those of the window's taps, clamped to its valid ones: a border window sees some taps twice, which no maximum notices.
    """
    rows, columns = Window.of(op)
    source = k.operands()[0]
    batch, outputs = op.output.shape[0], op.output.shape[1]
    row_bounds, column_bounds = tables
    begin, end = columns.whole()

    def tap(bounds: Any, output: Any, t: int) -> Any:
        return T.max(T.min(T.int32(t), bounds[output * 2 + 1]), bounds[output * 2])

    with loops(share(k, batch * outputs)) as (line,):
        n, oh = T.bind(line // outputs), T.bind(line % outputs)
        lines = [T.bind(T.int32(0) + source.at([n, oh * rows.stride - rows.pad + tap(row_bounds, oh, t) * rows.dilation, 0, 0])) for t in range(rows.taps)]
        for first, last, whole in ((0, begin, False), (begin, end, True), (max(begin, end), columns.outputs, False)):
            if first >= last:
                continue
            with loops((first, last)) as (ow,):
                offsets = [
                    T.bind((ow * columns.stride - columns.pad + (t if whole else tap(column_bounds, ow, t)) * columns.dilation) * source.strides[2])
                    for t in range(columns.taps)
                ]

                addresses = [[a + b for b in offsets] for a in lines]
                vectors(op.output.shape[3], lanes, functools.partial(body, [n, oh, ow], addresses))


def max_pool2d(op: OpCall, target: Target, row: str) -> Kernel:
    """The maximum of stored bytes is the stored maximum: storage keeps order."""
    windows = Window.of(op)
    taps = windows[0].taps * windows[1].taps
    tasks = task_count(math.prod(op.output.shape) * taps, op.output.shape[0] * op.output.shape[1], 200_000)

    def emit(k: Emitter) -> None:
        source, out = k.operands()[0], view(k.output, op.output)

        def body(pixel: list[Any], addresses: list[list[Any]], c: Any, lanes: int) -> None:
            value = None
            for address in (a for r in addresses for a in r):
                x = load(source.buffer, address + c, lanes)
                value = x if value is None else T.bind(T.max(value, x))
            store(out.buffer, out.at([*pixel, c]), recode(value, source.dtype, out.dtype, lanes), lanes)

        _pool(op, k, k.arrays[:2], k.width, body)

    return make_kernel(row, op, target, emit, tasks=tasks, arrays=[w.bounds().reshape(-1) for w in windows])


def average_tables(op: OpCall) -> list[np.ndarray]:
    """Per output pixel, flat: the multiplier float32(ratio / count), and the sum of the zero points of its valid taps, as stored."""
    a = op.attrs
    rows, columns = Window.of(op)
    height, width = op.output.shape[1:3]
    valid = np.array([len(rows.valid(o)) for o in range(height)])[:, None] * np.array([len(columns.valid(o)) for o in range(width)])[None]
    count = np.full_like(valid, rows.taps * columns.taps) if a.get("count_include_pad", False) else np.maximum(valid, 1)
    multipliers = (np.float64(a["ratio"]) / count).astype(np.float32).reshape(-1)
    zeros = (valid * (a["x_zero_point"] + offset_of(str(op.operands[0].dtype)))).astype(np.int32).reshape(-1)
    return [multipliers, zeros]


def avg_pool2d(op: OpCall, target: Target, row: str) -> Kernel:
    """`requantize(sum (x - zx), float32(ratio / count))` over the valid taps.

    Per output pixel, constants hold the multiplier and the window's bounds; taps outside the image are skipped.
    """
    a = op.attrs
    rows, columns = windows = Window.of(op)
    height, width = op.output.shape[1:3]
    tasks = task_count(math.prod(op.output.shape) * rows.taps * columns.taps, op.output.shape[0] * height, 100_000)
    tables = average_tables(op)

    def emit(k: Emitter) -> None:
        source, out = k.operands()[0], view(k.output, op.output)
        taps = rows.taps * columns.taps
        end = Requantize.of(k, a, 255.0 * taps * float(tables[0].max()))
        row_bounds, column_bounds, multiplier, zero = k.arrays
        everywhere = k.avx2 and all(w.whole() == (0, w.outputs) for w in windows)
        # sums of at most 255 bytes fit 16 bits, where AVX2 adds twice as many a time
        narrow = {"uint8": "uint16", "int8": "int16"}[source.dtype] if k.avx2 and taps <= 255 else "int32"
        with loops(share(k, op.output.shape[0] * height), width) as (line, ow):
            n, oh = T.bind(line // height), T.bind(line % height)
            pixel = T.bind(oh * width + ow)
            m, z = T.bind(multiplier[pixel]), T.bind(zero[pixel])
            spans: list[Any] = [rows.taps, columns.taps]
            if not everywhere:
                spans = [(T.bind(b[o * 2]), T.bind(b[o * 2 + 1] + 1)) for b, o in ((row_bounds, oh), (column_bounds, ow))]
            ih, iw = oh * rows.stride - rows.pad, ow * columns.stride - columns.pad

            def step(c: Any, lanes: int) -> None:
                acc = accumulator(lanes, narrow)
                store(acc, 0, splat(tirx.const(0, narrow), lanes), lanes)
                with loops(*spans) as (r, s):
                    x = load(source.buffer, source.at([n, ih + r * rows.dilation, iw + s * columns.dilation, c]), lanes)
                    store(acc, 0, load(acc, 0, lanes) + cast(narrow, x, lanes), lanes)
                total = cast("int32", load(acc, 0, lanes), lanes) - splat(z, lanes)
                store(out.buffer, out.at([n, oh, ow, c]), end(total, splat(m, lanes), lanes), lanes)

            vectors(op.output.shape[3], k.width, step)

    return make_kernel(row, op, target, emit, tasks=tasks, arrays=[*(w.bounds().reshape(-1) for w in windows), *tables])


def mean(op: OpCall, target: Target, row: str) -> Kernel:
    """`requantize(sum (x - zx), float32(ratio / count))` over `axes`. Vectors run along the last dimension, kept or summed."""
    a = op.attrs
    shape = op.operands[0].shape
    rank = len(shape)
    axes = sorted({d % rank for d in a["axes"]})
    kept = [d for d in range(rank - 1) if d not in axes]
    across = rank - 1 in axes
    summed = [d for d in axes if d != rank - 1]
    count = math.prod(shape[d] for d in axes)
    full = tuple(1 if d in axes else e for d, e in enumerate(shape))  # the output with every dimension kept
    width = min(vector_bytes(target), 1 << (shape[-1].bit_length() - 1))
    blocks = 1 if across else -(-shape[-1] // width)
    outputs = math.prod(shape[d] for d in kept)
    tasks = task_count(math.prod(shape), outputs if outputs > 1 else shape[-1] // width if not across else 1)

    def emit(k: Emitter) -> None:
        source = k.operands()[0]
        out = view(k.output, op.output if len(op.output.shape) == rank else Layout(full, op.output.dtype))
        end = Requantize.of(k, a, magnitude(canonical(source.dtype)) * a["ratio"])
        multiplier = k.f32(np.float64(a["ratio"]) / count)
        zero = k.i32(-count * (a["x_zero_point"] + offset_of(source.dtype)))

        def accumulate(acc: Any, position: list[Any], lanes: int) -> None:
            x = cast("int32", load(source.buffer, source.at(position), lanes), lanes)
            store(acc, 0, load(acc, 0, lanes) + x, lanes)

        def at(outer: list[Any], inner: list[Any], last: Any) -> list[Any]:
            index = dict(zip(kept, outer, strict=True)) | dict(zip(summed, inner, strict=True))
            return [index.get(d, 0) for d in range(rank - 1)] + [last]

        if outputs > 1:
            extents: list[Any] = [shape[d] for d in kept]
            widest = max(range(len(kept)), key=lambda d: extents[d])
            extents[widest] = share(k, extents[widest])
            extents.append(blocks)
        else:
            extents = [*[1] * len(kept), blocks if across else tiles(k, shape[-1], width)]
        with loops(*extents) as (*outer, block):
            c = T.int32(0) if across else T.bind(T.min(block * width, shape[-1] - width))
            part = accumulator(width)
            store(part, 0, splat(T.int32(0), width), width)
            vectors_along = shape[-1] // width if across else 1
            with loops(*(shape[d] for d in summed), vectors_along) as (*inner, i):
                accumulate(part, at(outer, inner, c + i * width), width)
            if not across:
                value = end(load(part, 0, width) + splat(zero, width), splat(multiplier, width), width)
                store(out.buffer, out.at(at(outer, [0] * len(summed), c)), value, width)
            else:
                whole = accumulator(1)
                T.buffer_store(whole, zero, [0])
                with loops(width) as (i,):
                    T.buffer_store(whole, whole[0] + part[i], [0])
                if shape[-1] % width:
                    with loops(*(shape[d] for d in summed), (shape[-1] // width * width, shape[-1])) as (*inner, i):
                        accumulate(whole, at(outer, inner, i), 1)
                T.buffer_store(out.buffer, end(whole[0], multiplier, 1), [out.at(at(outer, [0] * len(summed), 0))])

    return make_kernel(row, op, target, emit, tasks=tasks, arrays=constants_of(op))


def check_mean(op: OpCall) -> str | None:
    x = op.operands[0]
    count = math.prod(x.shape[d] for d in op.attrs["axes"])
    most = 2**15 if x.dtype == "int16" else 2**23
    return f"the mean of {count} elements may overflow int32; at most {most} are supported." if count > most else None


portable("qc.max_pool2d", max_pool2d, check=check_window, own_channels=True)
portable("qc.avg_pool2d", avg_pool2d, own_channels=True)
portable("qc.mean", mean, check=check_mean, own_channels=True)
