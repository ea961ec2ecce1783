"""The end of a convolution on a GPU: from int32 (or float32) accumulators of adjacent channels, in registers, to the stored result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.numerics.arithmetic import limits
from qcompiler.schedules.builder import Emitter, clamp, round_word
from qcompiler.schedules.portable.threads import load_words, pack, quarter, store_words, words
from qcompiler.schedules.table import Layout, OpCall

LIMIT = 2.0**30  # of a convolution's share in a sum with a residual: numerics.md (10)


def quad(buffer: Any, index: Any) -> Any:
    """Elements 4 * index .. 4 * index + 3 of an aligned 4-byte buffer, loaded at once: the code generator sees that 4 divides the place."""
    return T.bind(buffer[T.ramp(T.bind(index) * 4, 1, 4)])


def element(vector: Any, i: int) -> Any:
    return T.Shuffle([vector], [i])


def element_of(word: Any, i: int, dtype: str) -> Any:
    """Element i of an int32 word that holds int8, int16 or 32-bit ones."""
    bits = 8 * np.dtype(dtype).itemsize
    if bits == 32:
        return T.reinterpret(dtype, word)
    return T.Cast(dtype, T.shift_right(word, T.int32(bits * i)) if i else word)


def word_of(values: Sequence[Any]) -> Any:
    """The int32 word of 4 int8 elements or 2 int16 ones, each at the bottom of an int32, or of one 32-bit element."""
    if len(values) == 4:
        return pack(values)
    if len(values) == 2:
        return T.call_pure_extern("int32", "__byte_perm", *values, T.int32(0x5410))
    return T.reinterpret("int32", values[0])


def finish_arrays(op: OpCall, bias: np.ndarray, channels: np.ndarray) -> list[np.ndarray]:
    """Constants of an `Epilogue`, for accumulator i of output channel channels[i] (negative: none): bias, and for integers multipliers."""
    known = channels >= 0
    arrays = [bias] if op.name.startswith("qc.f32.") else [bias, np.asarray(op.operands[3], np.float32)]
    return [np.where(known, a.reshape(-1)[np.maximum(channels, 0)], 0).astype(a.dtype) for a in arrays]


@dataclass
class Epilogue:
    """Writes `run` adjacent output channels of a pixel at a time. Constants are padded to whole runs; `outputs`: channels of one group."""

    k: Emitter
    bias: Any
    multipliers: Any  # None for float operators
    run: int
    outputs: int
    groups: int = 1

    def __post_init__(self) -> None:
        k, a = self.k, self.k.op.attrs
        self.layout = k.op.output
        tensors = k.op.tensors
        self.residual: Layout | None = tensors[1] if len(tensors) > 1 else None
        self.integer = self.multipliers is not None
        self.rounded = self.layout.dtype != "float32"
        if self.rounded:
            zero, (low, high) = int(a.get("zero_point", 0)), limits(self.layout.dtype, a.get("low"), a.get("high"))
            self.zero, self.low, self.high = k.i32(zero), k.f32(low - zero), k.f32(high - zero)
            if self.residual:
                self.residual_zero, self.factor = k.i32(a["residual_zero_point"]), k.i32(a["residual_multiplier"])
                self.scale = k.f32(2.0 ** -a["residual_shift"])
        else:
            names = ("float_low", "float_high") if self.integer else ("low", "high")
            self.low, self.high = (k.f32_or_none(a.get(n)) for n in names)
        # Elements behind the last channel may be read and written where the pixels have room for them.
        room = min(v.channel_pitch for v in (self.layout, self.residual) if v)
        self.whole = self.outputs % self.run == 0 or (self.groups == 1 and room >= -(-self.outputs // self.run) * self.run)
        self.out_step = self._step(self.layout)
        self.residual_step = self._step(self.residual) if self.residual else 1
        self.out_words = words(k.output) if self.out_step >= 4 else None
        self.residual_words = words(k.inputs[1]) if self.residual_step >= 4 else None

    def _step(self, layout: Layout) -> int:
        """Bytes that can be read or written at once: the alignment of every run. Below 4: elements are, one by one."""
        parts = [self.run, layout.channel_pitch] + ([self.outputs] if self.groups > 1 else [])
        return math.gcd(16, math.gcd(*parts) * np.dtype(layout.dtype).itemsize)

    def __call__(self, accs: Sequence[Any], table: Any, pixel: Any, group: Any, channel: Any) -> None:
        """`table`: index of the first accumulator in the constants, a multiple of `run`. `pixel`: flat output pixel; `channel`: the first
        one within `group`."""
        first = T.bind(group * self.outputs + channel)
        out = T.bind(self._place(self.layout, pixel) + first)
        source = T.bind(self._place(self.residual, pixel) + first) if self.residual else None
        if self.whole:
            self._write(self._values(accs, table, source, None), out)
            return
        with T.If(channel + self.run <= self.outputs):
            with T.Then():
                self._write(self._values(accs, table, source, None), out)
            with T.Else():
                for i in range(self.run):
                    with T.If(channel + i < self.outputs), T.Then():
                        self._store(out + i, self._values(accs, table, source, i)[0])

    def _place(self, layout: Layout, pixel: Any) -> Any:
        if not any(layout.halo):
            return pixel * layout.channel_pitch
        _, h, w, _ = layout.shape
        row = T.bind(tirx.truncdiv(pixel, w))
        return layout.index(tirx.truncdiv(row, h), tirx.truncmod(row, h), tirx.truncmod(pixel, w), 0)

    def _constant(self, buffer: Any, table: Any, wanted: Sequence[int]) -> list[Any]:
        if self.run % 4 or len(wanted) == 1:
            return [buffer[table + i] for i in wanted]
        quads = [quad(buffer, quarter(table) + i) for i in range(self.run // 4)]
        return [element(quads[i // 4], i % 4) for i in wanted]

    def _values(self, accs: Sequence[Any], table: Any, source: Any, only: int | None) -> list[Any]:
        """Results of all accumulators, or of one: int32 with what is to be stored at the bottom, or float32."""
        wanted = list(range(self.run)) if only is None else [only]
        bias = self._constant(self.bias, table, wanted)
        values = [accs[i] + b for i, b in zip(wanted, bias, strict=True)]
        if self.integer:
            scales = self._constant(self.multipliers, table, wanted)
            values = [T.Cast("float32", v) * s for v, s in zip(values, scales, strict=True)]
        extra = self._residual(source, wanted) if self.residual else [None] * len(wanted)
        return [T.bind(self._finish(v, r)) for v, r in zip(values, extra, strict=True)]

    def _residual(self, source: Any, wanted: Sequence[int]) -> list[Any]:
        assert self.residual
        if self.residual_words is None or len(wanted) == 1:
            return [self.k.inputs[1][source + i] for i in wanted]
        size = np.dtype(self.residual.dtype).itemsize
        loaded = load_words(self.residual_words, T.bind(source * size), self.run * size // 4, self.residual_step)
        return [element_of(loaded[i * size // 4], i % (4 // size), self.residual.dtype) for i in wanted]

    def _finish(self, value: Any, extra: Any) -> Any:
        if not self.rounded:
            return clamp(value if extra is None else value + extra, self.low, self.high, 1)
        if extra is not None:
            limit = tirx.const(LIMIT, "float32")
            share = T.call_pure_extern("int32", "__float2int_rn", clamp(value, -limit, limit, 1))
            value = T.Cast("float32", share + (T.Cast("int32", extra) - self.residual_zero) * self.factor) * self.scale
        return round_word(clamp(value, self.low, self.high, 1), 1) + self.zero

    def _write(self, values: Sequence[Any], out: Any) -> None:
        if self.out_words is None:
            for i, value in enumerate(values):
                self._store(out + i, value)
            return
        size = np.dtype(self.layout.dtype).itemsize
        packed = [T.bind(word_of(values[i : i + 4 // size])) for i in range(0, self.run, 4 // size)]
        store_words(self.out_words, T.bind(out * size), packed, self.out_step)

    def _store(self, index: Any, value: Any) -> None:
        T.buffer_store(self.k.output, T.Cast(self.layout.dtype, value) if self.rounded else value, [index])
