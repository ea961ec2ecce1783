"""Exact streaming histograms: what calibration records of each value, in memory that does not grow with the data.

Bins lie on a power-of-two grid: bin i of exponent k holds the values in [i * 2^k, (i + 1) * 2^k). When values outgrow the table, the
width doubles and bins 2i and 2i + 1 merge into bin i. Since floor(floor(x / 2^k) / 2) = floor(x / 2^(k + 1)), merging loses nothing: the
table equals the one that counting all data at the final width would have made, whatever the order of the data.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from qcompiler.base.errors import TargetError
from qcompiler.base.targets import find_target

BINS = 4096  # 2048 to 4096 of them cover [min(low, 0), max(high, 0)]: at least 8 bins per step of an 8-bit quantization of the full range
_LANES = 16
_COPIES = 4  # interleaved tables, so that equal neighbours don't wait for each other's increment
_MIN_EXPONENT = -126  # 2^-k must be a finite float32


def grid_exponent(low: float, high: float) -> int:
    """The least k for which at most `BINS` bins of width 2^k cover [min(low, 0), max(high, 0)]. Monotone in the range."""
    low, high = min(low, 0.0), max(high, 0.0)
    exponent = max(_MIN_EXPONENT, math.frexp((high - low) / BINS)[1] - 2)
    while math.floor(math.ldexp(high, -exponent)) - math.floor(math.ldexp(low, -exponent)) >= BINS:
        exponent += 1
    return exponent


@dataclass(frozen=True)
class Counts:
    """Of one sample, on the grid of its own extremes; see `Histogram`."""

    exponent: int
    first: int
    counts: np.ndarray
    zeros: int


def counted(values: np.ndarray, low: float, high: float) -> Counts:
    """The counts of float32 values, all finite, with these extremes."""
    exponent = grid_exponent(low, high)
    first = math.floor(math.ldexp(min(low, 0.0), -exponent))
    return Counts(exponent, first, *count_bins(values, exponent, first))


@dataclass
class Histogram:
    """Counts of all float32 values seen, with their exact range.

    `counts[i]` (int64, `BINS` of them) is the number of values in [(first + i) * 2^exponent, (first + i + 1) * 2^exponent); `zeros` of
    them are exactly 0, which every quantization represents exactly. `low` and `high` are the least and greatest value; `mean_low` and
    `mean_high` are the means of the per-sample extremes over `samples` samples. `relative[i]` (float64) holds the counts without exact zeros,
    each sample's divided by its own sum of squares: an error summed with these weights counts relative to the sample it occurs in, so that a
    few samples with huge values don't outweigh all others. `powered` is the number of samples that took part: those with a value other than 0.
    All are 0 when empty.
    """

    exponent: int = _MIN_EXPONENT
    first: int = 0
    counts: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))
    zeros: int = 0
    low: float = 0.0
    high: float = 0.0
    mean_low: float = 0.0
    mean_high: float = 0.0
    samples: int = 0
    relative: np.ndarray = field(default_factory=lambda: np.zeros(BINS))
    powered: int = 0

    @property
    def digest(self) -> str:
        """SHA-256 (hexadecimal) of all that it holds."""
        numbers = {k: v for k, v in vars(self).items() if not isinstance(v, np.ndarray)}
        return hashlib.sha256(b"".join([repr(numbers).encode(), self.counts.tobytes(), self.relative.tobytes()])).hexdigest()

    @property
    def width(self) -> float:
        """Width of one bin, in units of the value."""
        return math.ldexp(1.0, self.exponent)

    @property
    def total(self) -> int:
        """Number of values counted."""
        return int(self.counts.sum())

    @property
    def edges(self) -> np.ndarray:
        """Bin edges, float64[bins + 1]."""
        return np.ldexp(np.arange(self.first, self.first + len(self.counts) + 1, dtype=np.float64), self.exponent)

    @property
    def nonzero(self) -> np.ndarray:
        """The counts without exact zeros, float64[bins]."""
        counts = self.counts.astype(np.float64)
        if self.zeros:
            counts[-self.first] -= self.zeros
        return counts

    def coarser(self, exponent: int, first: int) -> Histogram:
        """The same data on a grid that is as coarse or coarser and covers all values; exact."""
        if (exponent, first) == (self.exponent, self.first):
            return self
        used = np.flatnonzero(self.counts)
        to = ((used + self.first) >> min(exponent - self.exponent, 62)) - first
        counts, relative = (np.bincount(to, a[used], BINS).astype(a.dtype) for a in (self.counts, self.relative))  # integers where nothing is used
        return replace(self, exponent=exponent, first=first, counts=counts, relative=relative)

    def add(self, values: np.ndarray, low: float, high: float, power: float) -> None:
        """Count one sample's `values` (float32, any shape, all finite), whose extremes are `low` and `high` and whose sum of squares is `power`."""
        self.take(counted(values, low, high), low, high, power)

    def take(self, counts: Counts, low: float, high: float, power: float) -> None:
        """`add` of what was counted already. Counts on a finer grid are exact on this one, and so it makes no difference which grid they were made on."""
        if self.samples:
            self.low, self.high = min(self.low, low), max(self.high, high)
        else:
            self.low, self.high = low, high
        exponent = max(self.exponent, grid_exponent(self.low, self.high))
        first = math.floor(math.ldexp(min(self.low, 0.0), -exponent))
        before = self.coarser(exponent, first)
        self.exponent, self.first, self.counts, self.relative = exponent, first, before.counts.copy(), before.relative.copy()
        add_counts(counts, self, power)
        self.powered += power > 0
        self.zeros += counts.zeros
        self.samples += 1
        self.mean_low += (low - self.mean_low) / self.samples
        self.mean_high += (high - self.mean_high) / self.samples

    def merged(self, other: Histogram) -> Histogram:
        """The histogram of both data sets as one (operands of a concat, say). Mean extremes are those of the wider operand on each side."""
        if not (self.samples and other.samples):
            return self if self.samples else other
        low, high = min(self.low, other.low), max(self.high, other.high)
        exponent = max(self.exponent, other.exponent, grid_exponent(low, high))
        first = math.floor(math.ldexp(min(low, 0.0), -exponent))
        a, b = self.coarser(exponent, first), other.coarser(exponent, first)
        return Histogram(
            exponent,
            first,
            a.counts + b.counts,
            a.zeros + b.zeros,
            low,
            high,
            min(a.mean_low, b.mean_low),
            max(a.mean_high, b.mean_high),
            max(a.samples, b.samples),
            a.relative + b.relative,
            a.powered + b.powered,
        )


def add_counts_reference(new: Counts, to: Histogram, power: float) -> tuple[np.ndarray, np.ndarray]:
    """What `add_counts` makes of counts and relative, in numpy."""
    used = np.flatnonzero(new.counts)
    at = ((used + new.first) >> min(to.exponent - new.exponent, 62)) - to.first
    counts = np.bincount(at, new.counts[used], BINS).astype(np.int64)
    nonzero = counts.astype(np.float64)
    if new.zeros:
        nonzero[-to.first] -= new.zeros
    return to.counts + counts, to.relative + nonzero / power if power > 0 else to.relative


def add_counts(new: Counts, to: Histogram, power: float) -> None:
    """Add the counts of one sample, whose sum of squares is `power`, to those of a histogram whose grid is as coarse or coarser, and covers them."""
    moved, shift = np.zeros(BINS, np.int64), min(to.exponent - new.exponent, 62)
    add = _kernels()[2]
    add(*map(_pointer, (new.counts, moved, to.counts, to.relative)), new.first, shift, to.first, new.zeros, power)


def count_bins_reference(values: np.ndarray, exponent: int, first: int) -> tuple[np.ndarray, int]:
    """What `count_bins` computes, in numpy."""
    index = np.floor(np.ldexp(values.reshape(-1), -exponent)).astype(np.int64) - first
    return np.bincount(index, minlength=BINS), int(np.count_nonzero(values == 0))


def count_bins(values: np.ndarray, exponent: int, first: int) -> tuple[np.ndarray, int]:
    """(counts int64[BINS], number of exact zeros) of finite float32 `values` on the grid; every value must lie on it."""
    values = np.ascontiguousarray(values, np.float32)
    counts = np.zeros((_COPIES, BINS), np.int32)
    zeros = np.zeros(_LANES, np.int32)
    count = _kernels()[0]
    count(_pointer(values), values.size, math.ldexp(1.0, -exponent), first, _pointer(counts), _pointer(zeros))
    return counts.sum(axis=0, dtype=np.int64), int(zeros.sum())


def channel_statistics(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(sums float64[C], sums of squares float64[C], low float32[C], high float32[C]) over all axes but the last of a non-empty float32 array.

    A sum is NaN or infinite exactly when the channel holds a NaN or an infinity: finite float32 values can't overflow a float64 sum.
    """
    values = np.ascontiguousarray(values, np.float32)
    channels = values.shape[-1] if values.ndim else 1
    sums, squares = np.zeros(channels), np.zeros(channels)
    low, high = np.full(channels, np.inf, np.float32), np.full(channels, -np.inf, np.float32)
    reduce = _kernels()[1]
    reduce(_pointer(values), values.size // channels, channels, *map(_pointer, (sums, squares, low, high)))
    return sums, squares, low, high


def _pointer(array: Any) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


@functools.cache
def _kernels() -> tuple[Any, Any, Any]:
    """The compiled kernels "count", "channels" and "add", for the CPU this process runs on."""
    try:
        target: Any = find_target("native").tvm
    except TargetError:
        target = {"kind": "llvm"}
    module = tvm.IRModule({"count": _count_kernel(), "channels": _channel_kernel(), "add": _add_kernel()})
    library = tvm.tirx.build(module, target=tvm.target.Target(target))
    return library["count"], library["channels"], library["add"]


def _count_kernel() -> Any:
    """count(x, n, inverse width, first, counts int32[copies, BINS], zeros int32[lanes]).

    Indices are exact: a multiplication by a power of two does not round, and neither does floor.
    """
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_attr({"global_symbol": "count"})
            x_pointer, n, inverse = T.arg("x", T.handle()), T.arg("n", T.int32()), T.arg("inverse", T.float32())
            first, counts_pointer, zeros_pointer = T.arg("first", T.int32()), T.arg("counts", T.handle()), T.arg("zeros", T.handle())
            x = T.decl_buffer((n,), "float32", data=x_pointer)
            counts = T.decl_buffer((_COPIES * BINS,), "int32", data=counts_pointer)
            zeros = T.decl_buffer((_LANES,), "int32", data=zeros_pointer)
            index = T.alloc_buffer((_LANES,), "int32")
            nulls = T.alloc_buffer((_LANES,), "int32")
            lanes = T.ramp(0, 1, _LANES)
            ones, naught = T.broadcast(T.int32(1), _LANES), T.broadcast(T.int32(0), _LANES)
            T.buffer_store(nulls, naught, [lanes])
            with T.serial(0, n // _LANES) as block:
                v = T.bind(x[T.ramp(block * _LANES, 1, _LANES)])
                floor = tirx.floor(v * T.broadcast(inverse, _LANES))
                T.buffer_store(index, floor.astype(f"int32x{_LANES}") - T.broadcast(first, _LANES), [lanes])
                T.buffer_store(nulls, nulls[lanes] + tirx.Select(tirx.EQ(v, T.broadcast(T.float32(0), _LANES)), ones, naught), [lanes])
                for lane in range(_LANES):
                    at = T.bind(index[lane] + (lane % _COPIES) * BINS)
                    T.buffer_store(counts, counts[at] + 1, [at])
            T.buffer_store(zeros, nulls[lanes], [lanes])
            with T.serial(0, n % _LANES) as rest:
                v = T.bind(x[n - n % _LANES + rest])
                at = T.bind(tirx.floor(v * inverse).astype("int32") - first)
                T.buffer_store(counts, counts[at] + 1, [at])
                T.buffer_store(zeros, zeros[0] + tirx.Select(tirx.EQ(v, T.float32(0)), T.int32(1), T.int32(0)), [0])
    return builder.get()


def _channel_kernel() -> Any:
    """channels(x, rows, channels, sums, squares, low, high): adds to and updates the last four, 16 channels at a time, then one at a time."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_attr({"global_symbol": "channels"})
            x_pointer, rows, channels = T.arg("x", T.handle()), T.arg("rows", T.int32()), T.arg("channels", T.int32())
            pointers = [T.arg(name, T.handle()) for name in ("sums", "squares", "low", "high")]
            x = T.decl_buffer((rows * channels,), "float32", data=x_pointer)
            results = [T.decl_buffer((channels,), dtype, data=p) for p, dtype in zip(pointers, ("float64", "float64", "float32", "float32"), strict=True)]

            def column(at: Any, width: int) -> None:
                """Reduce the `width` channels that start at `at`."""
                lanes, here = (T.ramp(0, 1, width), T.ramp(at, 1, width)) if width > 1 else (0, at)
                wide = f"float64x{width}" if width > 1 else "float64"
                held = [T.alloc_buffer((width,), r.dtype) for r in results]
                for mine, result in zip(held, results, strict=True):
                    T.buffer_store(mine, result[here], [lanes])
                with T.serial(0, rows) as row:
                    start = row * channels + at
                    v = T.bind(x[T.ramp(start, 1, width) if width > 1 else start])
                    precise = T.bind(v.astype(wide))
                    T.buffer_store(held[0], held[0][lanes] + precise, [lanes])
                    T.buffer_store(held[1], held[1][lanes] + precise * precise, [lanes])
                    T.buffer_store(held[2], tirx.min(held[2][lanes], v), [lanes])
                    T.buffer_store(held[3], tirx.max(held[3][lanes], v), [lanes])
                for mine, result in zip(held, results, strict=True):
                    T.buffer_store(result, mine[lanes], [here])

            with T.serial(0, channels // _LANES) as block:
                column(block * _LANES, _LANES)
            with T.serial(0, channels % _LANES) as rest:
                column(channels - channels % _LANES + rest, 1)
    return builder.get()


def _add_kernel() -> Any:
    """add(new int64[BINS], moved int64[BINS] of zeros, counts int64[BINS], relative float64[BINS], first of `new`, shift, first, zeros, power)."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_attr({"global_symbol": "add"})
            pointers = [T.arg(name, T.handle()) for name in ("new", "moved", "counts", "relative")]
            source, shift, first = (T.arg(name, T.int64()) for name in ("source", "shift", "first"))
            zeros, power = T.arg("zeros", T.int64()), T.arg("power", T.float64())
            new, moved, counts, relative = (
                T.decl_buffer((BINS,), dtype, data=p) for p, dtype in zip(pointers, ("int64", "int64", "int64", "float64"), strict=True)
            )
            with T.serial(0, BINS) as i:
                with T.If(new[i] != 0):
                    with T.Then():
                        at = T.bind(((i.astype("int64") + source) >> shift) - first)
                        T.buffer_store(moved, moved[at] + new[i], [at])
            with T.serial(0, BINS) as i:
                T.buffer_store(counts, counts[i] + moved[i], [i])
            with T.If(power > T.float64(0)):
                with T.Then():
                    with T.serial(0, BINS) as i:
                        exact = T.bind(tirx.Select(tirx.EQ(i.astype("int64"), -first), zeros, T.int64(0)))
                        T.buffer_store(relative, relative[i] + (moved[i] - exact).astype("float64") / power, [i])
    return builder.get()
