"""Pools, means and resizing on a GPU."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.numerics.resample import BITS
from qcompiler.schedules.builder import BLOCK, Emitter, Requantize, loops, make_kernel, view
from qcompiler.schedules.cuda.base import Reader, gpu_row, local, run_length
from qcompiler.schedules.portable.elementwise import constants_of
from qcompiler.schedules.portable.pool import Window, average_tables, check_mean, check_window
from qcompiler.schedules.portable.resize import ONE
from qcompiler.schedules.portable.threads import alignment, each, pack, store_words, unravel, words
from qcompiler.schedules.table import Kernel, Layout, OpCall


def write(view_: Any, index: Any, values: list[Any]) -> None:
    """Store adjacent 8-bit results, given as int32 with the byte at the bottom."""
    if len(values) == 1:
        T.buffer_store(view_.buffer, T.Cast(view_.dtype, values[0]), [index])
        return
    packed = [T.bind(pack(values[i : i + 4])) for i in range(0, len(values), 4)]
    store_words(words(view_.buffer), index, packed, alignment(view_))


def pool2d(op: OpCall, target: Target, row: str) -> Kernel:
    """A thread computes a pixel's 4 channels (1, where they are no aligned word) over the taps that lie in the image."""
    rows, columns = Window.of(op)
    batch, height, width, channels = op.output.shape
    average = op.name == "qc.avg_pool2d"
    tables = average_tables(op) if average else []

    def emit(k: Emitter) -> None:
        source, out = view(k.inputs[0], op.tensors[0]), view(k.output, op.output)
        run = run_length(source, out)
        read = Reader(source, run)
        end = Requantize.of(k, op.attrs) if average else None
        with each(k, batch, height, width, channels // run) as (n, oh, ow, part):
            accs = local(run)
            pixel = T.bind(oh * width + ow)
            for i in range(run):
                T.buffer_store(accs, T.int32(0) - k.arrays[1][pixel] if average else T.int32(-128), [i])
            with loops(rows.taps, columns.taps) as (r, s):
                ih = T.bind(oh * rows.stride - rows.pad + r * rows.dilation)
                iw = T.bind(ow * columns.stride - columns.pad + s * columns.dilation)
                with T.If(T.And(T.And(ih >= 0, ih < rows.size), T.And(iw >= 0, iw < columns.size))), T.Then():
                    for i, value in enumerate(read(T.bind(T.int32(0) + source.at([n, ih, iw, part * run])))):
                        T.buffer_store(accs, accs[i] + value if average else T.max(accs[i], value), [i])
            values = [accs[i] for i in range(run)]
            if end:
                multiplier = T.bind(k.arrays[0][pixel])
                values = [T.bind(end.store_word(T.Cast("float32", v) * multiplier, 1)) for v in values]
            write(out, T.bind(T.int32(0) + out.at([n, oh, ow, part * run])), values)

    return make_kernel(row, op, target, emit, arrays=tables, threads=math.prod(op.output.shape[:3]) * -(-channels // 4))


def mean(op: OpCall, target: Target, row: str) -> Kernel:
    """`parts` threads of a block share an output (4 channels of one, where they are a word): each sums every `parts`-th element, the first adds up."""
    a, x = op.attrs, op.operands[0]
    assert isinstance(x, Layout)
    rank = len(x.shape)
    axes = sorted({d % rank for d in a["axes"]})
    kept = [d for d in range(rank) if d not in axes]
    count = math.prod(x.shape[d] for d in axes)
    full = tuple(1 if d in axes else e for d, e in enumerate(x.shape))  # the output with every dimension kept
    layout = op.output if len(op.output.shape) == rank else Layout(full, op.output.dtype)
    parts = min(BLOCK // 32, 1 << max(0, (count // 4).bit_length() - 1)) if rank - 1 not in axes else 32
    each_block = BLOCK // parts

    bytes_only = np.dtype(x.dtype).itemsize == np.dtype(layout.dtype).itemsize == 1
    run = 4 if bytes_only and rank - 1 in kept and x.channel_pitch % 4 == layout.channel_pitch % 4 == x.shape[-1] % 4 == 0 else 1
    work = [x.shape[d] // (run if d == rank - 1 else 1) for d in kept]
    blocks = -(-math.prod(work) // each_block)

    def emit(k: Emitter) -> None:
        source, out = view(k.inputs[0], x), view(k.output, layout)
        read = Reader(source, run)
        end = Requantize.of(k, a)
        multiplier, start = k.f32(np.float64(a["ratio"]) / count), k.i32(-count * a["x_zero_point"])
        sums = T.alloc_buffer((BLOCK * run,), "int32", scope="shared")
        part = T.bind(T.truncdiv(k.thread, each_block))
        item = T.bind(k.group * each_block + T.truncmod(k.thread, each_block))
        accs = local(run)
        for i in range(run):
            T.buffer_store(accs, T.int32(0), [i])

        def at(outer: list[Any], inner: list[Any]) -> list[Any]:
            index = dict(zip(kept, outer, strict=True)) | dict(zip(axes, inner, strict=True))
            return [index[d] * run if d == rank - 1 else index[d] for d in range(rank)]

        inside = item < math.prod(work)
        with T.If(inside), T.Then():
            outer = unravel(item, work)
            with T.serial(0, -(-count // parts)) as step:
                element = T.bind(step * parts + part)
                with T.If(element < count), T.Then():
                    inner = unravel(element, [x.shape[d] for d in axes])
                    for i, value in enumerate(read(T.bind(T.int32(0) + source.at(at(outer, inner))))):
                        T.buffer_store(accs, accs[i] + value, [i])
        for i in range(run):
            T.buffer_store(sums, accs[i], [i * BLOCK + k.thread])
        T.evaluate(T.tvm_storage_sync("shared"))
        with T.If(T.And(inside, part == 0)), T.Then():
            outer = unravel(item, work)
            results = []
            for i in range(run):
                total = start
                for p in range(parts):
                    total = total + sums[i * BLOCK + p * each_block + k.thread]
                results.append(T.bind(end.store_word(T.Cast("float32", total) * multiplier, 1)))
            write(out, T.bind(T.int32(0) + out.at(at(outer, [0] * len(axes)))), results)

    return make_kernel(row, op, target, emit, arrays=constants_of(op), threads=blocks * BLOCK)


def resize2d(op: OpCall, target: Target, row: str) -> Kernel:
    """nearest: a gather. linear: `requantize(sum of corner * weight, 2^-20)`, |sum| <= 128 * 2^20."""
    a = op.attrs
    linear = a["method"] == "linear"
    names = ["iy0", "ix0"] + (["iy1", "ix1", "wy", "wx"] if linear else [])
    batch, height, width, channels = op.output.shape

    def emit(k: Emitter) -> None:
        source, out = view(k.inputs[0], op.tensors[0]), view(k.output, op.output)
        tables = dict(zip(names, k.arrays, strict=True))
        run = run_length(source, out)
        read = Reader(source, run)
        end, step = (Requantize.of(k, {}), k.f32(2.0**-20)) if linear else (None, None)
        with each(k, batch, height, width, channels // run) as (n, oh, ow, part):

            def corner(y: str, x: str) -> list[Any]:
                return read(T.bind(T.int32(0) + source.at([n, tables[y][oh], tables[x][ow], part * run])))

            if end:
                wy, wx = T.bind(tables["wy"][oh]), T.bind(tables["wx"][ow])
                corners = [(corner(y, x), T.bind(v * u)) for y, v in (("iy0", ONE - wy), ("iy1", wy)) for x, u in (("ix0", ONE - wx), ("ix1", wx))]
                values = []
                for i in range(run):
                    acc = T.bind(sum((c[i] * weight for c, weight in corners[1:]), corners[0][0][i] * corners[0][1]))
                    values.append(T.bind(end.store_word(T.Cast("float32", acc) * step, 1)))
            else:
                values = corner("iy0", "ix0")
            write(out, T.bind(T.int32(0) + out.at([n, oh, ow, part * run])), values)

    arrays = [np.asarray(a[name], np.int32) for name in names]
    return make_kernel(row, op, target, emit, arrays=arrays, threads=math.prod(op.output.shape[:3]) * -(-channels // 4))


def resample(op: OpCall, target: Target, row: str) -> Kernel:
    """Pixels along one axis, as `qc.resample` has them: a thread per number."""
    axis, first, weights = op.attrs["axis"], np.asarray(op.attrs["first"], np.int32), np.asarray(op.attrs["weights"], np.int32)
    taps = weights.size // first.size

    def emit(k: Emitter) -> None:
        source, out = view(k.inputs[0], op.tensors[0]), view(k.output, op.output)
        with each(k, *op.output.shape) as index:
            place, acc = index[axis], local(1)
            start = T.bind(T.int32(0) + source.at([*index[:axis], k.arrays[0][place], *index[axis + 1 :]]))
            T.buffer_store(acc, T.int32(1 << (BITS - 1)), [0])
            with T.serial(0, taps) as t:
                T.buffer_store(acc, acc[0] + T.Cast("int32", source.buffer[start + t * source.strides[axis]]) * k.arrays[1][place * taps + t], [0])
            value = T.max(T.min(T.shift_right(acc[0], T.int32(BITS)), T.int32(255)), T.int32(0))
            T.buffer_store(out.buffer, T.Cast("uint8", value), [out.at(index)])

    return make_kernel(row, op, target, emit, arrays=[first, weights], threads=math.prod(op.output.shape))


gpu_row("qc.max_pool2d", pool2d, check_window)
gpu_row("qc.avg_pool2d", pool2d)
gpu_row("qc.mean", mean, check_mean)
gpu_row("qc.resize2d", resize2d)
gpu_row("qc.resample", resample)
