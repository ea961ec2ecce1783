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
from qcompiler.schedules.conv_epilogue import by_sign
from qcompiler.schedules.cuda.tail import Tail, tail_arrays
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
    """Constants of an `Epilogue`, for accumulator i of output channel channels[i] (negative: none): bias, for integers multipliers, those of
    negative numbers by themselves, and those of a tail."""
    known = channels >= 0
    arrays = [bias] if op.name.startswith("qc.f32.") else [bias, *np.asarray(op.operands[3], np.float32).reshape(-1, bias.size)]
    return [np.where(known, a.reshape(-1)[np.maximum(channels, 0)], 0).astype(a.dtype) for a in arrays] + tail_arrays(op, channels)


@dataclass
class Sink:
    """Where a tensor's pixels go (or a residual's come from). step: bytes by which every run of channels is aligned; below 4, elements move one by one."""

    layout: Layout
    buffer: Any
    step: int

    def __post_init__(self) -> None:
        self.size, self.memory = np.dtype(self.layout.dtype).itemsize, words(self.buffer) if self.step >= 4 else None

    def place(self, pixel: Any) -> Any:
        """The element of a pixel's first channel."""
        if not any(self.layout.halo):
            return pixel * self.layout.channel_pitch
        _, h, w, _ = self.layout.shape
        row = T.bind(tirx.truncdiv(pixel, w))
        return self.layout.index(tirx.truncdiv(row, h), tirx.truncmod(row, h), tirx.truncmod(pixel, w), 0)

    def read(self, at: Any, count: int) -> list[Any]:
        """So many adjacent elements, from a run's first one on; one: any element."""
        if self.memory is None or count == 1:
            return [self.buffer[at + i] for i in range(count)]
        loaded = load_words(self.memory, T.bind(at * self.size), count * self.size // 4, self.step)
        return [element_of(loaded[i * self.size // 4], i % (4 // self.size), self.layout.dtype) for i in range(count)]

    def write(self, values: Sequence[Any], at: Any) -> None:
        """A run: int32 with what is to be stored at the bottom, or float32."""
        if self.memory is None:
            for i, value in enumerate(values):
                self.store(at + i, value)
            return
        packed = [T.bind(word_of(values[i : i + 4 // self.size])) for i in range(0, len(values), 4 // self.size)]
        store_words(self.memory, T.bind(at * self.size), packed, self.step)

    def store(self, index: Any, value: Any) -> None:
        T.buffer_store(self.buffer, value if self.layout.dtype == "float32" else T.Cast(self.layout.dtype, value), [index])


@dataclass
class Epilogue:
    """Writes `run` adjacent output channels of a pixel at a time. `constants`: buffers of `finish_arrays`, padded to whole runs; `outputs`: channels of one
    group."""

    k: Emitter
    constants: Sequence[Any]
    run: int
    outputs: int
    groups: int = 1

    def __post_init__(self) -> None:
        k, a = self.k, self.k.op.attrs
        tensors, dtype = k.op.tensors, k.op.output.dtype
        self.integer = not k.op.name.startswith("qc.f32.")
        self.bias, *rest = self.constants
        rows, self.bends_sum = (len(k.op.operands[3].shape) if self.integer else 0), bool(a.get("bends_sum"))
        self.multipliers, self.tail = rest[:rows], Tail(k, rest[rows:])  # a second one for negative numbers
        self.rounded = dtype != "float32"
        if self.rounded:
            zero, (low, high) = int(a.get("zero_point", 0)), limits(dtype, a.get("low"), a.get("high"))
            self.zero, self.low, self.high = k.i32(zero), k.f32(low - zero), k.f32(high - zero)
            if len(tensors) > 1:
                self.residual_zero, self.factor = k.i32(a["residual_zero_point"]), k.i32(a["residual_multiplier"])
                self.scale = k.f32(2.0 ** -a["residual_shift"])
        else:
            names = ("float_low", "float_high") if self.integer else ("low", "high")
            self.low, self.high = (k.f32_or_none(a.get(n)) for n in names)
        # Elements behind the last channel may be read and written where the pixels have room for them.
        room = min(v.channel_pitch for v in (*k.op.written, *tensors[1:2]))
        self.whole = self.outputs % self.run == 0 or (self.groups == 1 and room >= -(-self.outputs // self.run) * self.run)
        self.residual = Sink(tensors[1], k.inputs[1], self._step(tensors[1])) if len(tensors) > 1 else None
        self.sinks = [Sink(layout, buffer, self._step(layout)) for layout, buffer in zip(k.op.written, k.outputs, strict=True)]

    def _step(self, layout: Layout) -> int:
        """The alignment of every run, at most 16 bytes."""
        parts = [self.run, layout.channel_pitch] + ([self.outputs] if self.groups > 1 else [])
        return math.gcd(16, math.gcd(*parts) * np.dtype(layout.dtype).itemsize)

    def __call__(self, accs: Sequence[Any], table: Any, pixel: Any, group: Any, channel: Any) -> None:
        """`table`: index of the first accumulator in the constants, a multiple of `run`. `pixel`: flat output pixel; `channel`: the first
        one within `group`."""
        first = T.bind(group * self.outputs + channel)
        outs = [T.bind(sink.place(pixel) + first) for sink in self.sinks]
        source = T.bind(self.residual.place(pixel) + first) if self.residual else None

        def write(only: int | None) -> None:
            for sink, out, values in zip(self.sinks, outs, self._results(accs, table, source, only), strict=True):
                if only is None:
                    sink.write(values, out)
                else:
                    sink.store(out + only, values[0])

        if self.whole:
            write(None)
            return
        with T.If(channel + self.run <= self.outputs):
            with T.Then():
                write(None)
            with T.Else():
                for i in range(self.run):
                    with T.If(channel + i < self.outputs), T.Then():
                        write(i)

    def _constant(self, buffer: Any, table: Any, wanted: Sequence[int]) -> list[Any]:
        if self.run % 4 or len(wanted) == 1:
            return [buffer[table + i] for i in wanted]
        quads = [quad(buffer, quarter(table) + i) for i in range(self.run // 4)]
        return [element(quads[i // 4], i % 4) for i in wanted]

    def _results(self, accs: Sequence[Any], table: Any, source: Any, only: int | None) -> list[list[Any]]:
        """What each sink gets, of all accumulators or of one: int32 with what is to be stored at the bottom, or float32."""
        wanted, op = list(range(self.run)) if only is None else [only], self.k.op
        values = self._values(accs, table, source, wanted)
        ended = [self.tail(values, lambda buffer: self._constant(buffer, table, wanted))] if op.tail else []
        return ([] if op.inner else [values]) + ended

    def _values(self, accs: Sequence[Any], table: Any, source: Any, wanted: list[int]) -> list[Any]:
        bias = self._constant(self.bias, table, wanted)
        values = [accs[i] + b for i, b in zip(wanted, bias, strict=True)]
        scales, *negative = (self._constant(m, table, wanted) for m in self.multipliers) if self.integer else (None,)
        if scales is not None:
            if negative and not self.bends_sum:
                values = [T.bind(v) for v in values]
                scales = [by_sign(v, s, n, 1) for v, s, n in zip(values, scales, *negative, strict=True)]
            values = [T.Cast("float32", v) * s for v, s in zip(values, scales, strict=True)]
        behind = negative[0] if self.bends_sum else [None] * len(wanted)
        extra: list[Any] = [None] * len(wanted)
        if self.residual:
            extra = self.residual.read(source if len(wanted) > 1 else source + wanted[0], len(wanted))
        return [T.bind(self._finish(v, r, n)) for v, r, n in zip(values, extra, behind, strict=True)]

    def _finish(self, value: Any, extra: Any, negative: Any) -> Any:
        """negative: the multiplier of a negative sum with the residual `extra`, where it has one of its own."""
        if not self.rounded:
            return clamp(value if extra is None else value + extra, self.low, self.high, 1)
        if extra is not None:
            limit = tirx.const(LIMIT, "float32")
            share = T.call_pure_extern("int32", "__float2int_rn", clamp(value, -limit, limit, 1))
            total = T.bind(share + (T.Cast("int32", extra) - self.residual_zero) * self.factor)
            value = T.Cast("float32", total) * (self.scale if negative is None else by_sign(total, self.scale, negative, 1))
        return round_word(clamp(value, self.low, self.high, 1), 1) + self.zero
