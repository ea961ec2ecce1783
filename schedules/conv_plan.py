"""Convolution as tiles: geometry, loop nest, packing and cost model, in plain Python and numpy (no TIR).

A convolution (or dense layer) is `groups` independent matrix products. A *tile* computes `rows * cols` output pixels times `blocks`
vectors of output channels, with all its accumulators in registers, over the whole reduction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from qcompiler.schedules.isa import Isa
from qcompiler.schedules.table import Layout, OpCall


@dataclass(frozen=True)
class Geometry:
    """One convolution; `inputs` and `outputs` count the channels of one group. Dense layers are 1x1 convolutions of a one-row image.

    `wraps`: a 1x1 convolution whose output alone has a halo, as one row of all pixels: tiles run on from one row of the output to the next.
    """

    x: Layout
    out: Layout
    residual: Layout | None
    inputs: int
    outputs: int
    groups: int
    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int]  # top, left; negative where the first window begins inside
    wraps: bool = False

    @property
    def pixels(self) -> tuple[int, int, int]:
        """Output batch, height, width."""
        batch, height, width, _ = self.out.shape
        return (1, 1, batch * height * width) if self.wraps else (batch, height, width)

    @property
    def widest(self) -> int:
        """The most columns of a tile: it may reach into the next row of the output, and not beyond that."""
        return self.out.shape[2]

    @property
    def macs(self) -> int:
        return math.prod(self.pixels) * self.groups * self.outputs * self.inputs * math.prod(self.kernel)

    def halo(self) -> tuple[int, int, int, int]:
        """The border of the input that windows reach (top, left, bottom, right); at most the padding."""
        after = []
        for i in (0, 1):
            last = (self.out.shape[1 + i] - 1) * self.strides[i] + (self.kernel[i] - 1) * self.dilation[i] - self.padding[i]
            after.append(max(0, last - (self.x.shape[1 + i] - 1)))
        return (max(0, self.padding[0]), max(0, self.padding[1]), after[0], after[1])

    def tail(self, group: int) -> int:
        """How many channels the last step over a pixel reads: a whole `group` if those lie in the same pixel (they meet zero weights)."""
        whole = (self.groups - 1) * self.inputs + -(-self.inputs // group) * group
        return group if self.inputs % group == 0 or whole <= self.x.channel_pitch else self.inputs % group

    def loops(self, group: int) -> list[tuple[int, int]]:
        """The reduction as (extent, step in elements of x), outermost first, `group` channels a step; merged where x is contiguous."""
        pitch = self.x.channel_pitch
        rows, cols = (self.kernel[0], self.dilation[0] * self.x.rows[1] * pitch), (self.kernel[1], self.dilation[1] * pitch)
        merged = [(-(-self.inputs // group), group)]
        for extent, step in (cols, rows):
            inner_extent, inner_step = merged[0]
            if step == inner_extent * inner_step and self.tail(group) == group:
                merged[0] = (extent * inner_extent, inner_step)
            elif extent > 1:
                merged.insert(0, (extent, step))
        return merged

    def depth(self, group: int) -> int:
        """Dot steps per output."""
        return math.prod(self.kernel) * -(-self.inputs // group)


def geometry_of(op: OpCall) -> Geometry:
    """The geometry of qc.conv2d, qc.dense and their float forms, flattened where the layouts allow."""
    x, weight = op.operands[0], op.operands[1]
    assert isinstance(x, Layout) and isinstance(weight, np.ndarray)
    residual = op.operands[-1] if len(op.tensors) == 2 else None
    assert residual is None or isinstance(residual, Layout)
    if op.name.endswith("dense"):
        x, out = _as_image(x), _as_image(op.output)
        residual = _as_image(residual) if residual else None
        geometry = Geometry(x, out, residual, weight.shape[1], weight.shape[0], 1, (1, 1), (1, 1), (1, 1), (0, 0))
    else:
        groups, (outputs, kh, kw, inputs) = int(op.attrs.get("groups", 1)), weight.shape
        sh, sw = op.attrs["strides"]
        dh, dw = op.attrs.get("dilation", (1, 1))
        top, left = op.attrs["padding"][:2]
        geometry = Geometry(x, op.output, residual, inputs, outputs // groups, groups, (kh, kw), (sh, sw), (dh, dw), (top, left))
    layouts = [v for v in (geometry.x, geometry.out, geometry.residual) if v]
    if geometry.kernel == geometry.strides == (1, 1) and not any(any(v.halo) for v in layouts) and geometry.halo() == (0, 0, 0, 0):
        flat = {k: _flat(v) if v else None for k, v in (("x", geometry.x), ("out", geometry.out), ("residual", geometry.residual))}
        return replace(geometry, **flat)  # type: ignore[arg-type]
    return geometry


def _as_image(layout: Layout) -> Layout:
    if len(layout.shape) == 4:
        return layout
    channels = layout.shape[-1]
    return Layout((1, 1, math.prod(layout.shape[:-1]), channels), layout.dtype)


def _flat(layout: Layout) -> Layout:
    n, h, w, c = layout.shape
    return Layout((1, 1, n * h * w, c), layout.dtype, pitch=layout.channel_pitch)


@lru_cache(maxsize=1024)
def wrapped(geometry: Geometry, isa: Isa) -> Geometry:
    """The same convolution, its tiles running on from row to row where they may and that is faster: where none divides the rows."""
    pointwise = geometry.kernel == geometry.strides == (1, 1) and geometry.padding == (0, 0)
    if not pointwise or geometry.residual or any(geometry.x.halo) or not any(geometry.out.halo):
        return geometry
    return min((geometry, replace(geometry, wraps=True)), key=lambda g: cycles(g, isa, *best_tile(g, isa)))


def merge_groups(geometry: Geometry, isa: Isa) -> tuple[Geometry, int]:
    """Narrow groups joined, block-diagonally, so that a vector of outputs is well filled; and how many became one."""

    def cost(joined: int) -> float:
        steps = math.prod(geometry.kernel) * -(-joined * geometry.inputs // isa.group)
        return -(-joined * geometry.outputs // isa.lanes) * (steps + 6) / joined

    joined = min((d for d in range(1, geometry.groups + 1) if geometry.groups % d == 0), key=cost)
    return replace(geometry, inputs=joined * geometry.inputs, outputs=joined * geometry.outputs, groups=geometry.groups // joined), joined


def merge_weight(weight: np.ndarray, groups: int, joined: int) -> np.ndarray:
    """[O, KH, KW, I/groups] as [groups/joined, joined * O/groups, KH, KW, joined * I/groups], zero off the diagonal."""
    outputs, kh, kw, inputs = weight.shape
    parts = weight.reshape(groups // joined, joined, outputs // groups, kh, kw, inputs)
    merged = np.zeros((groups // joined, joined, outputs // groups, kh, kw, joined, inputs), weight.dtype)
    for i in range(joined):
        merged[:, i, :, :, :, i] = parts[:, i]
    return merged.reshape(groups // joined, joined * (outputs // groups), kh, kw, joined * inputs)


@dataclass(frozen=True)
class Tiling:
    """A point of the design space.

    A tile is `rows` x `cols` pixels times `blocks` vectors of channels. `order`: the outer loop within a task, "channels" or "pixels".
    `unroll`: dot steps per iteration of the innermost loop. Tasks are `pixel_tasks` runs of tiles times `channel_tasks` runs of channels
    (of groups, if there are several).
    """

    rows: int
    cols: int
    blocks: int
    order: str
    unroll: int
    pixel_tasks: int
    channel_tasks: int

    def params(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Channels:
    """How the channels of one group are cut: `full` tiles of `blocks` vectors, then one last tile of `last` vectors (0: none).

    Only the very last tile may be ragged, and then it is the `last` one unless it is the only one. `valid`: channels of that tile; `sharing`: pixels that
    share its last vector, each in an equal part of the lanes.
    """

    blocks: int
    full: int
    last: int
    valid: int
    sharing: int = 1

    @property
    def vectors(self) -> int:
        return self.full * self.blocks + self.last

    @property
    def tiles(self) -> list[tuple[int, int, int]]:
        """(number, vectors, pixels that share the last of them) of the tiles that are alike."""
        if self.last == 0 and self.full == 1:
            return [(1, self.blocks, self.sharing)]
        return [(self.full, self.blocks, 1)] + [(1, self.last, self.sharing)] * (self.last > 0)


def cut_channels(outputs: int, isa: Isa, blocks: int) -> Channels:
    vectors, rest = -(-outputs // isa.lanes), outputs % isa.lanes
    full, last = divmod(vectors, blocks)
    if rest and last == 0 and full > 1:
        full, last = full - 1, blocks
    sharing = isa.sharing if 0 < rest * isa.sharing <= isa.lanes else 1
    return Channels(blocks, full, last, outputs - (vectors - (last or blocks)) * isa.lanes, sharing)


def runs(count: int, tasks: int) -> tuple[int, int]:
    """`count` things in at most `tasks` equal runs: (length of a run, number of runs)."""
    length = -(-count // max(1, min(tasks, count)))
    return length, -(-count // length)


def steps_of(weight: np.ndarray, isa: Isa, channels: Channels, packed: bool) -> np.ndarray:
    """[G, O, KH, KW, I] as the weights of dot steps, [G, vectors, depth, lanes, group], zeros where padded. `packed`: see `lane_order`."""
    groups, outputs, kh, kw, inputs = weight.shape
    steps = -(-inputs // isa.group)
    padded = np.zeros((groups, channels.vectors * isa.lanes, kh, kw, steps * isa.group), weight.dtype)
    padded[:, :outputs, :, :, :inputs] = weight
    padded = padded[:, lane_order(isa, channels, packed)]
    by_block = padded.reshape(groups, channels.vectors, isa.lanes, kh * kw * steps, isa.group).transpose(0, 1, 3, 2, 4)
    return np.ascontiguousarray(by_block)


def pack(steps: np.ndarray, isa: Isa, channels: Channels) -> np.ndarray:
    """The weights of `steps_of` as read by tiles: per group and tile [depth][block][lane][group]."""
    groups, _, depth = steps.shape[:3]
    packed = isa.pack_weights(steps)  # [G, vectors, depth, lanes * group]
    tiles, full = [], channels.full * channels.blocks
    for begin, count, blocks in ((0, channels.full, channels.blocks), (full, int(channels.last > 0), channels.last)):
        if count:
            part = packed[:, begin : begin + count * blocks].reshape(groups, count, blocks, depth, -1)
            tiles.append(part.swapaxes(2, 3).reshape(groups, -1))
    return np.concatenate(tiles, axis=1).reshape(-1)


def pack_lanes(values: np.ndarray, isa: Isa, channels: Channels, groups: int, packed: bool) -> np.ndarray:
    """A per-channel table [O] in the order of accumulator lanes, zeros where padded."""
    padded = np.zeros((groups, channels.vectors * isa.lanes), values.dtype)
    padded[:, : values.size // groups] = values.reshape(groups, -1)
    return np.ascontiguousarray(padded[:, lane_order(isa, channels, packed)].reshape(-1))


def lane_order(isa: Isa, channels: Channels, packed: bool) -> np.ndarray:
    """The channel that each accumulator lane of a group computes. `packed`: runs of vectors are packed together (`Isa.channel_order`), else lanes lie
    in natural order."""
    order, start = [], 0
    for number, blocks, sharing in channels.tiles:
        for run in (packed_runs(blocks, sharing) if packed else [1] * blocks) * number:
            order.append(start + (isa.channel_order(run) if packed else np.arange(isa.lanes)))
            start += run * isa.lanes
    order[-1] = order[-1][np.arange(order[-1].size) % (order[-1].size // channels.sharing)]
    return np.concatenate(order)


def sorts_steps(geometry: Geometry, isa: Isa) -> bool:
    """Whether each step takes the cheapest form that its weights allow (`conv_steps`). Few steps all take the last form, and their loop is unrolled:
    their weights are wide, because the largest of a channel is always 127."""
    return len(isa.forms) > 1 and geometry.depth(isa.group) >= 16


def split_blocks(blocks: int) -> list[int]:
    """Runs of 4, 2 and 1 vectors: what the packing of the epilogue joins."""
    return [4] * (blocks // 4) + [2] * (blocks % 4 // 2) + [1] * (blocks % 2)


def packed_runs(blocks: int, sharing: int) -> list[int]:
    """`split_blocks` of a tile whose last vector is packed alone if several pixels share it."""
    return [*split_blocks(blocks - 1), 1] if sharing > 1 else split_blocks(blocks)


def cycles(geometry: Geometry, isa: Isa, rows: int, cols: int, blocks: int) -> float:
    """The model's estimate for the whole operator on one core, from throughputs of `isa` (inputs are taken to keep up).

    The epilogue of a tile overlaps the reduction of the next one as far as the core looks ahead, so many accumulators cost a little extra.
    """
    isa = isa if sorts_steps(geometry, isa) else isa.forms[-1]
    batch, height, width = geometry.pixels
    depth, pixels = geometry.depth(isa.group), rows * cols
    channels = cut_channels(geometry.outputs, isa, blocks)
    extra = 0.0 if geometry.residual is None else 2.5

    def tile(blocks: int, sharing: int) -> float:
        n = blocks - 1 + -(-pixels // sharing) / pixels  # vectors per pixel
        permuted = sum(run * {4: 0.0, 2: 0.2, 1: 0.3}[run] for run in packed_runs(blocks, sharing))
        epilogue = pixels * (isa.epilogue_cost * (n * (1 + extra) + permuted) + geometry.wraps)
        streamed = depth * blocks * isa.weight_bytes > 8 << 10  # a Zen 5 core: of 11 to 15 KB, two pixels a tile took 1.1 times as long as four
        return depth * isa.step_cycles(pixels, n, streamed) + epilogue + 0.6 * isa.dot_cost * max(0, pixels * n - 12) + 6

    count = batch * -(-height // rows) * -(-width // cols)
    return count * geometry.groups * sum(number * tile(*kind) for number, *kind in channels.tiles)


def best_tile(geometry: Geometry, isa: Isa, choice: Sequence[int] = (1, 2, 3, 4, 5, 6, 8)) -> tuple[int, int, int]:
    """(rows, cols, blocks) with the lowest estimate, blocks of `choice`."""
    height, width = geometry.pixels[1], geometry.widest
    vectors, form = -(-geometry.outputs // isa.lanes), isa if sorts_steps(geometry, isa) else isa.forms[-1]
    candidates = [
        (rows, cols, blocks)
        for blocks in choice
        if blocks <= vectors
        for rows in range(1, min(height, 8) + 1)
        for cols in range(1, min(width, isa.registers) + 1)
        if form.fits(rows * cols, blocks)
    ]
    return min(candidates, key=lambda c: (cycles(geometry, isa, *c), c[0], -c[1]))


def split_tasks(geometry: Geometry, isa: Isa, tile: tuple[int, int, int], total: float) -> tuple[int, int]:
    """(pixel_tasks, channel_tasks): one below 20000 cycles, else enough for 16 threads, cutting what is larger, weights or image.

    `total`: cycles of the operator. Weights of more than 256 KB are cut by channels, so that a task's share stays in a level 2 cache while its pixels pass.
    """
    wanted = min(32, int(total / 10000)) if total >= 20000 else 1
    if wanted == 1:
        return 1, 1
    batch, height, width = geometry.pixels
    rows, cols, blocks = tile
    pixels = batch * -(-height // rows) * -(-width // cols)
    channels = cut_channels(geometry.outputs, isa, blocks)
    units = geometry.groups if geometry.groups > 1 else channels.full
    weights = geometry.groups * channels.vectors * geometry.depth(isa.group) * isa.weight_bytes
    channel_tasks = runs(units, min(wanted, -(-weights // (256 << 10))))[1]
    return runs(pixels, max(1, -(-wanted // channel_tasks)))[1], channel_tasks


def default_tiling(geometry: Geometry, isa: Isa) -> Tiling:
    return tiling_of(geometry, isa, best_tile(geometry, isa))


def tiling_of(geometry: Geometry, isa: Isa, tile: tuple[int, int, int]) -> Tiling:
    """The heuristic's point among those of a tile."""
    pixel_tasks, channel_tasks = split_tasks(geometry, isa, tile, cycles(geometry, isa, *tile))
    # pixels outside write whole cache lines of the output at a time; channels outside keep the weights of an unrolled reduction at hand
    order = "pixels" if sorts_steps(geometry, isa) else "channels"
    return Tiling(*tile, order, default_unroll(geometry, isa), pixel_tasks, channel_tasks)


def default_unroll(geometry: Geometry, isa: Isa) -> int:
    """Up to `Isa.unrolled` steps, so that none are left over, and never so many that neighbouring pixels read the same elements:
    LLVM would load those once and keep them, at the price of the accumulators."""
    if sorts_steps(geometry, isa):
        return 1
    extent, step = geometry.loops(isa.group)[-1]
    most = max(1, min(isa.forms[-1].unrolled, geometry.strides[1] * geometry.x.channel_pitch // step, extent))
    if isa.span > 1:  # whole loads
        return min(isa.span, 1 << (most.bit_length() - 1))
    return next((u for u in range(most, most // 2, -1) if extent % u == 0), most)


def design_space(geometry: Geometry, isa: Isa) -> dict[str, list[Any]]:
    """Candidates of each tunable; combinations whose accumulators can't fit are refused by the kernel."""
    height, width = geometry.pixels[1], geometry.widest
    vectors = -(-geometry.outputs // isa.lanes)
    return {
        "rows": [r for r in (1, 2, 3, 4, 7) if r <= height],
        "cols": [c for c in range(1, isa.registers) if c <= width],
        "blocks": [b for b in (1, 2, 3, 4, 5, 6, 8) if b <= vectors],
        "order": ["channels", "pixels"],
        "unroll": [1] if sorts_steps(geometry, isa) else [1, 2, 4, 8],
        "pixel_tasks": [1, 2, 4, 8, 16, 32],
        "channel_tasks": [1, 2, 4, 8, 16, 32],
    }
