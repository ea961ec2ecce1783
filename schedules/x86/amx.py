"""Convolution and dense layers on AMX: the reduction in tile registers, everything else as `ConvKernel` has it.

    C[m, n] += sum(A[m, k] * B[n, k] for k in range(64))        TDPBUSD: m, n < 16, uint8 times int8, exact in int32

A tile register has up to 16 rows of 64 bytes; eight of them are shared out once per task (LDTILECFG). Rows of an A tile are output pixels that are
neighbours in a row of the image: their inputs lie at one stride, so A is loaded from the image itself. A B tile is packed at compile time,
[k / 4][16 channels][4]. A register tile is a few A tiles times a few B tiles, all of whose products stay in C tiles. With 2 x 2, the most:

    C 0..3: TILEZERO; then per chunk of the reduction load 2 A and 2 B, multiply 4 times; TILESTORED; bias and epilogue by AVX512

The bias joins in the epilogue, where an addition takes half a cycle a vector. As 16 rows of it, loaded into a tile with stride 0, it waits for the stores
of the tile before: MobileNetV2's layers took 0.7 to 0.95 of the time without, ResNet-50's about the same.

The reduction over what is contiguous in the image (the channels, or a row of the kernel with its channels) is cut into equal chunks of at most 64
bytes. The last one is moved back over bytes that the one before it has multiplied, which meet zero weights, so no load leaves a pixel's bytes.

The kernel of Linux gives a process tiles only on request: qc_threads.c asks when a session is created.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.schedules import conv_plan as plan
from qcompiler.schedules.builder import when
from qcompiler.schedules.conv import ConvRow
from qcompiler.schedules.conv_epilogue import Epilogue
from qcompiler.schedules.conv_kernel import ConvKernel
from qcompiler.schedules.isa import load
from qcompiler.schedules.table import Kernel, Need, OpCall, register
from qcompiler.schedules.x86 import isa

ROWS, BYTES, REGISTERS = 16, 64, 8
LEAST_PIXELS = 4  # fewer rows take no less time; with 4 a tile multiplication is more than two VPDPBUSD a cycle
LEAST_STEPS = 7  # of VPDPBUSD: below, sums in vector registers take less time than their way through tiles and memory (measured: 0.8x and 0.9x for 4 and 6)
MULTIPLY, LOAD_ROW, LOAD_B, BESIDE = (4, 0.75, 9.25), 0.51, 21, 0.27
"""Cycles, as a Xeon of 4.1 GHz has them where TDPBUSD takes 16: of TDPBUSD (and more per row of A; at the least), of a load of an A tile per row (from
the level 1 cache), of a B tile (from the level 2 cache); the share of products and loads, whichever take less time, that the others don't hide."""
EPILOGUE, STORE = (1.4, 0.4), 20
"""Cycles per vector of results (and more, where their number is odd), and per tile of sums; with the constants above they choose tilings of 1.024 times the
least time of those measured for the layers of ResNet-50 and MobileNetV2."""
AWAKE = 32
"""Products after which a tile is stored for nothing. Measured on that Xeon: a TILESTORED that comes more than some 0.6 us (116 to 140 products, 90 where A lies
in the level 2 cache too) after the last one takes 0.3 us longer, whatever it stores; 2 x 2 sums over 36 chunks take 0.77 of the time with one in between."""
UNIT = dataclasses.replace(isa.AVX512VNNI, name="x86-amx", sharing=1)  # for the epilogue


# -- what is multiplied ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunks:
    """The reduction over one output pixel: `spans` runs of `length` contiguous bytes, each cut into `count` chunks of `size` bytes.

    `loops`: (extent, step in bytes) of the runs, outermost first. `merged`: a run is a row of the kernel, not a pixel.
    """

    loops: tuple[tuple[int, int], ...]
    length: int
    count: int
    size: int
    merged: bool

    @property
    def spans(self) -> int:
        return math.prod(extent for extent, _ in self.loops)

    @property
    def total(self) -> int:
        return self.spans * self.count

    def offset(self, chunk: Any) -> Any:
        """Where a chunk starts in its run."""
        last = max(self.length - self.size, 0)
        return T.min(chunk * self.size, last) if self.count > 1 else 0

    @staticmethod
    def of(g: plan.Geometry) -> Chunks:
        pitch = g.x.channel_pitch
        rows, cols = (g.kernel[0], g.dilation[0] * g.x.rows[1] * pitch), (g.kernel[1], g.dilation[1] * pitch)
        forms = [([rows, cols], g.inputs, False)]
        if g.dilation[1] == 1:
            forms.append(([rows], (g.kernel[1] - 1) * pitch + g.inputs, True))
        made = []
        for loops, length, merged in forms:
            count = -(-length // BYTES)
            size = 4 * -(-length // (4 * count))
            made.append(Chunks(tuple(v for v in loops if v[0] > 1), length, count, size, merged))
        return min(made, key=lambda c: c.total)

    def cut(self, weight: np.ndarray, pitch: int) -> np.ndarray:
        """[O, KH, KW, I] as [O, total, size], zero wherever a chunk reads what is not its to multiply."""
        outputs, kh, kw, inputs = weight.shape
        if self.merged:
            wide = np.zeros((outputs, kh, kw, pitch), weight.dtype)
            wide[..., :inputs] = weight
            runs = wide.reshape(outputs, kh, kw * pitch)[..., : self.length]
        else:
            runs = weight.reshape(outputs, kh * kw, inputs)
        result = np.zeros((*runs.shape[:2], self.count, self.size), weight.dtype)
        for c in range(self.count):
            begin, end = c * self.size, min((c + 1) * self.size, self.length)
            start = begin if self.count == 1 else min(begin, self.length - self.size)
            result[:, :, c, begin - start : end - start] = runs[..., begin:end]
        return result.reshape(outputs, self.total, self.size)


# -- the kernel -----------------------------------------------------------------------------------------------------------------------------


def emit(name: str, *args: Any) -> None:
    """A tile instruction. Tiles are numbers in it, no values: LLVM keeps such instructions in order."""
    T.evaluate(T.call_llvm_intrin("void", f"llvm.x86.{name}", *args))


def number(register: int) -> Any:
    return tirx.const(register, "int8")


def columns(cols: int) -> tuple[int, int]:
    """(tiles, pixels of a tile) that `cols` pixels of a row make."""
    tiles = -(-cols // ROWS)
    return tiles, cols // tiles


class TileKernel(ConvKernel):
    """A tiling's `rows` x `cols` pixels are A tiles of up to 16 pixels of a row; its `blocks` are B tiles."""

    def __init__(self, geometry: plan.Geometry, tiling: plan.Tiling, epilogue: Epilogue) -> None:
        super().__init__(geometry, UNIT, tiling, epilogue)
        self.across, self.width = columns(tiling.cols)
        self.tiles = tiling.rows * self.across
        if self.width * self.across != tiling.cols:
            raise ValueError(f"{tiling.cols} pixels are not {self.across} equal tiles of at most {ROWS}")
        if not fits(self.tiles, tiling.blocks):
            raise ValueError(f"{self.tiles} x {tiling.blocks} products and their operands don't fit {REGISTERS} tile registers")
        self.chunks = Chunks.of(geometry)
        self.step = min(4, self.width)  # pixels of a round of the epilogue
        self.offsets = [(0, c) for c in range(self.step)]

    @property
    def scratch(self) -> int:
        return self.tiles * self.tiling.blocks * ROWS * ROWS * 4

    @property
    def vector_weights(self) -> int:
        return self.chunks.total * self.chunks.size * ROWS

    def task(self, task: Any) -> None:
        """The configuration (palette 1: eight tiles) lasts for the task, so tasks of different kernels may share a thread."""
        c, a = self.tiles * self.tiling.blocks, self.tiles
        rows, row_bytes = np.zeros(16, np.uint8), np.zeros(16, np.uint16)
        rows[: c + a], rows[c + a : c + a + self.tiling.blocks] = self.width, self.chunks.size // 4
        row_bytes[:c], row_bytes[c : c + a], row_bytes[c + a : c + a + self.tiling.blocks] = BYTES, self.chunks.size, BYTES
        words = np.concatenate([np.array([1] + [0] * 15, np.uint8), row_bytes.view(np.uint8), rows]).view(np.int32)
        config = T.alloc_buffer((BYTES // 4,), "int32")
        for i, word in enumerate(words.tolist()):
            T.buffer_store(config, tirx.const(word, "int32"), [i])
        emit("ldtilecfg", T.address_of(config[0]))
        self.results = T.bind(task * (self.scratch // 4))  # where this task's sums lie
        super().task(task)
        emit("tilerelease")

    def tile(self, group: Any, block: Any, blocks: int, pixel: Any, ragged: bool) -> None:
        g, chunks = self.g, self.chunks
        image, row, col = self.place(pixel)
        x = T.bind(g.x.index(image, row * g.strides[0] - g.padding[0], col * g.strides[1] - g.padding[1], 0))
        w = T.bind(block * self.vector_weights)
        line, apart = g.x.rows[1] * g.x.channel_pitch * g.strides[0], g.strides[1] * g.x.channel_pitch
        tiles = [(r, c * self.width) for r in range(self.tiling.rows) for c in range(self.across)]
        pairs = list(product(range(self.tiles), range(blocks)))
        first_a = self.tiles * self.tiling.blocks
        first_b = first_a + self.tiles

        def sums(i: int, b: int) -> Any:
            return number(i * self.tiling.blocks + b)

        for i, b in pairs:
            emit("tilezero", sums(i, b))

        results = [[self.results + (i * blocks + b) * ROWS * ROWS for b in range(blocks)] for i in range(self.tiles)]
        loops = [*chunks.loops, (chunks.count, 0)]
        inside = [math.prod(e for e, _ in loops[level + 1 :]) for level in range(len(loops))]  # chunks of an iteration
        level_awake = next(level for level, n in enumerate(inside) if n * len(pairs) <= AWAKE)
        period = AWAKE // (inside[level_awake] * len(pairs))  # iterations of that loop, then a tile is stored

        def nest(level: int, x: Any, w: Any) -> None:
            if level == len(loops):
                for b in range(blocks):
                    emit("tileloadd64", number(first_b + b), T.address_of(self.w[w + b * (chunks.size * ROWS)]), tirx.const(BYTES, "int64"))
                    for i, (r, c) in enumerate(tiles):
                        if b == 0:
                            emit("tileloadd64", number(first_a + i), T.address_of(self.x[x + (r * line + c * apart)]), tirx.const(apart, "int64"))
                        emit("tdpbusd", sums(i, b), number(first_a + i), number(first_b + b))
                return
            extent, step = loops[level]
            if extent == 1:
                nest(level + 1, x, w)
                return
            with T.serial(0, extent) as k:
                move = k * step if level + 1 < len(loops) else chunks.offset(k)
                nest(level + 1, T.bind(x + move), T.bind(w + k * (inside[level] * blocks * chunks.size * ROWS)))
                if level == level_awake and chunks.total * len(pairs) > 2 * AWAKE:
                    with when(k % period == period - 1 if period > 1 else None):
                        emit("tilestored64", number(first_b), T.address_of(self.sums[results[0][0]]), tirx.const(BYTES, "int64"))

        nest(0, x, w)
        for i, b in pairs:
            emit("tilestored64", sums(i, b), T.address_of(self.sums[results[i][b]]), tirx.const(BYTES, "int64"))
        out = T.bind(g.out.index(image, row, col, block * ROWS))
        residual = T.bind(g.residual.index(image, row, col, block * ROWS)) if g.residual else None
        for (r, c), result in zip(tiles, results, strict=True):
            self.finish(result, block, out, residual, r, c, self.channels.valid if ragged else blocks * ROWS)

    def finish(self, results: list[Any], block: Any, out: Any, residual: Any, row: int, col: int, valid: int) -> None:
        """The epilogue of one A tile, a few pixels at a time; the last ones are moved back over pixels that are done."""
        store = self.finish_packed if self.epilogue.packed else self.finish_wide
        bias = [T.bind(load(self.bias, (block + b) * ROWS, ROWS)) for b in range(len(results))]

        def place(start: Any, layout: Any, pixel: Any) -> Any:
            return T.bind(start + (row * layout.rows[1] + col + pixel) * layout.channel_pitch)

        with T.serial(0, -(-self.width // self.step)) as i:
            pixel = T.bind(T.min(i * self.step, self.width - self.step))
            values = [[T.bind(load(self.sums, r + (pixel + p) * ROWS, ROWS) + v) for r, v in zip(results, bias, strict=True)] for p in range(self.step)]
            at = place(residual, self.g.residual, pixel) if self.g.residual else None
            store(values, block, place(out, self.g.out, pixel), at, valid)


# -- rows -----------------------------------------------------------------------------------------------------------------------------------


def fits(tiles: int, blocks: int) -> bool:
    return tiles * blocks + tiles + blocks <= REGISTERS


class AmxRow(ConvRow):
    """Convolution and dense layers without groups; the unroll of a tiling is always 1."""

    def refuse(self, op: OpCall, target: Target) -> str | None:
        reason = super().refuse(op, target)
        if reason is not None:
            return reason
        geometry = plan.geometry_of(op)
        if geometry.groups > 1:
            return f"the convolution has {geometry.groups} groups; supported: 1."
        if self.operator.endswith("dense") and geometry.inputs < BYTES and geometry.inputs % 4:
            return f"a row has {geometry.inputs} inputs; supported: multiples of 4, and at least {BYTES}."
        if geometry.depth(UNIT.group) < LEAST_STEPS:
            return f"an output sums {geometry.depth(UNIT.group) * UNIT.group} products; tiles pay from {LEAST_STEPS * UNIT.group} on."
        if geometry.pixels[2] < LEAST_PIXELS:
            return f"{geometry.pixels[2]} output pixels lie in a row; tiles pay from {LEAST_PIXELS} on."
        return None

    def geometry(self, op: OpCall) -> tuple[plan.Geometry, int]:
        return plan.geometry_of(op), 1

    def needs(self, op: OpCall, target: Target) -> list[Need]:
        """A chunk, a multiple of 4 bytes, stays within a pixel."""
        if self.operator.endswith("dense"):
            return super().needs(op, target)
        return [Need(halo=self.geometry(op)[0].halo(), pitch=4), *[Need() for _ in op.tensors[1:]]]

    def space(self, op: OpCall, target: Target) -> dict[str, list[Any]]:
        g = self.geometry(op)[0]
        _, height, width = g.pixels
        return {
            "rows": [r for r in (1, 2, 3) if r <= height],
            "cols": [c for c in range(1, 3 * ROWS + 1) if c <= width and c % -(-c // ROWS) == 0],
            "blocks": [b for b in (1, 2, 3) if b <= -(-g.outputs // ROWS)],
            "order": ["channels", "pixels"],
            "unroll": [1],
            "pixel_tasks": [1, 2, 4, 8, 16, 32],
            "channel_tasks": [1, 2, 4, 8, 16, 32],
        }

    def default(self, op: OpCall, target: Target) -> dict[str, Any]:
        g, space = self.geometry(op)[0], self.space(op, target)
        points = product(space["rows"], space["cols"], space["blocks"])
        best = min((p for p in points if fits(p[0] * columns(p[1])[0], p[2])), key=lambda p: (cycles(g, *p), p))
        pixel_tasks, channel_tasks = plan.split_tasks(g, self.unit, best, cycles(g, *best))
        return plan.Tiling(*best, "pixels", 1, pixel_tasks, channel_tasks).params()

    def kernel(self, geometry: plan.Geometry, tiling: plan.Tiling, epilogue: Epilogue) -> ConvKernel:
        return TileKernel(geometry, tiling, epilogue)

    def pack(self, weight: np.ndarray, emitter: ConvKernel) -> tuple[list[np.ndarray], np.ndarray]:
        chunks, channels = Chunks.of(emitter.g), emitter.channels
        padded = np.zeros((channels.vectors * ROWS, *weight.shape[2:]), weight.dtype)
        padded[: weight.shape[1]] = weight[0]
        cut = chunks.cut(padded[plan.lane_order(self.unit, channels, emitter.epilogue.packed)], emitter.g.x.channel_pitch)
        steps = cut.reshape(1, channels.vectors, ROWS, chunks.total, chunks.size // 4, 4).transpose(0, 1, 3, 4, 2, 5)
        packed = plan.pack(np.ascontiguousarray(steps).reshape(1, channels.vectors, chunks.total, -1, 4), self.unit, channels)
        return [packed], np.zeros((1, channels.vectors * ROWS), np.int64)

    def build(self, op: OpCall, params: Mapping[str, Any], target: Target) -> Kernel:
        g = self.geometry(op)[0]
        chunks, pitch = Chunks.of(g), g.x.channel_pitch
        if chunks.size - chunks.length > pitch - g.inputs:
            raise ValueError(f"the input has a pitch of {pitch} channels; supported: multiples of 4")
        return super().build(op, params, target)


def cycles(g: plan.Geometry, rows: int, cols: int, blocks: int) -> float:
    """An estimate of the whole operator on one core, by which tilings are ranked."""
    chunks, (across, rows_of_a) = Chunks.of(g), columns(cols)
    tiles = rows * across
    channels = plan.cut_channels(g.outputs, UNIT, blocks)

    def one(b: int) -> float:
        products = tiles * b * max(MULTIPLY[2], MULTIPLY[0] + MULTIPLY[1] * rows_of_a)
        loads = LOAD_ROW * rows_of_a * tiles + LOAD_B * b * chunks.size / BYTES
        epilogue = (EPILOGUE[0] + EPILOGUE[1] * (b % 2)) * rows * cols * b
        return chunks.total * (max(products, loads) + BESIDE * min(products, loads)) + epilogue + STORE * tiles * b

    batch, height, width = g.pixels
    count = batch * -(-height // rows) * -(-width // cols)
    return count * (channels.full * one(blocks) + (one(channels.last) if channels.last else 0))


for _kind in ("conv2d", "dense"):
    register(f"qc.{_kind}", AmxRow(f"qc.{_kind}", UNIT, UNIT.name))
