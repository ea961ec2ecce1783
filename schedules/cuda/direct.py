"""Convolution, transposed convolution and dense of any geometry and grouping, int8 and float32: a thread computes adjacent output channels of a
pixel and skips taps outside of the image. What the tiled rows don't take comes here."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.schedules.builder import Emitter, loops, make_kernel, view
from qcompiler.schedules.cuda.base import gpu_row, local
from qcompiler.schedules.cuda.epilogue import Epilogue, finish_arrays
from qcompiler.schedules.cuda.tail import EndingRow
from qcompiler.schedules.portable.conv import Geometry, check_operands
from qcompiler.schedules.portable.threads import each, quarter, unpack, unravel, words
from qcompiler.schedules.table import Kernel, Layout, OpCall


def convolution(op: OpCall, target: Target, row: str) -> Kernel:
    """Constants: weights [G, KH * KW, I, channels] with the channels of a group padded to whole runs, then those of `Epilogue`."""
    geometry = Geometry.of(op)
    x, w = op.operands[:2]
    assert isinstance(x, Layout) and isinstance(w, np.ndarray)
    integer = not op.name.startswith("qc.f32.")
    groups = int(op.attrs.get("groups", 1))
    outputs, inner, taps = w.shape[0] // groups, w.shape[-1], math.prod(geometry.kernel)
    run = 4 if outputs >= 4 else 1
    runs = -(-outputs // run)
    packed = np.zeros((groups, taps, inner, runs * run), w.dtype)
    packed[..., :outputs] = w.reshape(groups, outputs, taps, inner).transpose(0, 2, 3, 1)
    channel = np.arange(runs * run)
    channels = np.where(channel < outputs, channel + np.arange(groups)[:, None] * outputs, -1).reshape(-1)
    finish = finish_arrays(op, np.asarray(op.operands[2]), channels)
    kind = "int32" if integer else "float32"
    outer = op.output.shape[:-1]
    pixels = math.prod(outer)

    def emit(k: Emitter) -> None:
        source = view(k.inputs[0], x)
        weights = words(k.arrays[0]) if integer and run == 4 else k.arrays[0]
        zero = k.i32(op.attrs["x_zero_point"]) if integer else None
        end = Epilogue(k, k.arrays[1:], run, outputs, groups)
        with each(k, pixels, groups, runs) as (pixel, group, part):
            accs = local(run, kind)
            for i in range(run):
                T.buffer_store(accs, T.Cast(kind, 0), [i])

            def accumulate(position: list[Any], tap: Any) -> None:
                start = T.bind(T.int32(0) + source.at([*position, group * inner]))
                row_ = T.bind((group * taps + tap) * inner)
                with loops(inner) as (i,):
                    value = source.buffer[start + i]
                    value = T.bind(T.Cast("int32", value) - zero if integer else value)
                    at = T.bind(((row_ + i) * runs + part) * run)
                    if integer and run == 4:
                        word = T.bind(weights[quarter(at)])
                        factors = [T.Cast("int32", unpack(word, j, "int8")) for j in range(4)]
                    else:
                        factors = [T.Cast(kind, weights[at + j]) for j in range(run)]
                    for j, factor in enumerate(factors):
                        T.buffer_store(accs, accs[j] + value * factor, [j])

            if op.name.endswith("dense"):
                accumulate(unravel(pixel, outer), 0)
            else:
                image, oh, ow = unravel(pixel, outer)
                with loops(geometry.kernel[0]) as (kh,), geometry.tap(0, oh, kh, x.shape[1]) as ih:
                    with loops(geometry.kernel[1]) as (kw,), geometry.tap(1, ow, kw, x.shape[2]) as iw:
                        accumulate([image, ih, iw], kh * geometry.kernel[1] + kw)
            end([accs[i] for i in range(run)], (group * runs + part) * run, pixel, group, part * run)

    return make_kernel(row, op, target, emit, arrays=[packed, *finish], macs=pixels * w.size, threads=pixels * groups * runs)


for _name in ("qc.conv2d", "qc.conv2d_transpose", "qc.dense", "qc.f32.conv2d", "qc.f32.conv2d_transpose", "qc.f32.dense"):
    gpu_row(_name, convolution, check_operands, EndingRow)
