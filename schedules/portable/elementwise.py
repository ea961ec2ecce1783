"""Elementwise operators: quantize, dequantize, requantize, add, mul, prelu, lut, lut16."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.numerics.spec import magnitude
from qcompiler.schedules import avx2
from qcompiler.schedules.builder import (
    Emitter,
    Requantize,
    View,
    canonical,
    cast,
    centered,
    has_avx2,
    load,
    make_kernel,
    offset_of,
    splat,
    task_count,
    view,
)
from qcompiler.schedules.conv_epilogue import by_sign
from qcompiler.schedules.isa import shuffle
from qcompiler.schedules.portable.base import portable
from qcompiler.schedules.portable.nest import Compute, elementwise
from qcompiler.schedules.table import Kernel, OpCall


def tasks_of(op: OpCall, grain: int = 50_000) -> int:
    """Tasks for work proportional to the output."""
    return task_count(math.prod(op.output.shape), 64, grain)


def constants_of(op: OpCall) -> list[np.ndarray]:
    return [o for o in op.operands if isinstance(o, np.ndarray)]


def quantized(k: Emitter) -> tuple[Compute, Compute]:
    """What `qc.quantize` makes of [float32]: the stored number, and a word with it in the low byte."""
    inverse = k.f32(1.0 / np.float64(np.float32(k.op.attrs["scale"])))
    end = Requantize.of(k, k.op.attrs)
    return lambda x, n: end.store_value(x[0] * splat(inverse, n), n), lambda x, n: end.store_word(x[0] * splat(inverse, n), n)


def quantize(op: OpCall, target: Target, row: str) -> Kernel:
    """float32 -> 8 or 16 bits, transposed by `axes` when given; the source may have any alignment."""
    channels = op.output.shape[-1] if op.output.shape else 1

    def emit(k: Emitter) -> None:
        compute, words = quantized(k)
        source = k.operands()[0]
        source = source.permuted(op.attrs["axes"]) if op.attrs.get("axes") else source
        spare = op.output.channel_pitch - channels
        elementwise(k, [source], view(k.output, op.output), compute, spare=spare, words=words if op.output.dtype != "int16" else None)

    return make_kernel(row, op, target, emit, tasks=tasks_of(op), arrays=constants_of(op))


def dequantized(k: Emitter) -> Compute:
    """What `qc.dequantize` makes of [stored number]."""
    zero, scale = k.i32(k.op.attrs["zero_point"] + offset_of(k.op.tensors[0].dtype)), k.f32(k.op.attrs["scale"])
    return lambda x, n: cast("float32", centered(x[0], zero, n), n) * splat(scale, n)


def dequantize(op: OpCall, target: Target, row: str) -> Kernel:
    """8 or 16 bits -> float32, transposed by `axes` when given."""

    def emit(k: Emitter) -> None:
        source = k.operands()[0]
        source = source.permuted(op.attrs["axes"]) if op.attrs.get("axes") else source
        elementwise(k, [source], view(k.output, op.output), dequantized(k))

    return make_kernel(row, op, target, emit, tasks=tasks_of(op), arrays=constants_of(op))


def _binary(op: OpCall, target: Target, row: str, product: bool) -> Kernel:
    a = op.attrs

    def emit(k: Emitter) -> None:
        left, right = (v.broadcast(op.output.shape) for v in k.operands())
        zeros = [a["a_zero_point"] + offset_of(left.dtype), a["b_zero_point"] + offset_of(right.dtype)]
        left_zero, right_zero = (k.i32(z) for z in zeros)
        scale = k.f32(a["multiplier"] if product else 2.0 ** -a["shift"])
        multipliers = [] if product else [a["a_multiplier"], a["b_multiplier"]]
        factors = [k.i32(m) for m in multipliers]
        most = [float(magnitude(canonical(v.dtype))) for v in (left, right)]
        sums = sum(m * abs(f) for m, f in zip(most, multipliers, strict=False))
        limit = math.prod(most) * a["multiplier"] if product else sums * 2.0 ** -a["shift"]
        end = Requantize.of(k, a, limit)
        # AVX2 widens bytes to int32 as it loads them. The zero points of a sum are one constant there; as the shares are below 2^31, no part of it overflows
        start = k.i32(-sum(z * m for z, m in zip(zeros, multipliers, strict=True))) if k.avx2 and not product else None

        def compute(x: list[Any], n: int) -> Any:
            if start is not None:
                p, q = (cast("int32", v, n) * splat(f, n) for v, f in zip(x, factors, strict=True))
                acc = p + q + splat(start, n)
            elif k.avx2:
                p, q = (cast("int32", v, n) - splat(z, n) for v, z in zip(x, (left_zero, right_zero), strict=True))
                acc = p * q
            else:
                p, q = centered(x[0], left_zero, n), centered(x[1], right_zero, n)
                acc = p * q if product else p * splat(factors[0], n) + q * splat(factors[1], n)
            return end(acc, splat(scale, n), n)

        elementwise(k, [left, right], view(k.output, op.output), compute)

    return make_kernel(row, op, target, emit, tasks=tasks_of(op), arrays=constants_of(op))


def add(op: OpCall, target: Target, row: str) -> Kernel:
    """`requantize((a - za) * A + (b - zb) * B, 2^-shift)` with numpy broadcasting; the sum fits int32 by the choice of A and B."""
    return _binary(op, target, row, product=False)


def mul(op: OpCall, target: Target, row: str) -> Kernel:
    """`requantize((a - za) * (b - zb), multiplier)` with numpy broadcasting."""
    return _binary(op, target, row, product=True)


def prelu(op: OpCall, target: Target, row: str) -> Kernel:
    """`requantize(x - zx, multiplier)` with the multiplier of the channel where the difference is negative."""
    a = op.attrs

    def emit(k: Emitter) -> None:
        x, negative = (v.broadcast(op.output.shape) for v in k.operands())
        zero, multiplier = k.i32(a["x_zero_point"] + offset_of(x.dtype)), k.f32(a["multiplier"])
        end = Requantize.of(k, a)

        def compute(v: list[Any], n: int) -> Any:
            acc = T.bind(centered(v[0], zero, n))
            return end(acc, by_sign(acc, splat(multiplier, n), v[1], n), n)

        elementwise(k, [x, negative], view(k.output, op.output), compute)

    return make_kernel(row, op, target, emit, tasks=tasks_of(op), arrays=constants_of(op))


def stored_entries(op: OpCall) -> np.ndarray:
    """The table of `qc.lut` as it lies in memory: indexed by, and holding, stored bytes (or 16 bits)."""
    x, table = op.operands
    assert isinstance(table, np.ndarray)
    stored = np.arange(256)
    indices = stored if str(x.dtype) == "uint8" else (stored.astype(np.uint8).view(np.int8).astype(np.int32) + 128)
    return (table.reshape(256).astype(np.int32)[indices] + offset_of(op.output.dtype)).astype(op.output.dtype)


def looked_up(k: Emitter) -> Compute:
    """What `qc.lut` makes of [stored byte], one at a time; its `stored_entries` are the last of the emitter's arrays."""
    entries = k.arrays[-1]
    return lambda x, n: entries[T.Cast("int32", x[0] if str(k.op.operands[0].dtype) == "uint8" else T.reinterpret("uint8", x[0]))]


def lut(op: OpCall, target: Target, row: str) -> Kernel:
    """`table[x + 128]`."""
    entries, constant = stored_entries(op), constants_of(replace(op, operands=op.operands[:1]))
    dtype = op.output.dtype
    vectorized = has_avx2(target) and entries.itemsize == 1  # tables of 16 bits, of a stream, are read one by one
    tables = [avx2.lookup_tables(entries)] if vectorized else []

    def emit(k: Emitter) -> None:
        entry = looked_up(replace(k, arrays=k.arrays[: len(constant) + 1]))

        def gather(v: View, index: Any, lanes: int, stride: int) -> Any:
            """Scalar loads, inserted into a vector (vpinsrb from memory): measured 1.4 times faster than byte stores on Zen 4."""
            if vectorized and lanes >= 16 and stride == 1:
                index = T.reinterpret(f"uint8x{lanes}", load(v.buffer, index, lanes))
                return T.reinterpret(f"{dtype}x{lanes}", avx2.lookup(k.arrays[-1], index, lanes))
            found = [entry([v.buffer[index + i * stride]], 1) for i in range(lanes)]
            return found[0] if lanes == 1 else T.Shuffle(found, list(range(lanes)))

        k.width = avx2.BYTES if vectorized else 16
        elementwise(k, [k.operands()[0]], view(k.output, op.output), entry if k.gpu else lambda x, n: x[0], fetch=gather)

    return make_kernel(row, op, target, emit, tasks=tasks_of(op, 20_000), arrays=[*constant, entries, *tables])


def rescaled(k: Emitter) -> Compute:
    """What `qc.requantize` makes of [stored number, multiplier]."""
    op, source = k.op, k.op.tensors[0].dtype
    largest = 2.0 * magnitude(canonical(source)) * np.abs(np.asarray(op.operands[1], np.float64)).max()
    zero, end = k.i32(op.attrs["x_zero_point"] + offset_of(source)), Requantize.of(k, op.attrs, float(largest))
    return lambda x, n: end(centered(x[0], zero, n), x[1], n)


def requantize(op: OpCall, target: Target, row: str) -> Kernel:
    """`requantize(x - zx, multiplier)`, the multiplier a constant, one or one per channel of the last axis."""

    def emit(k: Emitter) -> None:
        source, multiplier = (v.broadcast(op.output.shape) for v in k.operands())
        elementwise(k, [source, multiplier], view(k.output, op.output), rescaled(k))

    return make_kernel(row, op, target, emit, tasks=tasks_of(op), arrays=constants_of(op))


def interpolated(k: Emitter) -> Compute:
    """What `qc.lut16` makes of [stored number]; its table is the last of the emitter's arrays."""
    entries, end, scale = k.arrays[-1], Requantize.of(k, k.op.attrs, 2.0**15), k.f32(2.0 ** -k.op.attrs["shift"])
    bits, lanes = 17 - np.asarray(k.op.operands[1]).size.bit_length(), k.width // 4  # of W; int32 of a register
    paired = k.avx2 and bits < 15  # W is an int16

    def compute(x: list[Any], n: int) -> Any:
        place = T.bind(cast("int32", x[0], n) + splat(T.int32(1 << 15), n))
        index, part = T.bind(T.shift_right(place, splat(T.int32(bits), n))), T.bind(T.bitwise_and(place, splat(T.int32((1 << bits) - 1), n)))
        if paired and n % lanes == 0:
            shares = T.bind(splat(T.int32(1 << bits), n) + part * splat(T.int32(0xFFFF), n))  # W - f below, f above
            parts = [[shuffle([v], range(i, i + lanes)) for v in (index, shares)] for i in range(0, n, lanes)]
            sums = [avx2.multiply_pairs(avx2.adjacent(entries, i, lanes), T.reinterpret(f"int16x{2 * lanes}", s), lanes) for i, s in parts]
            return end(T.bind(sums[0] if n == lanes else shuffle(sums, range(n))), splat(scale, n), n)
        before, after = (cast("int32", entries[index + splat(T.int32(i), n)], n) for i in (0, 1))
        return end(before * (splat(T.int32(1 << bits), n) - part) + after * part, splat(scale, n), n)

    return compute


def lut16(op: OpCall, target: Target, row: str) -> Kernel:
    """`requantize(table[i] * (W - f) + table[i + 1] * f, 2^-shift)`, with i and f the quotient and the remainder of (x + 2^15) / W."""

    def emit(k: Emitter) -> None:
        compute = interpolated(k)
        k.width = min(k.width, 32)  # without AVX2 entries are loaded one by one
        elementwise(k, [k.operands()[0]], view(k.output, op.output), compute)

    return make_kernel(row, op, target, emit, tasks=tasks_of(op, 20_000), arrays=constants_of(op))


def _constant_second(op: OpCall) -> str | None:
    return None if isinstance(op.operands[1], np.ndarray) else "the second operand must be a constant."


portable("qc.quantize", quantize)
portable("qc.dequantize", dequantize, own_channels=True)
portable("qc.requantize", requantize, check=_constant_second)
portable("qc.add", add, own_channels=True)
portable("qc.mul", mul, own_channels=True)
portable("qc.prelu", prelu, own_channels=True)
portable("qc.lut", lut, own_channels=True)
portable("qc.lut16", lut16, check=_constant_second)
