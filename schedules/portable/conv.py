"""Convolution, transposed convolution and dense of any geometry and grouping, int8 and float32: correct everywhere,
fast enough to fall back on.

One output pixel at a time, vectorized over the output channels of a group, or of several groups when groups are small.
Taps outside the image are skipped by a test, so any layout will do and padding contributes exactly 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.schedules.builder import (
    Emitter,
    Requantize,
    View,
    accumulator,
    cast,
    centered,
    clamp,
    load,
    loops,
    make_kernel,
    offset_of,
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
from qcompiler.schedules.table import Kernel, Layout, OpCall

MACS_PER_TASK = 500_000


@dataclass(frozen=True)
class Geometry:
    """Where a tap of an output pixel reads: forward `o * stride - pad + t * dilation`; transposed `(o + pad - t * dilation) / stride`."""

    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    pads: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    transposed: bool = False

    @staticmethod
    def of(op: OpCall) -> Geometry:
        if op.name.endswith("dense"):
            return Geometry()
        a, w = op.attrs, op.operands[1]
        kernel, strides, pads, dilation = ((int(v[0]), int(v[1])) for v in (w.shape[1:3], a["strides"], a["padding"], a.get("dilation", (1, 1))))
        return Geometry(kernel, strides, pads, dilation, op.name == "qc.conv2d_transpose")

    @contextmanager
    def tap(self, axis: int, output: Any, tap: Any, size: int) -> Iterator[Any]:
        """The input coordinate of a tap; statements inside are executed only when it lies in the image."""
        stride, pad, dilation = self.strides[axis], self.pads[axis], self.dilation[axis]
        if self.transposed:
            scaled = T.bind(output + pad - tap * dilation)
            valid = T.And(scaled >= 0, scaled < size * stride)
            if stride > 1:
                valid = T.And(valid, T.truncmod(scaled, stride) == 0)
            position = T.truncdiv(scaled, stride)
        else:
            position = T.bind(output * stride - pad + tap * dilation)
            valid = T.And(position >= 0, position < size)
        with T.If(valid), T.Then():
            yield position


class Epilogue:
    """From a vector of accumulators to stored output: int8 (plain or with a residual) or float32."""

    def __init__(self, k: Emitter, integer: bool, out: View, residual: View | None) -> None:
        a = k.op.attrs
        self.out, self.residual, self.integer = out, residual, integer
        self.multipliers = k.arrays[2] if integer else None
        self.end = Requantize.of(k, a) if integer and out.dtype != "float32" else None
        if self.end is None:
            names = ("float_low", "float_high") if integer else ("low", "high")
            self.low, self.high = (k.f32_or_none(a.get(name)) for name in names)
        elif residual is not None:
            self.zero = k.i32(a["residual_zero_point"] + offset_of(residual.dtype))
            self.factor = k.i32(a["residual_multiplier"])
            self.scale = k.f32(2.0 ** -a["residual_shift"])

    def __call__(self, acc: Any, index: list[Any], channel: Any, lanes: int) -> None:
        """Finish and store the vector at outer position `index`, channels from `channel` on."""
        extra = load(self.residual.buffer, self.residual.at([*index, channel]), lanes) if self.residual is not None else None
        if self.integer:
            acc = cast("float32", acc, lanes) * load(self.multipliers, channel, lanes)
        if self.end is not None:
            value = self._stored(acc, extra, lanes)
        else:
            value = acc if extra is None else acc + extra
            value = clamp(value, self.low, self.high, lanes)
        store(self.out.buffer, self.out.at([*index, channel]), value, lanes)

    def _stored(self, scaled: Any, extra: Any, lanes: int) -> Any:
        assert self.end is not None
        if extra is None:
            return self.end.store_value(scaled, lanes)
        limit = tirx.const(2.0**30, "float32")  # within it every CPU converts to int32 alike
        rounded = cast("int32", T.nearbyint(clamp(scaled, -limit, limit, lanes)), lanes)
        total = rounded + centered(extra, self.zero, lanes) * splat(self.factor, lanes)
        return self.end(total, splat(self.scale, lanes), lanes)


def convolution(op: OpCall, target: Target, row: str) -> Kernel:
    """Every member of the family. Constants: packed weights, bias, and for int8 the multipliers.

    A vector holds output channels of one group (weights [G, KH, KW, I, O/G]) or, when groups are small, of `together` neighbouring groups
    (weights [KH, KW, I, O]): then the inputs of all of them are loaded at once and spread over the lanes by a shuffle.
    """
    geometry = Geometry.of(op)
    x, w = op.operands[:2]
    assert isinstance(x, Layout) and isinstance(w, np.ndarray)
    integer = not op.name.startswith("qc.f32.")
    groups = op.attrs.get("groups", 1)
    outputs, inner, taps = w.shape[0] // groups, w.shape[-1], math.prod(geometry.kernel)
    width = vector_bytes(target)
    together = _power_below(min(groups, max(1, width // outputs)))
    if together * inner > 2 * width:
        together = 1
    by_group = w.reshape(groups, outputs, taps, inner)
    packed = by_group.transpose(2, 3, 0, 1) if together > 1 else by_group.transpose(0, 2, 3, 1)
    outer = op.output.shape[:-1]
    pixels = math.prod(outer)
    macs = pixels * w.size
    lanes = min(width, _power_below(outputs))
    by_channel = pixels == 1 and groups == 1
    tasks = task_count(macs, outputs // lanes if by_channel else pixels, MACS_PER_TASK)
    arrays = [np.ascontiguousarray(packed), *(np.asarray(o).reshape(-1) for o in op.operands[2 : 4 if integer else 3])]
    kind = "int32" if integer else "float32"

    def emit(k: Emitter) -> None:
        source = view(k.inputs[0], x)
        residual = view(k.inputs[1], op.tensors[1]).broadcast(op.output.shape) if len(op.tensors) > 1 else None
        weights, bias = k.arrays[:2]
        zero = k.i32(op.attrs["x_zero_point"] + offset_of(x.dtype)) if integer else None
        finish = Epilogue(k, integer, view(k.output, op.output), residual)

        def convert(value: Any, n: int) -> Any:
            return centered(value, zero, n) if integer else value

        def block(index: list[Any], group: Any, first: Any, n: int, spread: int) -> None:
            """`n` output channels from `first` of `group` on; `spread` groups with all their channels when that is not 0."""
            channel = T.bind(group * outputs + first)
            acc = accumulator(n, kind)
            store(acc, 0, load(bias, channel, n), n)

            def add(value: Any, weight: Any) -> None:
                store(acc, 0, load(acc, 0, n) + cast(kind, load(weights, weight, n), n) * value, n)

            def accumulate(position: list[Any], tap: Any) -> None:
                start = T.bind(source.at([*position, group * inner]))
                if spread:
                    values = T.bind(load(source.buffer, start, spread * inner))
                    for i in range(inner):
                        order = [lane // outputs * inner + i for lane in range(n)]
                        lane_values = values if inner == outputs == 1 else T.Shuffle([values] * -(-n // (spread * inner)), order)
                        add(convert(lane_values, n), (tap * inner + i) * (groups * outputs) + channel)
                    return
                weight = T.bind((group * taps + tap) * (inner * outputs) + first)
                with loops(inner) as (i,):
                    add(splat(T.bind(convert(source.buffer[start + i], 1)), n), weight + i * outputs)

            if op.name.endswith("dense"):
                accumulate(index, 0)
            else:
                image, oh, ow = index
                with loops(geometry.kernel[0]) as (kh,), geometry.tap(0, oh, kh, x.shape[1]) as ih:
                    with loops(geometry.kernel[1]) as (kw,), geometry.tap(1, ow, kw, x.shape[2]) as iw:
                        accumulate([image, ih, iw], kh * geometry.kernel[1] + kw)
            finish(load(acc, 0, n), index, channel, n)

        if by_channel:
            with loops(tiles(k, outputs, lanes)) as (tile,):
                block([0] * len(outer), T.int32(0), T.bind(T.min(tile * lanes, outputs - lanes)), lanes, 0)
            return
        with loops(share(k, pixels)) as (pixel,):
            index = _unravel(pixel, outer)
            if together > 1:
                vectors(groups, together, lambda g, n: block(index, g, T.int32(0), n * outputs, n))
                return
            with loops(groups) as (group,):
                vectors(outputs, lanes, lambda c, n: block(index, group, c, n, 0))

    return make_kernel(row, op, target, emit, tasks=tasks, arrays=arrays, macs=macs)


def _power_below(value: int) -> int:
    """The largest power of two that is not above a positive value."""
    return 1 << (value.bit_length() - 1)


def _unravel(flat_index: Any, shape: tuple[int, ...]) -> list[Any]:
    """The multi-dimensional index of a row-major position."""
    index: list[Any] = []
    for extent in reversed(shape[1:]):
        index.insert(0, T.bind(flat_index % extent))
        flat_index = T.bind(flat_index // extent)
    return [flat_index, *index] if shape else []


def check_operands(op: OpCall) -> str | None:
    integer = not op.name.startswith("qc.f32.")
    if not all(isinstance(o, np.ndarray) for o in op.operands[1 : 4 if integer else 3]):
        return "weights, bias and multipliers must be constants; use a matmul of two activations otherwise."
    if not all(isinstance(o, Layout) for o in [op.operands[0], *op.operands[4 if integer else 3 :]]):
        return "the input and the residual operand must be computed at run time; a constant one can be folded."
    if integer and len(op.operands) > 4 and op.output.dtype == "float32":
        return "a residual operand and a float32 output exclude each other."
    return None


for _name in ("qc.conv2d", "qc.conv2d_transpose", "qc.dense", "qc.f32.conv2d", "qc.f32.dense"):
    portable(_name, convolution, check=check_operands, own_channels=not _name.endswith("dense"))
