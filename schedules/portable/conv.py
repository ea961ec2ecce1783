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
from qcompiler.schedules.conv_epilogue import by_sign
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
        return Geometry(kernel, strides, pads, dilation, op.name.endswith("conv2d_transpose"))

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
    """From a vector of accumulators to stored output: int8 (plain or with a residual) or float32. A second row of multipliers is for negative numbers."""

    def __init__(self, k: Emitter, integer: bool, out: View, residual: View | None) -> None:
        a = k.op.attrs
        self.out, self.residual, self.integer = out, residual, integer
        self.multipliers = k.arrays[2] if integer else None
        self.channels, self.bends_sum = out.shape[-1], bool(a.get("bends_sum"))
        self.bends = integer and len(k.op.operands[3].shape) > 1 and not self.bends_sum
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
            multiplier = load(self.multipliers, channel, lanes)
            acc = cast("float32", acc, lanes) * (by_sign(acc, multiplier, self._negative(channel, lanes), lanes) if self.bends else multiplier)
        if self.end is not None:
            value = self._stored(acc, extra, channel, lanes)
        else:
            value = acc if extra is None else acc + extra
            value = clamp(value, self.low, self.high, lanes)
        store(self.out.buffer, self.out.at([*index, channel]), value, lanes)

    def _negative(self, channel: Any, lanes: int) -> Any:
        return load(self.multipliers, channel + self.channels, lanes)

    def _stored(self, scaled: Any, extra: Any, channel: Any, lanes: int) -> Any:
        assert self.end is not None
        if extra is None:
            return self.end.store_value(scaled, lanes)
        limit = tirx.const(2.0**30, "float32")  # within it every CPU converts to int32 alike
        rounded = cast("int32", T.nearbyint(clamp(scaled, -limit, limit, lanes)), lanes)
        total = rounded + centered(extra, self.zero, lanes) * splat(self.factor, lanes)
        scale = splat(self.scale, lanes)
        if self.bends_sum:
            total = T.bind(total)
            scale = by_sign(total, scale, self._negative(channel, lanes), lanes)
        return self.end(total, scale, lanes)


@dataclass(frozen=True)
class Blocks:
    """How output channels are cut into vectors. A vector holds up to `lanes` channels of one group or, when groups are small, all channels of up to
    `together` neighbouring groups: then the inputs of all of them are loaded at once and spread over the lanes by a shuffle.

    `outputs`, `inner`: output and input channels of a group; `taps`: of a kernel.
    """

    groups: int
    outputs: int
    inner: int
    taps: int
    together: int
    lanes: int

    @staticmethod
    def of(op: OpCall, weight: np.ndarray, taps: int, width: int) -> Blocks:
        """`width`: of a vector, in bytes."""
        groups = op.attrs.get("groups", 1)
        outputs, inner = weight.shape[0] // groups, weight.shape[-1]
        together = _power_below(min(groups, max(1, width // outputs)))
        return Blocks(groups, outputs, inner, taps, together if together * inner <= 2 * width else 1, min(width, _power_below(outputs)))

    def pack(self, weight: np.ndarray) -> np.ndarray:
        """[G, KH, KW, I, O/G], or [KH, KW, I, O] for groups together."""
        by_group = weight.reshape(self.groups, self.outputs, self.taps, self.inner)
        return np.ascontiguousarray(by_group.transpose(2, 3, 0, 1) if self.together > 1 else by_group.transpose(0, 2, 3, 1))

    def by_channel(self, pixels: int) -> bool:
        """Whether tasks share channels, because there is one pixel."""
        return pixels == 1 and self.groups == 1


class PixelKernel:
    """The kernel while it is written: one output pixel at a time."""

    def __init__(self, k: Emitter, geometry: Geometry, blocks: Blocks, integer: bool) -> None:
        op = k.op
        self.k, self.geometry, self.blocks = k, geometry, blocks
        self.dense, self.kind = op.name.endswith("dense"), "int32" if integer else "float32"
        self.source = view(k.inputs[0], op.tensors[0])
        residual = view(k.inputs[1], op.tensors[1]).broadcast(op.output.shape) if len(op.tensors) > 1 else None
        self.weights, self.bias = k.arrays[:2]
        self.zero = k.i32(op.attrs["x_zero_point"] + offset_of(op.tensors[0].dtype)) if integer else None
        self.finish = Epilogue(k, integer, view(k.output, op.output), residual)

    def emit(self) -> None:
        k, b = self.k, self.blocks
        outer = k.op.output.shape[:-1]
        if b.by_channel(math.prod(outer)):
            with loops(tiles(k, b.outputs, b.lanes)) as (tile,):
                self.block([0] * len(outer), T.int32(0), T.bind(T.min(tile * b.lanes, b.outputs - b.lanes)), b.lanes, 0)
            return
        with loops(share(k, math.prod(outer))) as (pixel,):
            index = _unravel(pixel, outer)
            if b.together > 1:
                vectors(b.groups, b.together, lambda g, n: self.block(index, g, T.int32(0), n * b.outputs, n))
                return
            with loops(b.groups) as (group,):
                vectors(b.outputs, b.lanes, lambda c, n: self.block(index, group, c, n, 0))

    def block(self, index: list[Any], group: Any, first: Any, n: int, spread: int) -> None:
        """`n` output channels from `first` of `group` on; `spread` groups with all their channels when that is not 0."""
        channel = T.bind(group * self.blocks.outputs + first)
        acc = accumulator(n, self.kind)
        store(acc, 0, load(self.bias, channel, n), n)
        with self.taps(index) as (position, tap):
            start = T.bind(self.source.at([*position, group * self.blocks.inner]))
            if spread:
                self.add_groups(acc, start, tap, channel, n, spread)
            else:
                self.add_group(acc, start, tap, group, first, n)
        self.finish(load(acc, 0, n), index, channel, n)

    @contextmanager
    def taps(self, index: list[Any]) -> Iterator[tuple[list[Any], Any]]:
        """The place of the input pixel and the number of a tap; statements inside are executed for every tap of the output pixel that lies in the image."""
        if self.dense:
            yield index, 0
            return
        (height, width), (image, oh, ow), shape = self.geometry.kernel, index, self.k.op.tensors[0].shape
        with loops(height) as (kh,), self.geometry.tap(0, oh, kh, shape[1]) as ih:
            with loops(width) as (kw,), self.geometry.tap(1, ow, kw, shape[2]) as iw:
                yield [image, ih, iw], kh * width + kw

    def add_group(self, acc: Any, start: Any, tap: Any, group: Any, first: Any, n: int) -> None:
        """The products of a tap, whose input channels lie from `start` on, to `n` channels of one group."""
        b = self.blocks
        weight = T.bind((group * b.taps + tap) * (b.inner * b.outputs) + first)
        with loops(b.inner) as (i,):
            self.add(acc, splat(T.bind(self.value(self.source.buffer[start + i], 1)), n), weight + i * b.outputs, n)

    def add_groups(self, acc: Any, start: Any, tap: Any, channel: Any, n: int, groups: int) -> None:
        """The products of a tap, whose input channels lie from `start` on, to all channels of `groups` groups."""
        b = self.blocks
        values = T.bind(load(self.source.buffer, start, groups * b.inner))
        for i in range(b.inner):
            order = [lane // b.outputs * b.inner + i for lane in range(n)]
            lane_values = values if b.inner == b.outputs == 1 else T.Shuffle([values] * -(-n // (groups * b.inner)), order)
            self.add(acc, self.value(lane_values, n), (tap * b.inner + i) * (b.groups * b.outputs) + channel, n)

    def value(self, stored: Any, n: int) -> Any:
        return centered(stored, self.zero, n) if self.zero is not None else stored

    def add(self, acc: Any, value: Any, weight: Any, n: int) -> None:
        store(acc, 0, load(acc, 0, n) + cast(self.kind, load(self.weights, weight, n), n) * value, n)


def convolution(op: OpCall, target: Target, row: str) -> Kernel:
    """Every member of the family. Constants: packed weights, bias, and for int8 the multipliers."""
    geometry, w = Geometry.of(op), op.operands[1]
    assert isinstance(w, np.ndarray)
    integer = not op.name.startswith("qc.f32.")
    blocks = Blocks.of(op, w, math.prod(geometry.kernel), vector_bytes(target))
    pixels = math.prod(op.output.shape[:-1])
    macs = pixels * w.size
    tasks = task_count(macs, blocks.outputs // blocks.lanes if blocks.by_channel(pixels) else pixels, MACS_PER_TASK)
    arrays = [blocks.pack(w), *(np.asarray(o).reshape(-1) for o in op.operands[2 : 4 if integer else 3])]
    return make_kernel(row, op, target, lambda k: PixelKernel(k, geometry, blocks, integer).emit(), tasks=tasks, arrays=arrays, macs=macs)


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


for _name in ("qc.conv2d", "qc.conv2d_transpose", "qc.dense", "qc.f32.conv2d", "qc.f32.conv2d_transpose", "qc.f32.dense"):
    portable(_name, convolution, check=check_operands, own_channels=not _name.endswith("dense"))
