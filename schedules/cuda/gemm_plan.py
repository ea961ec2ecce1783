"""Convolution as tiles of a matrix product on a GPU: geometry, tiling, packing of weights, cost model; plain Python and numpy.

Rows of the product are output pixels, columns output channels of a group; the reduction runs over taps and channels. A block computes `bm` x `bn`
of it in steps of `bk` bytes, staged through shared memory; its warps compute `wm` x `wn` each, and `wk` of them share such a part, each with its
own share of every step, and add up at the end. `split_k` blocks share a tile, each with its own steps; the one that ends last adds up.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from qcompiler.schedules.cuda.cards import Card, card_of
from qcompiler.schedules.isa import demand
from qcompiler.schedules.table import Layout, OpCall

SHARED = 48 << 10  # bytes of shared memory that a block may declare
CHUNK = 16  # bytes of a row of a matrix operand
SPLITS = [1, 2, 3, 4, 5, 6, 8, 10, 12, 16]  # blocks that share a tile
LEAST = 256  # bytes of the reduction that are worth a block of their own
SCRATCH = 16 << 20  # bytes of sums that blocks may leave for each other: more belongs to layers with tiles enough, and in no level 2 cache
FIXED, GATHER = 1500, 1200  # cycles of every layer, whatever its size, and of the way of a block's sums to another: a fence, a counter, a load


@dataclass(frozen=True, kw_only=True)
class Unit:
    """How a warp multiplies. A part is `rows` x 8 of the product; a lane holds the sums of `row_count` rows and `columns` channels of it,
    for `depth` bytes of the reduction at a time. `warps` multiply together: all channels of a block in one instruction, asynchronously, straight from shared
    memory. `issue` and `latency`: slots and cycles of a part. `bits`: of a weight in memory; 4 become 8 in registers, by `unpack` instructions a column of
    parts, and go back to shared memory where the product is straight from there."""

    name: str
    rows: int
    row_count: int
    columns: int
    depth: int
    issue: int
    latency: int
    warps: int = 1
    bits: int = 8
    unpack: int = 0

    def __post_init__(self) -> None:
        demand(
            self.name,
            {
                "one warp multiplies, or 4 do together": self.warps in (1, 4),
                "the 32 lanes of a warp hold a part": 8 * self.rows == 32 * self.row_count * self.columns > 0,
                "the depth is words of 4 bytes": self.depth > 0 and self.depth % 4 == 0,
                "weights have 8 bits, or 4": self.bits in (8, 4),
            },
        )

    @property
    def kept(self) -> int:
        """Bits of a weight in shared memory: where 4 become 8 there, both."""
        return 12 if self.bits == 4 and self.warps > 1 else self.bits

    def rate(self, card: Card) -> int:
        """Multiply-accumulates per cycle of a multiprocessor; dp4a: 64 lanes of 4, on all of them (CUDA C++ Programming Guide, "Arithmetic Instructions")."""
        return card.group_products if self.warps > 1 else card.products if self.columns > 1 else 256


WGMMA = Unit(name="cuda-wgmma", rows=16, row_count=2, columns=2, depth=32, issue=0, latency=4, warps=4)
MMA = Unit(name="cuda-mma", rows=16, row_count=2, columns=2, depth=32, issue=1, latency=8)
DP4A = Unit(name="cuda-dp4a", rows=4, row_count=1, columns=1, depth=16, issue=5, latency=16)
MMA_FOUR, DP4A_FOUR, WGMMA_FOUR = replace(MMA, bits=4, unpack=3), replace(DP4A, bits=4, unpack=6), replace(WGMMA, bits=4, unpack=1)
UNITS = (WGMMA_FOUR, WGMMA, MMA_FOUR, MMA, DP4A_FOUR, DP4A)  # best first
SPAN = 64  # most channels among which a lane's are adjacent: 16 of them are as many as the end of a convolution handles at once
PIECE = 32  # channels, and bytes of the reduction, of a piece of weights in memory


@dataclass(frozen=True)
class Geometry:
    """A convolution or dense layer; `inputs` and `outputs` count the channels of one group, of which `joined` were merged block-diagonally."""

    x: Layout
    out: Layout
    inputs: int
    outputs: int
    groups: int
    joined: int
    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int]

    @staticmethod
    def of(op: OpCall) -> Geometry:
        x, w = op.operands[:2]
        assert isinstance(x, Layout) and isinstance(w, np.ndarray)
        if op.name.endswith("dense"):
            return Geometry(as_image(x), as_image(op.output), w.shape[-1], w.shape[0], 1, 1, (1, 1), (1, 1), (1, 1), (0, 0))
        a, groups = op.attrs, int(op.attrs.get("groups", 1))
        (sh, sw), (dh, dw), (top, left) = a["strides"], a.get("dilation", (1, 1)), a["padding"][:2]
        outputs, kh, kw, inputs = w.shape
        joined = min((d for d in range(1, groups + 1) if groups % d == 0), key=lambda d: _group_cost(d, inputs, outputs // groups))
        return Geometry(x, op.output, joined * inputs, joined * outputs // groups, groups // joined, joined, (kh, kw), (sh, sw), (dh, dw), (top, left))

    @cached_property
    def pixels(self) -> int:
        return math.prod(self.out.shape[:3])

    @cached_property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @cached_property
    def vector(self) -> int:
        """Bytes of adjacent channels that are copied at once: 16, 8 or 4; 0 where pixels are not even aligned to 4."""
        wanted = 4 if self.inputs <= 4 else 8 if self.inputs <= 8 else 16
        pitch = self.x.channel_pitch
        for size in (16, 8, 4):
            if size <= wanted and pitch % size == 0 and (self.groups == 1 or self.inputs % size == 0):
                return size
        return 0

    @cached_property
    def depth(self) -> int:
        """Bytes of the reduction, the channels of each tap padded to whole vectors."""
        return self.taps * self.padded_inputs

    @cached_property
    def padded_inputs(self) -> int:
        return -(-self.inputs // self.vector) * self.vector

    @cached_property
    def span(self) -> int:
        """Channels among which a lane's are adjacent, where one warp has all of them: no more are padded than to whole pieces."""
        return SPAN if -(-self.outputs // PIECE) * PIECE % SPAN == 0 else PIECE

    @cached_property
    def pieces(self) -> tuple[int, int]:
        """Of a group's weights: along channels, along the reduction."""
        return -(-self.outputs // PIECE), -(-self.depth // PIECE)

    @cached_property
    def bounded(self) -> bool:
        """Whether some tap of some output lies outside of the image."""
        if any(self.padding):
            return True
        spans = [(o - 1) * s + (k - 1) * d for o, s, k, d in zip(self.out.shape[1:3], self.strides, self.kernel, self.dilation, strict=True)]
        return any(span >= size for span, size in zip(spans, self.x.shape[1:3], strict=True))


def _group_cost(joined: int, inputs: int, outputs: int) -> float:
    """Of all groups when `joined` become one: steps of 32 bytes times parts of 32 channels; unaligned groups can't be read."""
    if (joined * inputs) % 4:
        return math.inf if joined > 1 else 1e9
    return -(-joined * outputs // 32) * -(-joined * inputs // 32) / joined


def repeated_byte(value: int) -> int:
    """The int32 word whose four bytes are all `value`."""
    return int(np.frombuffer(np.full(4, value, np.int8).tobytes(), np.int32)[0])


def as_image(layout: Layout) -> Layout:
    return layout if len(layout.shape) == 4 else Layout((1, 1, math.prod(layout.shape[:-1]), layout.shape[-1]), layout.dtype)


@dataclass(frozen=True)
class Tile:
    """A point of the design space; see the module's text. `stages`: steps whose operands are in shared memory at a time."""

    bm: int
    bn: int
    bk: int
    wm: int
    wn: int
    wk: int
    stages: int
    split_k: int = 1

    @cached_property
    def warps(self) -> tuple[int, int]:
        return self.bm // self.wm, self.bn // self.wn

    @cached_property
    def threads(self) -> int:
        return 32 * math.prod(self.warps) * self.wk

    def weight_bytes(self, unit: Unit) -> int:
        """That are copied for a stage."""
        return self.bn * self.bk * unit.bits // 8

    def stage_bytes(self, unit: Unit) -> int:
        return self.bm * self.bk + self.bn * self.bk * unit.kept // 8

    def params(self) -> dict[str, Any]:
        return asdict(self)

    def parts(self, unit: Unit) -> tuple[int, int]:
        """Parts of a warp: along pixels, along channels."""
        return self.wm // unit.rows, self.wn // 8

    def run(self, unit: Unit, span: int = SPAN) -> int:
        """Adjacent channels that a lane holds, of every `span` or of a warp's."""
        return min(self.wn, span) // 8 * unit.columns

    def ahead(self, unit: Unit) -> int:
        """Steps whose operands are on their way while one is multiplied. Asynchronous products still read the stage before it, if there are 3 or more."""
        return self.stages - (2 if unit.warps > 1 and self.stages > 2 else 1)

    def tiles(self, g: Geometry) -> int:
        """Tiles of the result; `split_k` times as many blocks."""
        return -(-g.pixels // self.bm) * -(-g.outputs // self.bn) * g.groups

    def share(self, g: Geometry) -> int:
        """Steps of a block; the last of a tile may have fewer."""
        return -(-g.depth // self.bk // self.split_k)

    def refuse_layer(self, g: Geometry) -> str | None:
        """Why a block's threads can't copy a layer's pixels, or its reduction not be divided among so many blocks, or None."""
        if self.threads * g.vector < self.bk:
            return f"{self.threads} threads copy no row of {self.bk} bytes, {g.vector} at a time"
        if (self.split_k - 1) * self.share(g) * self.bk >= g.depth:
            return f"{-(-g.depth // self.bk)} steps leave some of {self.split_k} blocks without work"
        if self.scratch(g) > SCRATCH:
            return f"{self.split_k} blocks would leave {self.scratch(g) >> 20} MB of sums for each other"
        return None

    def scratch(self, g: Geometry) -> int:
        """Bytes of the sums that blocks leave for each other."""
        return 0 if self.split_k == 1 else self.tiles(g) * self.split_k * self.bm * self.bn * 4

    def refuse(self, unit: Unit) -> str | None:
        """Why no kernel has this tiling, or None."""
        if self.bm % self.wm or self.bn % self.wn or self.wm % unit.rows or self.wn % 8:
            return "a block is no whole number of warps' parts"
        if not 32 <= self.threads <= 512:
            return f"{self.threads} threads"
        if self.bk % (self.wk * unit.depth):
            return "a step is no whole number of the warps' shares"
        if unit.warps > 1:
            if self.wm != unit.rows or self.wn != self.bn or self.wk != 1 or self.warps[0] % unit.warps:
                return f"{unit.warps} warps multiply {unit.warps * unit.rows} pixels by all channels of a block together"
            if self.bk > 128:
                return "the tensor cores know no rows of more than 128 bytes"
        if self.stages < 2 or self.stages * self.stage_bytes(unit) > SHARED or (self.wk - 1) * self.bm * self.bn * 4 > self.stages * self.stage_bytes(unit):
            return "too much shared memory"
        if self.registers(unit) > min(255, 65536 // self.threads):
            return "too many registers"
        if self.run(unit) not in (4, 8, 16):
            return f"a lane holds {self.run(unit)} channels"
        return None

    def registers(self, unit: Unit) -> int:
        """An estimate per thread: sums, operands, addresses."""
        rows, columns = self.parts(unit)
        sums = rows * unit.row_count * columns * unit.columns
        operands = 0 if unit.warps > 1 else 4 * rows + 2 * columns if unit.columns > 1 else 4 * columns + 4
        return sums + operands + 40


def swizzle(row: Any, chunks: int) -> Any:
    """What the chunk index of a row in shared memory is XORed with, so that 8 rows' equal chunks lie in different banks. Works on ints
    and TIR expressions; only the low 3 bits of the row matter."""
    shift, mask = (0, 7) if chunks >= 8 else (1, 3) if chunks == 4 else (2, 1)
    return (row >> shift) & mask


def channel_order(span: int, unit: Unit) -> np.ndarray:
    """The channel, of `span`, that each row of weights holds: such that a lane's sums are adjacent channels, whichever rows a warp has."""
    row = np.arange(span)
    part, lane = row // 8, row % 8
    return lane // unit.columns * (span // 8 * unit.columns) + part * unit.columns + lane % unit.columns


def in_four_bits(weight: np.ndarray) -> bool:
    """Whether all weights [O, ...] lie in -8 .. 7, and 16 times any sum of theirs with int8 in int32."""
    return bool(weight.min() >= -8 and weight.max() <= 7 and 16 * 128 * 8 * weight[0].size < 2**31)


def pack(weight: np.ndarray, g: Geometry, unit: Unit) -> np.ndarray:
    """[O, KH, KW, I/groups] in pieces of which every tiling's steps are made: [group][32 channels][32 of the reduction] and then a piece: a row of bytes per
    channel, or 4-bit weights in the order in which lanes hold them. The low halves of a word's bytes are 4 of those, the high ones what the lane multiplies
    next."""
    w = merge(weight.reshape(weight.shape[0], g.taps, -1), g)  # [G, outputs, taps, inputs]
    channels, depth = (PIECE * n for n in g.pieces)
    padded = np.zeros((g.groups, channels, g.taps, g.padded_inputs), np.int8)
    padded[:, : g.outputs, :, : g.inputs] = w
    flat = np.zeros((g.groups, channels, depth), np.int8)
    flat[..., : g.depth] = padded.reshape(g.groups, channels, g.depth)
    rows = flat.reshape(g.groups, -1, g.span, depth)[:, :, channel_order(g.span, unit)].reshape(flat.shape)
    if unit.bits == 8:
        return np.ascontiguousarray(rows.reshape(g.groups, -1, PIECE, depth // PIECE, PIECE).transpose(0, 1, 3, 2, 4)).reshape(-1)
    if unit.columns > 1:  # [lane: row, quarter][part] of 32 weights, which are [half, quarter, byte]
        halves = rows.reshape(g.groups, -1, 4, 8, depth // PIECE, 2, 4, 4).transpose(0, 1, 4, 3, 6, 2, 5, 7).astype(np.uint8)
    else:  # [16 of the reduction][2 parts][lane: row][part][word], which are [word, half, byte]
        halves = rows.reshape(g.groups, -1, 2, 2, 8, depth // PIECE, 2, 2, 2, 4).transpose(0, 1, 5, 6, 2, 4, 3, 7, 8, 9).astype(np.uint8)
    return np.ascontiguousarray(halves[..., 0, :] & 15 | halves[..., 1, :] << 4).view(np.int8).reshape(-1)


def merge(weight: np.ndarray, g: Geometry) -> np.ndarray:
    """[O, taps, I] of all groups as [G, outputs, taps, inputs] of the joined ones, zero off the diagonal."""
    _, taps, inputs = weight.shape
    parts = weight.reshape(g.groups, g.joined, -1, taps, inputs)
    merged = np.zeros((g.groups, g.joined, parts.shape[2], taps, g.joined, inputs), weight.dtype)
    for i in range(g.joined):
        merged[:, i, :, :, i] = parts[:, i]
    return merged.reshape(g.groups, g.outputs, taps, g.inputs)


# -- choice -------------------------------------------------------------------------------------------------------------------------------


def design_space(unit: Unit, g: Geometry | None = None) -> dict[str, list[Any]]:
    """Candidates of each tunable (without a layer: with a block to a tile); combinations that can't be are refused by `Tile.refuse` and `refuse_layer`."""
    if unit.warps > 1:
        space = {"bm": [64, 128, 256], "bn": [32, 64, 128, 256], "bk": [32, 64, 128], "wm": [16], "wn": [32, 64, 128, 256], "wk": [1], "stages": [2, 3, 4]}
    else:
        rows = [16, 32, 64, 128, 256] if unit.columns > 1 else [32, 64, 128]
        space = {
            "bm": rows,
            "bn": [32, 64, 128, 256],
            "bk": [32, 64, 128, 256],
            "wm": [16, 32, 64],
            "wn": [16, 32, 64],
            "wk": [1, 2, 4, 8],
            "stages": [2, 3, 4],
        }
    return space | {"split_k": [n for n in SPLITS if g and n * LEAST <= g.depth] or [1]}


@lru_cache(4)
def tiles(unit: Unit) -> tuple[Tile, ...]:
    """All that can be built, with a block to a tile."""
    space = design_space(unit)
    points = (Tile(**dict(zip(space, values, strict=True))) for values in itertools.product(*space.values()))
    return tuple(t for t in points if t.refuse(unit) is None)


def cycles(g: Geometry, tile: Tile, unit: Unit, card: Card) -> float:
    """An estimate for the whole operator, from published throughputs; never measured.

    Blocks that share a multiprocessor hide each other's latency until one of its parts is busy all the time: the multipliers, the path to the level
    2 cache, shared memory (128 bytes a cycle), or the issue of instructions (4 warps a cycle). The driver keeps 1 KB of shared memory per block for itself.
    """
    steps = tile.share(g)
    blocks = tile.tiles(g) * tile.split_k
    resident = max(
        1, min(card.threads // tile.threads, 65536 // (tile.registers(unit) * tile.threads), card.shared // (tile.stages * tile.stage_bytes(unit) + 1024))
    )
    share = tile.bk // (unit.depth * tile.wk)
    rows, columns = tile.parts(unit)
    warps = tile.threads // 32
    multiply = tile.bm * tile.bn * tile.bk / unit.rate(card)
    read = warps / unit.warps * (tile.wm * unit.warps + tile.wn * (8 if unit.warps > 1 else unit.bits) / 8) * tile.bk / tile.wk / 128
    if unit.kept > 8:  # read by 4 bits, and written by 8
        read += tile.bn * tile.bk * unit.kept / 8 / 128
    copies = tile.bm * tile.bk / g.vector * (16 if g.bounded else 6) + tile.weight_bytes(unit) / CHUNK * 4
    issue = copies / 128 + warps * share * (20 + columns * (rows * unit.issue + unit.unpack)) / 4
    busy = steps * max(multiply, (tile.bm * tile.bk + tile.weight_bytes(unit)) / card.level2, read, issue) + tile.bm * tile.bn / 16
    step = 90 + (60 if unit.kept > 8 else 0) + share * (30 + rows * columns * unit.latency)  # one warp, alone
    latency = steps * max(step, 600 / tile.ahead(unit)) + FIXED + (200 if tile.wk > 1 else 0)
    if tile.split_k > 1:  # every block writes its sums, one reads those of all others
        sums, others = tile.bm * tile.bn * 4, tile.split_k - 1
        busy += sums / card.level2 * (1 + others / tile.split_k)
        latency += GATHER + sums * others / 32
    each = -(-blocks // card.processors)
    together = min(each, resident)
    return -(-each // together) * max(together * busy, latency)


@lru_cache(1024)
def best_tile(g: Geometry, unit: Unit, arch: str) -> Tile:
    """The tiling with the lowest estimate; of equal ones the one with fewer threads. Tiles are shared where they are too few to fill the card twice."""
    card, counts = card_of(arch), design_space(unit, g)["split_k"][1:]

    def shared(tile: Tile) -> Iterator[Tile]:
        for split in (replace(tile, split_k=count) for count in counts if tile.tiles(g) * (count - 1) < 2 * card.processors):
            if split.refuse_layer(g) is None:
                yield split

    def estimate(tile: Tile) -> tuple[Any, ...]:
        return cycles(g, tile, unit, card), tile.threads, tile.stages * tile.stage_bytes(unit), repr(tile.params().values())

    best = min((tile for tile in tiles(unit) if tile.refuse_layer(g) is None), key=estimate)
    if estimate(best)[0] <= FIXED + GATHER:
        return best
    return min([best, *(split for tile in tiles(unit) for split in shared(tile))], key=estimate)


def quickest(g: Geometry, units: Sequence[Unit], arch: str) -> Unit:
    """The unit with the lowest estimate for weights that fit into 4 bits, the first of equal ones. All weights come from memory: networks that keep few bits of
    them are those whose weights no cache holds."""
    weights = g.groups * g.outputs * g.depth

    def estimate(unit: Unit) -> float:
        return max(cycles(g, best_tile(g, unit, arch), unit, card_of(arch)), FIXED + weights * unit.bits / 8 / card_of(arch).memory)

    return min(units, key=estimate)
