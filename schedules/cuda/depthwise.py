"""Depthwise convolution on a GPU with dp4a: a thread computes 4 channels of a few neighbouring pixels.

A word holds 4 channels of a pixel; dp4a wants 4 pixels of a channel. So 4 words along an image row are transposed, by 8 byte permutations, once for all
the outputs that read them; every output multiplies them with weights placed to suit, zero where a pixel is none of its taps:

    3x3, stride 1, two outputs: columns 0..3 meet (w0, w1, w2, 0) for the left one and (0, w0, w1, w2) for the right one

Weights lie in memory as they are, 4 columns of a kernel row to a word, whatever the tile, and are placed in registers, by a byte permutation.

Pixels outside of the image are the zero point, which the bias makes up for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.schedules.builder import Emitter, make_kernel
from qcompiler.schedules.conv import wrap
from qcompiler.schedules.cuda.base import local, transpose
from qcompiler.schedules.cuda.cards import card_of
from qcompiler.schedules.cuda.epilogue import Epilogue, element, finish_arrays, quad
from qcompiler.schedules.cuda.gemm_plan import repeated_byte
from qcompiler.schedules.cuda.tail import GoesOn
from qcompiler.schedules.depthwise_plan import Geometry, refuse_depthwise
from qcompiler.schedules.portable.conv import check_operands
from qcompiler.schedules.portable.threads import each, quarter, words
from qcompiler.schedules.table import Kernel, Layout, Need, OpCall, register


@dataclass(frozen=True)
class Tile:
    """Output rows and columns of a thread."""

    rows: int
    cols: int


@dataclass(frozen=True)
class Taps:
    """What a tile reads and how it is weighted, along one image row.

    `columns` are read, in `quads` groups of 4. `uses`: (quad, output column, index of the pattern) of every product; a pattern is the kernel column (None: no
    tap) that each of a quad's 4 pixels meets.
    """

    columns: int
    quads: int
    uses: tuple[tuple[int, int, int], ...]
    patterns: tuple[tuple[int | None, ...], ...]

    @staticmethod
    def of(g: Geometry, cols: int) -> Taps:
        stride, dilation, kernel = g.strides[1], g.dilation[1], g.kernel[1]
        columns = (cols - 1) * stride + (kernel - 1) * dilation + 1
        quads = -(-columns // 4)
        uses: list[tuple[int, int, int]] = []
        patterns: list[tuple[int | None, ...]] = []
        for quad_, col in itertools.product(range(quads), range(cols)):
            offsets = [4 * quad_ + j - col * stride for j in range(4)]
            pattern = tuple(o // dilation if o % dilation == 0 and 0 <= o // dilation < kernel else None for o in offsets)
            if any(p is not None for p in pattern):
                if pattern not in patterns:
                    patterns.append(pattern)
                uses.append((quad_, col, patterns.index(pattern)))
        return Taps(columns, quads, tuple(uses), tuple(patterns))


def pack(weight: np.ndarray) -> np.ndarray:
    """[C, KH, KW] as int8 [4 channels][KH][4 columns][channel][column], zero where there is none: the same for every tile."""
    channels, kh, kw = weight.shape
    blocks, quads = -(-channels // 4), -(-kw // 4)
    padded = np.zeros((blocks * 4, kh, quads * 4), np.int8)
    padded[:channels, :, :kw] = weight
    return np.ascontiguousarray(padded.reshape(blocks, 4, kh, quads, 4).transpose(0, 2, 3, 1, 4)).reshape(-1)


def placed(pattern: tuple[int | None, ...], row: Sequence[Any], columns: int) -> Any:
    """The word whose bytes are what a pattern names of a kernel row with so many columns, given as words: a byte permutation, or none. Columns of 4 adjacent
    pixels are 4 adjacent ones at most: they lie in one word, or in two neighbours."""
    first, last = (pick(p // 4 for p in pattern if p is not None) for pick in (min, max))
    ends = 4 * last + 3 >= columns  # the last byte of the last word is 0
    if first == last and all(p == 4 * first + i or (p is None and 4 * first + i >= columns) for i, p in enumerate(pattern)):
        return row[first]
    other = row[last] if ends or first != last else T.int32(0)
    nothing = 7 if ends else 4  # a byte of the other word, which is 0 unless that is a full word of columns
    selector = sum((nothing if p is None else p - 4 * first) << 4 * i for i, p in enumerate(pattern))
    word = T.bind(T.call_pure_extern("int32", "__byte_perm", row[first], other, T.int32(selector)))
    if ends or first == last or None not in pattern:
        return word
    return T.bind(T.bitwise_and(word, T.int32(int(np.array([0 if p is None else -1 for p in pattern], np.int8).view(np.int32)[0]))))


def input_rows(g: Geometry, tile: Tile) -> list[list[tuple[int, int]]]:
    """For each image row below a tile's first: the (output row, kernel row) that meet there."""
    count = (tile.rows - 1) * g.strides[0] + (g.kernel[0] - 1) * g.dilation[0] + 1
    meets: list[list[tuple[int, int]]] = [[] for _ in range(count)]
    for row, tap in itertools.product(range(tile.rows), range(g.kernel[0])):
        meets[row * g.strides[0] + tap * g.dilation[0]].append((row, tap))
    return meets


def threads(g: Geometry, tile: Tile) -> int:
    return g.batch * -(-g.out[0] // tile.rows) * -(-g.out[1] // tile.cols) * -(-g.channels // 4)


def cycles(g: Geometry, tile: Tile, processors: int) -> float:
    """An estimate: 64 lanes of a multiprocessor issue an instruction each cycle; a thread alone waits about 6 cycles for each."""
    taps = Taps.of(g, tile.cols)
    rows = sum(bool(m) for m in input_rows(g, tile))
    products = 4 * len(taps.uses) * g.kernel[0] * tile.rows
    work = rows * taps.quads * (4 * 6 + 8) + products + 5 * g.kernel[0] * len(taps.patterns) + tile.rows * tile.cols * 60 + 60
    return max(threads(g, tile) * work / (processors * 64), 6 * work + 800)


def space(g: Geometry) -> list[Tile]:
    """Tiles whose sums, with the weights of a kernel row and the pixels of an image row, fit the registers."""
    return [Tile(r, c) for r in (1, 2, 4) for c in (1, 2, 4) if r * c <= 8 and r <= g.out[0] and c <= g.out[1]]


@dataclass
class DepthwiseRow(GoesOn):
    """`qc.conv2d` with as many groups as channels."""

    name: str = "cuda-dp4a/depthwise"
    isa: str = "cuda-dp4a"
    own_channels = False

    def refuse(self, op: OpCall, target: Target) -> str | None:
        x = op.operands[0]
        if isinstance(x, Layout) and (len(x.shape) != 4 or x.dtype != "int8"):
            return f"the input is {x.dtype} of rank {len(x.shape)}; supported: int8 images."
        return check_operands(op) or refuse_depthwise(op, wide=True)

    def needs(self, op: OpCall, target: Target) -> list[Need]:
        return [Need(pitch=4), *[Need() for _ in op.tensors[1:]]]

    def space(self, op: OpCall, target: Target) -> dict[str, list[Any]]:
        return {"rows": [1, 2, 4], "cols": [1, 2, 4]}

    def default(self, op: OpCall, target: Target) -> dict[str, Any]:
        g, processors = Geometry.of(op), card_of(target).processors
        return asdict(min(space(g), key=lambda t: (cycles(g, t, processors), t.rows * t.cols)))

    def build(self, op: OpCall, params: Mapping[str, Any], target: Target) -> Kernel:
        g, tile = Geometry.of(op), Tile(**params)
        if tile not in space(g):
            raise ValueError(f"{self.name}: {tile.rows} x {tile.cols} outputs of a thread")
        taps, quads, zero = Taps.of(g, tile.cols), -(-g.kernel[1] // 4), int(op.attrs["x_zero_point"])
        x, weight, bias = op.operands[0], *(np.asarray(o) for o in op.operands[1:3])
        assert isinstance(x, Layout)
        weight = weight.reshape(g.channels, *g.kernel)
        folded = wrap(bias.astype(np.int64) - zero * weight.astype(np.int64).sum(axis=(1, 2)))
        blocks = -(-g.channels // 4)
        channel = np.arange(blocks * 4)
        arrays = [pack(weight), *finish_arrays(op, folded, np.where(channel < g.channels, channel, -1))]

        def emit(k: Emitter) -> None:
            fill = k.i32(repeated_byte(zero))
            end = Epilogue(k, k.arrays[1:], 4, g.channels)
            image, weights = words(k.inputs[0]), words(k.arrays[0])
            with each(k, g.batch, -(-g.out[0] // tile.rows), -(-g.out[1] // tile.cols), blocks) as (n, down, across, block):
                oh, ow = T.bind(down * tile.rows), T.bind(across * tile.cols)
                top, left = T.bind(oh * g.strides[0] - g.padding[0]), T.bind(ow * g.strides[1] - g.padding[1])
                sums = local(tile.rows * tile.cols * 4)
                for i in range(tile.rows * tile.cols * 4):
                    T.buffer_store(sums, T.int32(0), [i])
                inside = [T.bind(T.And(left + c >= 0, left + c < x.shape[2])) for c in range(taps.columns)]
                for i, meets in enumerate(input_rows(g, tile)):
                    if not meets:
                        continue
                    h = T.bind(top + i)
                    there = T.bind(T.And(h >= 0, h < x.shape[1]))
                    start = T.bind(quarter(x.index(n, h, left, block * 4)))
                    pixels = [fill] * (4 * taps.quads)
                    for c, ok in enumerate(inside):
                        pixels[c] = T.bind(T.if_then_else(T.And(there, ok), image[start + c * (x.channel_pitch // 4)], fill))
                    columns = [transpose(pixels[4 * q : 4 * q + 4]) for q in range(taps.quads)]
                    for row, tap in meets:
                        read = [quad(weights, (block * g.kernel[0] + tap) * quads + i) for i in range(quads)]
                        for c in range(4):
                            weight_row = [T.bind(element(q, c)) for q in read]
                            factors = [placed(pattern, weight_row, g.kernel[1]) for pattern in taps.patterns]
                            for q, col, pattern in taps.uses:
                                at = (row * tile.cols + col) * 4 + c
                                T.buffer_store(sums, T.call_pure_extern("int32", "__dp4a", columns[q][c], factors[pattern], sums[at]), [at])
                for row, col in itertools.product(range(tile.rows), range(tile.cols)):
                    with T.If(T.And(oh + row < g.out[0], ow + col < g.out[1])), T.Then():
                        pixel = T.bind((n * g.out[0] + (oh + row)) * g.out[1] + (ow + col))
                        first = (row * tile.cols + col) * 4
                        end([sums[first + c] for c in range(4)], block * 4, pixel, T.int32(0), block * 4)

        macs = math.prod(op.output.shape) * math.prod(g.kernel)
        return make_kernel(self.name, op, target, emit, arrays=arrays, macs=macs, threads=threads(g, tile), block=128, params=params)


register("qc.conv2d", DepthwiseRow())
