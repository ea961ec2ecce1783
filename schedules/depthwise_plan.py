"""How a depthwise convolution is cut: bundles of input pixels, vectors of channels, tasks.

A dot instruction sums `size` adjacent elements per lane (4 bytes for VPDPBUSD, 2 words for VPMADDWD), so a depthwise kernel interleaves, channel
by channel, the input pixels of up to `size` taps: a *bundle*. Interleaving costs more than the dot itself, so bundles are chosen once for a whole
tile of outputs, and every output that touches a bundle multiplies it with weights placed to suit, zero where a pixel is not one of its taps:

    3x3, stride 1, two output rows: a bundle is a column of 4 rows. Output row 0 uses weights (w0, w1, w2, 0), row 1 uses (0, w0, w1, w2).
    5x5: 4 rows of a column make a bundle; the fifth row's pixels go 4 columns to a bundle ("wide") or one by one ("tall").
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from qcompiler.schedules.table import Layout, OpCall

Pair = tuple[int, int]  # (row, column)


@dataclass(frozen=True)
class Geometry:
    """The numbers of a depthwise convolution, whatever its type. `padding`: top, left, bottom, right."""

    batch: int
    channels: int
    out: Pair
    kernel: Pair
    strides: Pair
    dilation: Pair
    padding: tuple[int, int, int, int]

    @staticmethod
    def of(op: OpCall) -> Geometry:
        """The geometry of a call that `refuse_depthwise` lets pass."""
        n, oh, ow, channels = op.output.shape
        kh, kw = op.operands[1].shape[1:3]
        (sy, sx), (dy, dx), (top, left, bottom, right) = op.attrs["strides"], op.attrs["dilation"], op.attrs["padding"]
        return Geometry(n, channels, (oh, ow), (kh, kw), (sy, sx), (dy, dx), (top, left, bottom, right))

    @property
    def macs(self) -> int:
        """Multiplications, counting those with padding."""
        return self.batch * math.prod(self.out) * self.channels * math.prod(self.kernel)


def refuse_depthwise(op: OpCall, *, wide: bool = False) -> str | None:
    """Why `op` is no depthwise convolution that these rows take, or None. Shapes only. wide: they write 16-bit results, and read such residuals."""
    if not isinstance(op.operands[0], Layout) or any(isinstance(o, Layout) for o in op.operands[1:3]):
        return "the input must be computed at run time, weights and bias must be constants."
    groups, channels, outputs = op.attrs["groups"], op.operands[0].shape[3], op.output.shape[3]
    if groups == 1 or not groups == channels == outputs:
        return f"groups ({groups}), input channels ({channels}) and output channels ({outputs}) must be equal, and more than 1."
    return "16-bit numbers are not supported." if not wide and "int16" in (op.output.dtype, *(t.dtype for t in op.tensors)) else None


# -- bundles ------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bundle:
    """`pixels`: input positions relative to the tile's first. `uses`: (output index in the tile, row-major; index of the weight pattern)."""

    pixels: tuple[Pair, ...]
    uses: tuple[Pair, ...]


@dataclass(frozen=True)
class TapPlan:
    """Bundles in the order of emission (by column), and the distinct placements of kernel taps in a bundle (None: weight 0)."""

    bundles: tuple[Bundle, ...]
    patterns: tuple[tuple[Pair | None, ...], ...]
    outputs: int

    @property
    def dots(self) -> int:
        """Dots per channel vector for the whole tile."""
        return sum(len(b.uses) for b in self.bundles)

    @property
    def live(self) -> int:
        """The most outputs that are begun and not finished while a bundle is used."""
        touched = [{o for o, _ in b.uses} for b in self.bundles]
        spans = [[i for i, t in enumerate(touched) if o in t] for o in range(self.outputs)]
        return max(sum(s[0] <= i <= s[-1] for s in spans) for i in range(len(self.bundles)))


@lru_cache(maxsize=1024)
def plan_taps(kernel: Pair, strides: Pair, dilation: Pair, tile: Pair, size: int, leftover: str) -> TapPlan:
    """The bundles of a tile of `tile` = (rows, columns) outputs.

    Rows of the input are taken `size` at a time. What remains below is a bundle of so many rows and one column (`leftover` "tall"), or is taken
    in powers of two, as many columns wide as fill a bundle ("wide").
    """
    outputs = [(r, s) for r in range(tile[0]) for s in range(tile[1])]
    taps_at: dict[Pair, list[tuple[int, Pair]]] = {}  # input pixel -> (output, kernel tap) that need it
    for i, (r, s) in enumerate(outputs):
        for ky in range(kernel[0]):
            for kx in range(kernel[1]):
                pixel = (r * strides[0] + ky * dilation[0], s * strides[1] + kx * dilation[1])
                taps_at.setdefault(pixel, []).append((i, (ky, kx)))
    rows, columns = (sorted({p[axis] for p in taps_at}) for axis in (0, 1))
    boxes = [[(r, c) for c in columns[at : at + width] for r in band] for band, width in _bands(rows, size, leftover) for at in range(0, len(columns), width)]
    patterns: dict[tuple[Pair | None, ...], int] = {}
    bundles = []
    for box in sorted(boxes, key=lambda b: (b[0][1], b[0][0])):
        pixels = tuple(p for p in box if p in taps_at)
        placed: dict[int, list[Pair | None]] = {}
        for slot, pixel in enumerate(pixels):
            for output, tap in taps_at[pixel]:
                placed.setdefault(output, [None] * size)[slot] = tap
        if placed:
            uses = tuple((o, patterns.setdefault(tuple(p), len(patterns))) for o, p in sorted(placed.items()))
            bundles.append(Bundle(pixels, uses))
    return TapPlan(tuple(bundles), tuple(patterns), len(outputs))


def _bands(rows: Sequence[int], size: int, leftover: str) -> list[tuple[list[int], int]]:
    """(rows of a band, columns of its bundles)."""
    bands, at = [], 0
    while at < len(rows):
        height, width = min(size, len(rows) - at), 1
        if height < size and leftover == "wide":
            height = 1 << (height.bit_length() - 1)
            width = size // height
        bands.append((list(rows[at : at + height]), width))
        at += height
    return bands


# -- channels and tasks -------------------------------------------------------------------------------------------------------------------


def blocks_of(channels: int, widths: Sequence[int]) -> list[Pair]:
    """(first channel, channels) of the vectors that cover `channels`; `widths`: the vectors to use, widest first.

    A last vector may overlap the one before it; a single one may reach past the last channel.
    """
    blocks, at = [], 0
    for width in widths:
        while channels - at >= width:
            blocks.append((at, width))
            at += width
        rest = channels - at
        if rest and (width == widths[-1] or (channels >= width and 4 * rest >= 3 * width)):
            blocks.append((max(channels - width, 0), width))
            return blocks
    return blocks


@dataclass(frozen=True)
class Tasks:
    """Tasks are (image, chunk of row tiles, chunk of the blocks of full width); narrower blocks belong to the last channel chunk."""

    images: int
    tiles: int  # row tiles of an image
    blocks: int  # blocks of full width
    row_chunks: int
    channel_chunks: int

    @staticmethod
    def of(g: Geometry, tile_rows: int, blocks: Sequence[Pair], row_tasks: int, channel_tasks: int) -> Tasks:
        """At most `row_tasks` x `channel_tasks` per image. What overlaps (a last tile or block that is moved back) stays within a task."""
        tiles, full = -(-g.out[0] // tile_rows), sum(width == blocks[0][1] for _, width in blocks)
        overlaps = full > 1 and blocks[full - 1][0] != (full - 1) * blocks[0][1]
        rows = max(1, min(row_tasks, tiles - (g.out[0] % tile_rows > 0)))
        return Tasks(g.batch, tiles, full, rows, max(1, min(channel_tasks, full - overlaps)))

    @property
    def count(self) -> int:
        return self.images * self.row_chunks * self.channel_chunks


def default_tasks(g: Geometry, tiles: int, macs_per_task: int, blocks: int = 1, limit: int = 16) -> Pair:
    """(row tasks, channel tasks): a power of two in all. Of `blocks` of channels as many tasks as may be, then of `tiles` of rows, the rest of channels."""
    wanted = max(1, min(limit, g.macs // g.batch // macs_per_task))
    wanted = 1 << (wanted.bit_length() - 1)
    first = min(wanted, 1 << (blocks.bit_length() - 1))
    rows = min(wanted // first, 1 << (tiles.bit_length() - 1))
    return rows, wanted // rows
