"""3x3 convolution by Winograd's F(2x2, 3x3) or F(4x4, 3x3) (`winograd_forms.py`), in exact integers, for ISAs that multiply 16-bit numbers anyway.

    task -> run of tile blocks -> B^T d B of a block -> channel tile -> G g G^T -> a matrix product per position -> A^T m A, epilogue

Transformed patches, weights and products lie in scratch, as int32 words (two int16 channels): one element type, because LLVM takes accesses
of different types for independent. Edge tiles are moved back, as in `conv_kernel`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.schedules import conv_plan as plan
from qcompiler.schedules.builder import when
from qcompiler.schedules.conv import ConvRow, wrap
from qcompiler.schedules.conv_epilogue import Epilogue
from qcompiler.schedules.conv_kernel import ConvKernel
from qcompiler.schedules.isa import Isa, call, load, save, scalar
from qcompiler.schedules.table import Kernel, Need, OpCall, kernel_key
from qcompiler.schedules.winograd_forms import FORMS, both_ways

L2_BYTES = 288 << 10  # of transformed patches: they, the transformed weights and the products share a level 2 cache of 512 KB
MAX_TASKS = 4  # every task has scratch of its own, and those that share patches transform them again


def tiles_of(g: plan.Geometry, m: int) -> int:
    """How many tiles of m x m outputs cover all images."""
    return g.pixels[0] * -(-g.pixels[1] // m) * -(-g.pixels[2] // m)


def parts_of(inputs: int, m: int) -> int:
    """In how many equal parts the channels are summed, each exact by itself; pairs of channels stay together."""
    return next(n for n in range(1, inputs // 2 + 1) if inputs // 2 % n == 0 and inputs // n <= FORMS[m].channels)


def odd_lines(words: int) -> int:
    """The least odd number of cache lines, in words, that holds `words`: positions at such a distance do not fall on one cache set."""
    return (-(-words // 16) | 1) * 16


@dataclass(frozen=True)
class WinogradTiling:
    """`tiles` and `blocks`: the register tile of the matrix products, in tiles and vectors of output channels. `block_tiles`: tiles whose
    transformed patches are held at once. `unroll`: channel pairs per iteration. Tasks as in `conv_plan.Tiling`. `form`: of `winograd_forms.FORMS`."""

    tiles: int
    blocks: int
    block_tiles: int
    unroll: int
    pixel_tasks: int
    channel_tasks: int
    form: int = 2

    def params(self) -> dict[str, Any]:
        return asdict(self)


class WinogradKernel(ConvKernel):
    """Emits the PrimFunc; the epilogue is that of `ConvKernel`."""

    def __init__(self, geometry: plan.Geometry, isa: Isa, tiling: WinogradTiling, epilogue: Epilogue) -> None:
        m = tiling.form
        super().__init__(geometry, isa, plan.Tiling(m, m, tiling.blocks, "pixels", 1, tiling.pixel_tasks, tiling.channel_tasks), epilogue)
        self.winograd, self.form, self.sorted = tiling, FORMS[m], False
        self.positions = self.form.inputs**2
        self.total = geometry.pixels[0] * self.tile_rows * self.tile_cols
        self.pairs = geometry.inputs // 2
        if not 1 <= tiling.tiles <= tiling.block_tiles <= self.total:
            raise ValueError(f"{tiling.tiles} tiles in registers, {tiling.block_tiles} in a block: the layer has {self.total}")
        if tiling.tiles * tiling.blocks + tiling.blocks + 2 > isa.registers:
            raise ValueError(f"{tiling.tiles} x {tiling.blocks} accumulators don't fit {isa.registers} registers")
        self.parts = parts_of(geometry.inputs, m)
        if self.pairs % (self.parts * tiling.unroll):
            raise ValueError(f"{self.pairs} channel pairs in {self.parts} parts are no multiple of {tiling.unroll}")
        self.tile_blocks = -(-self.total // tiling.block_tiles)
        self.pixel_run, self.pixel_tasks = plan.runs(self.tile_blocks, tiling.pixel_tasks)
        self.width = tiling.blocks * isa.lanes  # words of weights and products per channel pair and tile
        self.part = self.pairs // self.parts
        pitches = [odd_lines(s) for s in (tiling.block_tiles * self.pairs, self.part * self.width, tiling.block_tiles * self.width)]
        self.v_pitch, self.u_pitch, self.m_pitch = pitches  # words from one position to the next
        sizes = [self.positions * p for p in pitches]
        self.m_part = sizes[2]  # words from the products of one part of the channels to those of the next
        starts: list[int] = np.cumsum([0, *sizes[:2], self.parts * self.m_part]).tolist()
        self.v, self.u, self.m, self.words = starts

    @property
    def scratch(self) -> int:
        """Bytes per task."""
        return 4 * self.words

    @property
    def vector_weights(self) -> int:
        return 9 * self.g.inputs * self.isa.lanes

    def task(self, task: Any) -> None:
        pixel_task, channel_task = (task % self.pixel_tasks, task // self.pixel_tasks) if self.tasks > 1 else (0, 0)
        base = T.bind(tirx.const(0, "int32") + task * self.words)
        first = T.bind(tirx.const(0, "int32") + pixel_task * self.pixel_run)
        count = T.bind(T.min(tirx.const(self.pixel_run, "int32"), self.tile_blocks - first))
        first_channels = T.bind(tirx.const(0, "int32") + channel_task * self.channel_run)
        channels = T.bind(T.min(tirx.const(self.channel_run, "int32"), self.channel_units - first_channels))
        c = self.channels
        with T.serial(0, count) as i:
            tile = T.bind(T.min((first + i) * self.winograd.block_tiles, self.total - self.winograd.block_tiles))
            self.transform_patches(base, tile)
            with T.serial(0, channels) as j:
                self.channel_tile(base, tile, (first_channels + j) * c.blocks, c.blocks, c.last == 0 and c.full == 1)
            if c.last:
                with when(channel_task == self.channel_tasks - 1 if self.channel_tasks > 1 else None):
                    self.channel_tile(base, tile, tirx.const(c.full * c.blocks, "int32"), c.last, True)

    def place(self, tile: Any) -> tuple[Any, Any, Any]:
        """(image, row, column) of a tile's first output."""
        m, (_, height, width) = self.form.outputs, self.g.pixels
        row = T.bind(T.min(tile // self.tile_cols % self.tile_rows * m, height - m))
        col = T.bind(T.min(tile % self.tile_cols * m, width - m))
        return T.bind(tile // (self.tile_cols * self.tile_rows)) if self.g.pixels[0] > 1 else 0, row, col

    def transform_patches(self, base: Any, first: Any) -> None:
        """B^T d B of a block's tiles: [position][tile][channel pair]."""
        g, step, n = self.g, 2 * self.isa.lanes, self.form.inputs
        vectors = -(-g.inputs // step)
        with T.serial(0, self.winograd.block_tiles) as t:
            image, row, col = self.place(T.bind(first + t))
            x = T.bind(g.x.index(image, row - g.padding[0], col - g.padding[1], 0))
            to = T.bind(base + (self.v + t * self.pairs))
            with T.serial(0, vectors) as i:
                channel = T.bind(T.min(i * step, g.inputs - step))
                patch = [[self.patch(x + channel + (r * g.x.rows[1] + c) * g.x.channel_pitch) for c in range(n)] for r in range(n)]
                target = T.bind(to + channel // 2)
                for position, value in enumerate(v for line in both_ways(self.form.input, patch) for v in line):
                    words = T.reinterpret(f"int32x{self.isa.lanes}", value)
                    save(self.sums, target + position * self.v_pitch, words, self.isa.lanes)

    def patch(self, index: Any) -> Any:
        """int16 of a vector of stored channels, each less the form's offset."""
        step = 2 * self.isa.lanes
        bytes_ = load(self.x, index, step)
        if not self.form.offset:
            return T.bind(T.Cast(f"int16x{step}", bytes_))
        signed = T.reinterpret(f"int8x{step}", T.bitwise_xor(bytes_, scalar(self.form.offset, "uint8", step)))
        return T.bind(T.Cast(f"int16x{step}", signed))

    def channel_tile(self, base: Any, first: Any, vector: Any, blocks: int, ragged: bool) -> None:
        vector = T.bind(vector)
        with contextlib.ExitStack() as stack:
            part = stack.enter_context(T.serial(0, self.parts)) if self.parts > 1 else 0
            self.transform_weights(base, vector, blocks, part)
            self.multiply(base, blocks, part)
        self.finish(base, first, vector, blocks, ragged)

    def transform_weights(self, base: Any, vector: Any, blocks: int, part: Any) -> None:
        """G' g G'^T of `blocks` vectors and a part of the channels: [position][channel pair][block][lane]."""
        lanes, step = self.isa.lanes, 2 * self.isa.lanes
        with T.serial(0, self.part) as pair:
            for b in range(blocks):
                w = T.bind(((vector + b) * self.pairs + part * self.part + pair) * (9 * step))
                taps = [[T.bind(T.Cast(f"int16x{step}", load(self.w, w + (3 * r + c) * step, step))) for c in range(3)] for r in range(3)]
                to = T.bind(base + (self.u + pair * self.width + b * lanes))
                for position, value in enumerate(v for line in both_ways(self.form.weight, taps) for v in line):
                    save(self.sums, to + position * self.u_pitch, T.reinterpret(f"int32x{lanes}", value), lanes)

    def multiply(self, base: Any, blocks: int, part: Any) -> None:
        """One matrix product per position, over a part of the channels: [part][position][tile][block][lane]."""
        t, lanes = self.winograd, self.isa.lanes
        groups = -(-t.block_tiles // t.tiles)
        with T.serial(0, self.positions) as position:
            u = T.bind(base + (self.u + position * self.u_pitch))
            with T.serial(0, groups) as group:
                tile = T.bind(T.min(group * t.tiles, t.block_tiles - t.tiles))
                v = T.bind(base + (self.v + position * self.v_pitch + tile * self.pairs + part * self.part))
                accs = [[T.alloc_buffer((lanes,), "int32") for _ in range(blocks)] for _ in range(t.tiles)]
                for line in accs:
                    for acc in line:
                        save(acc, 0, T.broadcast(tirx.const(0, "int32"), lanes), lanes)

                def steps(vi: Any, ui: Any, accs: Any = accs) -> None:
                    for s in range(t.unroll):
                        weights = [T.bind(self.words_at(ui + s * self.width + b * lanes)) for b in range(blocks)]
                        for i, line in enumerate(accs):
                            x = T.bind(T.reinterpret(f"int16x{2 * lanes}", T.broadcast(self.sums[vi + (i * self.pairs + s)], lanes)))
                            for acc, w in zip(line, weights, strict=True):
                                save(acc, 0, self.form.add(load(acc, 0, lanes), self.products(x, w)), lanes)

                with T.serial(0, self.part // t.unroll) as k:
                    steps(T.bind(v + k * t.unroll), T.bind(u + k * (t.unroll * self.width)))
                m = T.bind(base + (self.m + part * self.m_part + position * self.m_pitch + tile * self.width))
                for i, line in enumerate(accs):
                    for b, acc in enumerate(line):
                        save(self.sums, m + (i * self.width + b * lanes), load(acc, 0, lanes), lanes)

    def words_at(self, index: Any) -> Any:
        return T.reinterpret(f"int16x{2 * self.isa.lanes}", load(self.sums, index, self.isa.lanes))

    def products(self, x: Any, w: Any) -> Any:
        """VPMADDWD."""
        name = "llvm.x86.avx512.pmaddw.d.512" if self.isa.lanes == 16 else "llvm.x86.avx2.pmadd.wd"
        return call(f"int32x{self.isa.lanes}", name, x, w)

    def finish(self, base: Any, first: Any, vector: Any, blocks: int, ragged: bool) -> None:
        """A^T m A, the scale taken back, the bias, and the epilogue."""
        g, lanes, t, n = self.g, self.isa.lanes, self.winograd, self.form.inputs
        store = self.finish_packed if self.epilogue.packed else self.finish_wide
        with T.serial(0, t.block_tiles) as i:
            image, row, col = self.place(T.bind(first + i))
            m = T.bind(base + (self.m + i * self.width))
            values: list[list[Any]] = [[] for _ in self.offsets]
            for b in range(blocks):
                bias = T.bind(load(self.bias, (vector + b) * lanes, lanes))
                parts = []
                for part in range(self.parts):
                    at = m + (part * self.m_part + b * lanes)
                    products = [[T.bind(load(self.sums, at + (r * n + c) * self.m_pitch, lanes)) for c in range(n)] for r in range(n)]
                    parts.append([self.form.finish(v) for row in both_ways(self.form.output, products) for v in row])
                for line, summands in zip(values, zip(*parts, strict=True), strict=True):
                    line.append(T.bind(sum(summands[1:], summands[0]) + bias))
            channel = vector * lanes
            out = T.bind(g.out.index(image, row, col, channel))
            residual = T.bind(g.residual.index(image, row, col, channel)) if g.residual else None
            store(values, vector, out, residual, self.channels.valid if ragged else blocks * lanes)


def pack(weight: np.ndarray, isa: Isa, channels: plan.Channels, packed: bool) -> np.ndarray:
    """[O, 3, 3, C] as [vector][channel pair][tap][lane][2], lanes as `conv_plan.lane_order` says."""
    outputs, _, _, inputs = weight.shape
    padded = np.zeros((channels.vectors * isa.lanes, 9, inputs // 2, 2), np.int8)
    padded[:outputs] = weight.reshape(outputs, 9, inputs // 2, 2)
    ordered = padded[plan.lane_order(isa, channels, packed)].reshape(channels.vectors, isa.lanes, 9, inputs // 2, 2)
    return np.ascontiguousarray(ordered.transpose(0, 3, 2, 1, 4).reshape(-1))


class WinogradRow(ConvRow):
    """`qc.conv2d` with 3x3 kernels, strides and dilation of 1 and enough channels."""

    def __init__(self, unit: Isa, isa: str) -> None:
        super().__init__("qc.conv2d", unit, isa)
        self.name = f"{isa}/winograd"

    def refuse(self, op: OpCall, target: Target) -> str | None:
        reason = super().refuse(op, target)
        if reason is not None:
            return reason
        g = plan.geometry_of(op)
        if g.kernel != (3, 3) or g.strides != (1, 1) or g.dilation != (1, 1) or g.groups != 1:
            return "only 3x3 kernels with strides and dilation of 1 and one group."
        least = 2 * self.unit.lanes
        if g.inputs % 2 or min(g.inputs, g.outputs) < least:
            return f"{g.inputs} input and {g.outputs} output channels; needed: an even number of inputs, and {least} of both."
        if min(g.pixels[1:]) < 2:
            return "the image is smaller than a tile."
        if min(self.work(g, form) for form in self.forms(g)) > 0.8 * g.macs:
            return "the transforms and ragged tiles would cost what they save."
        return None

    def forms(self, g: plan.Geometry) -> list[int]:
        """Those with tiles no larger than the image."""
        return [m for m in FORMS if m <= min(g.pixels[1:])]

    def work(self, g: plan.Geometry, m: int) -> float:
        """Multiplications, and the transforms' instructions counted as such (a VPMADDWD and its addition stand for 2 x lanes)."""
        lanes, form = self.unit.lanes, FORMS[m]
        tiles = tiles_of(g, m)
        outputs = -(-g.outputs // lanes) * lanes
        patches = tiles * g.inputs / (2 * lanes) * form.operations[0]  # per vector of channels
        weights = g.inputs / 2 * outputs / lanes * form.operations[1] * max(1.0, tiles / 64)
        products = tiles * outputs / lanes * form.operations[2] * parts_of(g.inputs, m)
        return tiles * form.inputs**2 * g.inputs * outputs + (patches + weights + products) * lanes

    def geometry(self, op: OpCall) -> tuple[plan.Geometry, int]:
        return plan.geometry_of(op), 1

    def needs(self, op: OpCall, target: Target) -> list[Need]:
        return [Need(halo=plan.geometry_of(op).halo()), *[Need() for _ in op.tensors[1:]]]

    def default(self, op: OpCall, target: Target) -> dict[str, Any]:
        g = plan.geometry_of(op)
        return self.point(g, min(self.forms(g), key=lambda m: self.work(g, m)))

    def alike(self, ops: Sequence[OpCall], target: Target) -> list[dict[str, Any]]:
        """Weights are transformed by the form, which is chosen for each shape."""
        return [self.default(op, target) for op in ops]

    def point(self, g: plan.Geometry, form: int) -> dict[str, Any]:
        """The heuristic's point among those of one form."""
        total = tiles_of(g, form)
        blocks = min(2, -(-g.outputs // self.unit.lanes))
        most = (self.unit.registers - blocks - 2) // blocks
        count = max(1, round(total * FORMS[form].inputs ** 2 * g.inputs * 2 / L2_BYTES))  # of blocks of tiles
        block_tiles = min(total, max(most, -(-total // count)))
        tiles = min(range(1, min(most, block_tiles) + 1), key=lambda t: -(-block_tiles // t) * (t * blocks + 1))
        wanted = max(1, min(MAX_TASKS, int(self.work(g, form) / 1_000_000)))
        pixel_tasks = plan.runs(-(-total // block_tiles), wanted)[1]
        channel_tasks = plan.runs(max(1, -(-g.outputs // (self.unit.lanes * blocks))), -(-wanted // pixel_tasks))[1]
        unroll = 2 if g.inputs // parts_of(g.inputs, form) % 4 == 0 else 1
        return WinogradTiling(tiles, blocks, block_tiles, unroll, pixel_tasks, channel_tasks, form).params()

    def space(self, op: OpCall, target: Target) -> dict[str, list[Any]]:
        g = plan.geometry_of(op)
        forms = self.forms(g)
        total = tiles_of(g, min(forms))
        return {
            "form": forms,
            "tiles": [n for n in range(1, self.unit.registers - 2) if n <= total],
            "blocks": [1, 2, 3],
            "block_tiles": sorted({min(n, total) for n in (8, 12, 16, 18, 24, 32, 48, 49, 64, 96, 128, 196)}),
            "unroll": [n for n in (1, 2, 4) if g.inputs // 2 % n == 0],
            "pixel_tasks": [1, 2, 4, 8, 16],
            "channel_tasks": [1, 2, 4, 8],
        }

    def build(self, op: OpCall, params: Mapping[str, Any], target: Target) -> Kernel:
        geometry, tiling, epilogue = plan.geometry_of(op), WinogradTiling(**params), self.epilogue(op)
        emitter = WinogradKernel(geometry, self.unit, tiling, epilogue)
        weight, bias, multiplier = (np.asarray(o) for o in op.operands[1:4])
        shift = int(op.attrs["x_zero_point"]) + self.unit.storage_offset - FORMS[tiling.form].offset
        folded = wrap(bias.astype(np.int64) - shift * weight.astype(np.int64).sum(axis=(1, 2, 3)))
        constants = [pack(weight, self.unit, emitter.channels, epilogue.packed)]
        sums = plan.pack_lanes(folded, self.unit, emitter.channels, 1, epilogue.packed)
        constants += [sums, self.multipliers(multiplier, emitter, 1), self.parameters(op)]
        key = kernel_key("winograd", self.unit, geometry, tiling, epilogue)
        return Kernel(emitter.build, emitter.tasks, constants, key, self.name, emitter.tasks * emitter.scratch, geometry.macs, tiling.params())
