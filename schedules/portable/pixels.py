"""Pixels: uint8 images become what the network reads, by a table per channel.

Where the tables are those of straight lines, as scale, mean and std make them, `clip((pixel * M + B) >> 20)` yields every one of their 256 entries: that is
tried out when the kernel is made, and needs no table. Else each entry is loaded.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.schedules import avx2
from qcompiler.schedules.builder import Emitter, View, cast, clamp, load, loops, make_kernel, offset_of, splat, store, tiles, view
from qcompiler.schedules.isa import shuffle
from qcompiler.schedules.portable.base import portable
from qcompiler.schedules.portable.elementwise import tasks_of
from qcompiler.schedules.portable.nest import elementwise, merged, shared
from qcompiler.schedules.table import Kernel, OpCall

BITS = 20
GROUP = 16  # bytes that are loaded at a time, and as many that are made of them


def lines(table: np.ndarray) -> np.ndarray | None:
    """int32 [2, C], M and B of each channel of an int8 table [C, 256]; None where a channel has none."""
    found = [_line(channel.astype(np.float64)) for channel in table] if table.dtype == np.int8 else [None]
    return None if any(f is None for f in found) else np.array(found, np.int32).T


def _line(entries: np.ndarray) -> tuple[int, int] | None:
    """A line a * p + b lies in [entry, entry + 1) for each pixel value p, saturated entries open to one side: each pair of them bounds a."""
    p = np.arange(256.0)
    low, high = np.where(entries == -128, -np.inf, entries), np.where(entries == 127, np.inf, entries + 1)
    first, second = np.triu_indices(256, 1)
    run = p[second] - p[first]
    a = _between(((low[second] - high[first]) / run).max(), ((high[second] - low[first]) / run).min())
    b = _between((low - a * p).max(), (high - a * p).min())
    if abs(a) * 255 + abs(b) + 128 >= 2.0 ** (31 - BITS):
        return None
    m, c = round(a * 2**BITS), round(b * 2**BITS)
    exact = np.clip((np.arange(256) * m + c) >> BITS, -128, 127) == entries
    return (m, c) if exact.all() else None


def _between(low: float, high: float) -> float:
    ends = [e for e in (low, high) if np.isfinite(e)]
    return float(sum(ends) / len(ends)) if ends else 0.0


def pixels(op: OpCall, target: Target, row: str) -> Kernel:
    """The image is read as it lies; padded borders and pitches of the output are left alone, but for the channels behind a pixel's own."""
    x, table = op.operands
    assert isinstance(table, np.ndarray) and not isinstance(x, np.ndarray)
    channels, dtype = op.attrs["channels"], op.output.dtype
    entries = table if table.dtype != np.int8 else (table.astype(np.int32) + offset_of(dtype)).astype(dtype)
    line = None if target.gpu or op.attrs.get("axes") else lines(table)
    vectors = _Vectors.of(op, target) if line is not None else None
    if vectors is not None and line is not None:
        padded = np.zeros((2, vectors.pitch), np.int32)
        padded[:, : len(channels)] = line
        padded[1] += offset_of(dtype) << BITS
        arrays = [np.tile(row_, GROUP // vectors.pitch) for row_ in padded]
        return make_kernel(row, op, target, lambda k: _straight(k, vectors, channels), tasks=tasks_of(op), arrays=arrays)

    def emit(k: Emitter) -> None:
        source, out = k.operands()[0], view(k.output, op.output)
        if axes := op.attrs.get("axes"):
            out = out.permuted([axes.index(i) for i in range(len(axes))])
        lookup, rest = k.arrays[0], source.shape[:-1]
        for channel, chosen in enumerate(channels):
            begin = [0] * len(rest)
            one = source.window([*begin, chosen], [*rest, 1])
            elementwise(k, [one], out.window([*begin, channel], [*rest, 1]), _entry(lookup, 256 * channel), fetch=None)

    return make_kernel(row, op, target, emit, tasks=tasks_of(op, 20_000), arrays=[entries.reshape(-1)])


def _entry(lookup: Any, start: int) -> Any:
    return lambda x, n: lookup[cast("int32", x[0], n) + splat(T.int32(start), n)]


class _Vectors:
    """How a row of pixels is cut: groups of `pixels` pixels fill GROUP bytes of the output, at `pitch` bytes a pixel; `groups` of them are a tile."""

    def __init__(self, source: View, out: View, groups: int) -> None:
        self.pitch, self.step, self.groups = out.strides[-2], source.strides[-2], groups
        self.pixels = GROUP // self.pitch
        rows = [replace(v, shape=v.shape[:-1], strides=v.strides[:-1]) for v in (source, out)]
        self.source, self.out = merged(rows)

    @staticmethod
    def of(op: OpCall, target: Target) -> _Vectors | None:
        """None where a pixel of the output fills no power of two of bytes, or a row is too short."""
        source, out = view(None, op.tensors[0]), view(None, op.output)
        pitch, step = out.strides[-2], source.strides[-2]
        if pitch not in (1, 2, 4, 8, 16) or step > pitch:
            return None
        least = -(-GROUP // (GROUP // pitch * step))  # a tile has 16 bytes to load
        groups = max(4 if avx2_width(target) == avx2.WIDE else 2, 1 << (least - 1).bit_length())
        made = _Vectors(source, out, groups)
        return made if made.source.shape[-1] >= made.pixels * groups else None


def avx2_width(target: Target) -> int:
    """Bytes of a register where there is AVX512 or AVX2, else 0."""
    return avx2.WIDE if "avx512bw" in target.features else avx2.BYTES if "avx2" in target.features else 0


def _straight(k: Emitter, v: _Vectors, channels: list[int]) -> None:
    source, out = replace(v.source, buffer=k.inputs[0]), replace(v.out, buffer=k.output)
    factor, start = (T.bind(load(a, T.int32(0), GROUP)) for a in k.arrays)
    extents, tile = source.shape, v.pixels * v.groups
    low, high = (T.int32(b + offset_of(out.dtype)) for b in (-128, 127))
    per = max(1, (k.width if k.avx2 else GROUP) // GROUP)  # groups that are stored together
    along = tiles(k, extents[0], tile) if len(extents) == 1 else -(-extents[-1] // tile)
    outer = shared(k, extents[:-1]) if len(extents) > 1 else []
    with loops(*outer, along) as (*index, number):
        pixel = T.bind(T.min(number * tile, extents[-1] - tile))
        read, written = (T.bind(T.int32(0) + view_.at([*index, pixel])) for view_ in (source, out))
        for first in range(0, v.groups, per):
            words = [T.bind(_words(k.inputs[0], read, group, v, channels, factor, start)) for group in range(first, first + per)]
            if not k.avx2:
                value = cast(out.dtype, clamp(words[0], low, high, GROUP), GROUP)
            else:
                parts = words if per == 4 else [shuffle([w], range(i, i + avx2.WORDS)) for w in words for i in (0, avx2.WORDS)]
                value = avx2.packed(parts, None, out.dtype, per * GROUP)
            store(k.output, written + first * GROUP, value, per * GROUP)


def _words(buffer: Any, read: Any, group: int, v: _Vectors, channels: list[int], factor: Any, start: Any) -> Any:
    """(pixel * M + B) >> BITS of one group, int32, B with the offset of the storage. The load ends with the tile: it begins earlier where a group has fewer
    bytes than it takes."""
    begin = group * v.pixels * v.step
    back = min(GROUP - v.pixels * v.step, begin)
    loaded = load(buffer, read + (begin - back), GROUP)
    order = [back + p * v.step + (channels[c] if c < len(channels) else 0) for p in range(v.pixels) for c in range(v.pitch)]
    chosen = loaded if order == list(range(GROUP)) else shuffle([loaded], order)
    return T.shift_right(cast("int32", chosen, GROUP) * factor + start, splat(T.int32(BITS), GROUP))


portable("qc.pixels", pixels)
