"""Depthwise 8-bit convolution on x86: kernel taps, not input channels, fill the dot instruction.

Vectors run along channels. A bundle of up to four input pixels (`depthwise_taps`) is interleaved channel by channel with byte unpacks, so that one
VPDPBUSD does 4 taps x 16 channels; a bundle serves every output of the register tile that touches it. Unpacks work within 128-bit parts and
spread the channels of a vector of B bytes over four vectors:

    slot k, dword 4 * part + i  <->  channel 16 * part + 4 * k + i          (part < B / 16, i < 4)

Weights, bias and multipliers are packed in that order at compile time, and the epilogue's VPACKSSDW and VPACKUSWB, which work within parts too, undo it.
Without VNNI two taps are interleaved, widened to int16 and summed by VPMADDWD (exact; VPMADDUBSW would saturate).

The epilogue clamps after rounding: bounds are integers and rint is monotone, so clip(rint(v), low - z, high - z) == rint(clip(v, low - z, high - z)),
and the saturation of the packs does most of it. That needs |v| < 2^31 (VCVTPS2DQ), which the weights prove at compile time; where they can't, a clip in
float comes first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.schedules.builder import Emitter, loops, make_kernel
from qcompiler.schedules.table import Kernel, Layout, Need, OpCall, register
from qcompiler.schedules.x86.depthwise_taps import TapPlan, plan_taps
from qcompiler.schedules.x86.isa import call, load, save, scalar, shuffle
from qcompiler.targets import Target

_INT32_LIMIT = 2.0**30  # bound on |acc * multiplier| below which no conversion to int32 can overflow


@dataclass(frozen=True)
class Geometry:
    """The numbers of a depthwise convolution, whatever its type."""

    batch: int
    channels: int
    out: tuple[int, int]
    kernel: tuple[int, int]
    strides: tuple[int, int]
    dilation: tuple[int, int]
    padding: tuple[int, int, int, int]

    @staticmethod
    def of(op: OpCall) -> Geometry:
        n, oh, ow, channels = op.output.shape
        _, kh, kw, _ = op.operands[1].shape
        (sy, sx), (dy, dx), (t, l, b, r) = op.attrs["strides"], op.attrs["dilation"], op.attrs["padding"]
        return Geometry(n, channels, (oh, ow), (kh, kw), (sy, sx), (dy, dx), (t, l, b, r))

    @property
    def macs(self) -> int:
        return self.batch * math.prod(self.out) * self.channels * math.prod(self.kernel)


def refuse_depthwise(op: OpCall) -> str | None:
    """Why `op` is no depthwise convolution that these rows take: shapes only."""
    if not isinstance(op.operands[0], Layout) or any(isinstance(o, Layout) for o in op.operands[1:4]):
        return "the input must be computed at run time, and weights, bias and multiplier constant."
    groups, channels, outputs = op.attrs["groups"], op.operands[0].shape[3], op.output.shape[3]
    if not groups == channels == outputs:
        return f"groups ({groups}), input channels ({channels}) and output channels ({outputs}) must be equal."
    return None


def blocks_of(channels: int, widths: Sequence[int]) -> list[tuple[int, int]]:
    """(first channel, width) of the vectors that cover `channels`; a last one may overlap the one before it, or, alone, exceed the channels."""
    blocks, at = [], 0
    for width in widths:
        while channels - at >= width:
            blocks.append((at, width))
            at += width
        rest = channels - at
        if rest and (width == widths[-1] or (rest > width * 3 // 4 and channels >= width)):
            blocks.append((max(channels - width, 0), width))
            break
        if not rest:
            break
    return blocks


@dataclass(frozen=True)
class Tasks:
    """Tasks are (image, chunk of row tiles, chunk of the full-width channel blocks); narrower blocks belong to the last channel chunk."""

    images: int
    rows: int  # row tiles in all
    row_chunks: int
    channel_chunks: int

    @staticmethod
    def of(g: Geometry, tile_rows: int, full_blocks: int, rows_per_task: int, blocks_per_task: int) -> Tasks:
        tiles = -(-g.out[0] // tile_rows)
        chunks = max(1, tiles // max(1, rows_per_task))
        if chunks == tiles > 1 and g.out[0] % tile_rows:
            chunks -= 1  # the last tile overlaps the one before it: one task must write both
        return Tasks(g.batch, tiles, chunks, max(1, full_blocks // max(1, blocks_per_task)))

    @property
    def count(self) -> int:
        return self.images * self.row_chunks * self.channel_chunks


def chunk_bounds(index: Any, chunks: int, extent: int) -> tuple[Any, Any]:
    """[begin, end) of part `index` of `extent` items in `chunks` parts whose sizes differ by at most one."""
    if chunks == 1:
        return T.int32(0), T.int32(extent)
    return T.bind(T.floordiv(index * extent, chunks)), T.bind(T.floordiv((index + 1) * extent, chunks))


@dataclass(frozen=True)
class ByteIsa:
    """`widths`: vector bytes, widest first. `taps`: pixels per bundle, 4 with VPDPBUSD, 2 with VPMADDWD."""

    name: str
    widths: tuple[int, ...]
    taps: int

    def interleave(self, pixels: Sequence[Any], half: int) -> list[Any]:
        """Slots 2 * half and 2 * half + 1 of a bundle: [channel][tap] bytes (words without VNNI)."""
        n = 64 if "64" in str(pixels[0].ty.dtype) else 32 if "32" in str(pixels[0].ty.dtype) else 16
        taps = [*pixels, *[pixels[-1]] * (self.taps - len(pixels))]  # weights of absent taps are 0: any value will do
        pairs = [T.bind(unpack(taps[i], taps[i + 1], n, 1, half)) for i in range(0, self.taps, 2)]
        if self.taps == 4:
            return [T.bind(unpack(pairs[0], pairs[1], n, 2, side)) for side in (0, 1)]
        return [T.bind(T.reinterpret(f"int16x{n // 2}", unpack(pairs[0], scalar(0, "int8", n), n, 1, side))) for side in (0, 1)]

    def dot(self, acc: Any, x: Any, w: Any, width: int) -> Any:
        if self.taps == 4:
            return call(f"int32x{width // 4}", f"llvm.x86.avx512.vpdpbusd.{8 * width}", acc, x, w)
        return acc + call(f"int32x{width // 4}", {32: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.sse2.pmadd.wd"}[width], x, w)


def unpack(a: Any, b: Any, width: int, size: int, half: int) -> Any:
    """VPUNPCK{L,H} of elements of `size` bytes: alternating elements of the low (high) halves of each 128-bit part."""
    per = 8 // size
    order = [
        side * width + 16 * part + 8 * half + size * e + byte for part in range(width // 16) for e in range(per) for side in (0, 1) for byte in range(size)
    ]
    return shuffle([a, b], order)


def channel_order(width: int) -> np.ndarray:
    """[4, width / 4]: the channel (of a block of `width`) in each lane of each slot."""
    part, i = np.divmod(np.arange(width // 4), 4)
    return np.stack([16 * part + 4 * slot + i for slot in range(4)])


def to_int(value: Any, width: int) -> Any:
    """float32 lanes to int32, ties to even; out of range gives INT32_MIN."""
    lanes = width // 4
    if width == 64:
        rounding = tirx.const(4, "int32")  # the current mode, which is to nearest even
        return call("int32x16", "llvm.x86.avx512.mask.cvtps2dq.512", value, scalar(0, "int32", 16), tirx.const(-1, "int16"), rounding)
    return call(f"int32x{lanes}", {32: "llvm.x86.avx.cvt.ps2dq.256", 16: "llvm.x86.sse2.cvtps2dq"}[width], value)


def pack(name: str, dtype: str, a: Any, b: Any, width: int) -> Any:
    """"packssdw" or "packuswb" of two vectors, within 128-bit parts."""
    prefix, suffix = {64: ("avx512", ".512"), 32: ("avx2", ""), 16: ("sse2", ".128")}[width]
    return call(dtype, f"llvm.x86.{prefix}.{name}{suffix}", a, b)


@dataclass(frozen=True)
class Packed:
    """Constants of an int8 depthwise kernel in the order it reads them, block after block (`blocks_of`)."""

    weights: np.ndarray  # int8 (int16 without VNNI) [block][pattern][slot][lane][tap]
    bias: np.ndarray  # int32 [block][slot][lane], the input's zero point and storage offset folded in
    multiplier: np.ndarray  # float32 [block][slot][lane]
    peak: float  # bound on |acc * multiplier|


def pack_constants(op: OpCall, blocks: Sequence[tuple[int, int]], plan: TapPlan, taps: int) -> Packed:
    """bias' = bias - (x_zero_point + 128) * sum(w): the input is stored as q + 128."""
    w, bias, multiplier = (np.asarray(o) for o in op.operands[1:4])
    w = w[..., 0].astype(np.int64)  # [C, kh, kw]
    folded = bias.astype(np.int64) - (int(op.attrs["x_zero_point"]) + 128) * w.sum((1, 2))
    peak = (np.abs(folded) + 255 * np.abs(w).sum((1, 2))) * np.abs(multiplier.astype(np.float64))
    padded = np.zeros((max(w.shape[0], 16), *w.shape[1:]), np.int64)
    padded[: w.shape[0]] = w
    weights, order = [], []
    for first, width in blocks:
        channels = first + channel_order(width)
        order.append(channels.reshape(-1))
        placed = np.zeros((len(plan.patterns), *channels.shape, taps), np.int64)
        for p, pattern in enumerate(plan.patterns):
            for slot, tap in enumerate(pattern):
                if tap is not None:
                    placed[p, ..., slot] = padded[channels, tap[0], tap[1]]
        weights.append(placed.reshape(-1))
    lanes = np.concatenate(order)
    spread = [np.concatenate([v, np.zeros(16, v.dtype)])[np.minimum(lanes, len(v))] for v in (folded.astype(np.int32), multiplier.astype(np.float32))]
    return Packed(np.concatenate(weights).astype(np.int8 if taps == 4 else np.int16), spread[0], spread[1], float(peak.max(initial=0.0)))


class ByteKernel:
    """One int8 depthwise kernel while it is written."""

    def __init__(self, op: OpCall, params: Mapping[str, Any], isa: ByteIsa) -> None:
        self.op, self.isa, self.g = op, isa, Geometry.of(op)
        self.tile = (min(int(params["rows"]), self.g.out[0]), min(int(params["columns"]), self.g.out[1]))
        self.split = bool(params["split"])
        self.plan = plan_taps(self.g.kernel, self.g.strides, self.g.dilation, self.tile, isa.taps, str(params["leftover"]))
        self.blocks = blocks_of(self.g.channels, [w for w in isa.widths if w <= int(params["width"])])
        self.full = sum(width == self.blocks[0][1] for _, width in self.blocks)
        self.constants = pack_constants(op, self.blocks, self.plan, isa.taps)
        self.tasks = Tasks.of(self.g, self.tile[0], self.full, int(params["task_rows"]), int(params["task_blocks"]))

    def kernel(self, row: str, target: Target) -> Kernel:
        c = self.constants
        kernel = make_kernel(
            row, self.op, target, self.emit, tasks=self.tasks.count, arrays=[c.weights, c.bias, c.multiplier], macs=self.g.macs
        )
        return kernel

    def emit(self, k: Emitter) -> None:
        a, out = self.op.attrs, self.op.output.dtype
        self.k = k
        self.float_out = out == "float32"
        self.wide = self.constants.peak >= _INT32_LIMIT
        if not self.float_out:
            zero, low, high = (int(a[name]) for name in ("zero_point", "low", "high"))
            self.shifted, self.clamped = zero != -128, (low, high) != (-128, 127)
            self.zero = T.Cast("int16", k.i32(zero + 128)) if self.shifted else None
            self.low, self.high = (T.Cast("uint8", k.i32(v + 128)) for v in (low, high)) if self.clamped else (None, None)
        t = self.tasks
        chunk, task = T.floormod(k.task, t.channel_chunks), T.floordiv(k.task, t.channel_chunks)
        chunk, image = T.bind(chunk), T.bind(T.floordiv(task, t.row_chunks))
        begin, end = chunk_bounds(T.floormod(task, t.row_chunks), t.row_chunks, t.rows)
        first, last = chunk_bounds(chunk, t.channel_chunks, self.full)
        with loops((first, last)) as (block,):
            channel = T.bind(T.min(block * self.blocks[0][1], max(self.g.channels - self.blocks[0][1], 0)))
            self.strip(image, (begin, end), channel, block * self.blocks[0][1], self.blocks[0][1])
        if len(self.blocks) > self.full:
            with T.If(chunk == t.channel_chunks - 1), T.Then():
                at = self.full * self.blocks[0][1]
                for channel, width in self.blocks[self.full :]:
                    self.strip(image, (begin, end), T.int32(channel), T.int32(at), width)
                    at += width

    def strip(self, image: Any, rows: tuple[Any, Any], channel: Any, packed: Any, width: int) -> None:
        """All tiles of some row tiles of one channel block; `packed`: channels packed before it."""
        g, (tile_rows, tile_columns), x = self.g, self.tile, self.op.tensors[0]
        across = -(-g.out[1] // tile_columns)
        with loops(rows, across) as (i, j):
            oh = T.bind(T.min(i * tile_rows, g.out[0] - tile_rows))
            ow = T.bind(T.min(j * tile_columns, g.out[1] - tile_columns))
            source = T.bind(x.index(image, oh * g.strides[0] - g.padding[0], ow * g.strides[1] - g.padding[1], channel))
            target = T.bind(self.op.output.index(image, oh, ow, channel))
            self.tile_body(source, target, (image, oh, ow, channel), packed, width)

    def tile_body(self, source: Any, target: Any, at: tuple[Any, ...], packed: Any, width: int) -> None:
        x, lanes, (_, tile_columns) = self.op.tensors[0], width // 4, self.tile
        weights, bias, multiplier = self.k.arrays
        pitch, row_pitch = x.channel_pitch, x.rows[1] * x.channel_pitch
        wt = f"int{8 if self.isa.taps == 4 else 16}"
        per = lanes * self.isa.taps
        remaining = [0] * (self.tile[0] * tile_columns)
        for bundle in self.plan.bundles:
            for o, _ in bundle.uses:
                remaining[o] += 1
        words: dict[int, list[Any]] = {}
        for halves in ([0], [1]) if self.split else ([0, 1],):
            slots = [2 * h + s for h in halves for s in (0, 1)]
            left, acc = list(remaining), {}
            for bundle in self.plan.bundles:
                pixels = [T.bind(T.reinterpret(f"int8x{width}", load(self.k.inputs[0], source + (r * row_pitch + c * pitch), width))) for r, c in bundle.pixels]
                vectors = [v for h in halves for v in self.isa.interleave(pixels, h)]
                for o, p in bundle.uses:
                    if o not in acc:
                        acc[o] = [load(bias, packed + s * lanes, lanes) for s in slots]
                    w = [load(weights, packed * (len(self.plan.patterns) * self.isa.taps) + (p * 4 + s) * per, per) for s in slots]
                    acc[o] = [T.bind(self.isa.dot(a, v, u, width)) for a, v, u in zip(acc[o], vectors, w, strict=True)]
                    left[o] -= 1
                    if not left[o]:
                        r, s = divmod(o, tile_columns)
                        words.setdefault(o, []).extend(self.finish(acc.pop(o), slots, at, (r, s), packed, width))
                        if len(words[o]) == (4 if self.float_out else 2):
                            out = self.op.output
                            self.write(words.pop(o), target + (r * out.rows[1] + s) * out.channel_pitch, width)

    def finish(self, acc: list[Any], slots: list[int], at: tuple[Any, ...], pixel: tuple[int, int], packed: Any, width: int) -> list[Any]:
        """int16 words (float32 slots) of some slots of one output."""
        lanes = width // 4
        scaled = [T.Cast(f"float32x{lanes}", a) * load(self.k.arrays[2], packed + s * lanes, lanes) for a, s in zip(acc, slots, strict=True)]
        if self.float_out:
            return [T.bind(v) for v in scaled]
        if self.wide:
            scaled = [T.max(T.min(v, scalar(_INT32_LIMIT, "float32", lanes)), scalar(-_INT32_LIMIT, "float32", lanes)) for v in scaled]
        values = [to_int(v, width) for v in scaled]
        pairs = [pack("packssdw", f"int16x{width // 2}", values[i], values[i + 1], width) for i in range(0, len(values), 2)]
        if self.shifted:
            pairs = [call(f"int16x{width // 2}", "llvm.sadd.sat", p, T.broadcast(self.zero, width // 2)) for p in pairs]
        return [T.bind(p) for p in pairs]

    def write(self, words: list[Any], index: Any, width: int) -> None:
        out = T.reinterpret(f"uint8x{width}", pack("packuswb", f"int8x{width}", words[0], words[1], width))
        if self.clamped:
            out = T.min(T.max(out, T.broadcast(self.low, width)), T.broadcast(self.high, width))
        save(self.k.output, index, out, width)


@dataclass(frozen=True)
class DepthwiseRow:
    """`qc.conv2d` with one input channel per output channel."""

    name: str
    isa: str
    bytes: ByteIsa

    def refuse(self, op: OpCall, target: Target) -> str | None:
        return refuse_depthwise(op)

    def needs(self, op: OpCall, target: Target) -> list[Need]:
        g = Geometry.of(op)
        return [Need(halo=g.padding, pitch=16 if g.channels < 16 else 1)]

    def space(self, op: OpCall, target: Target) -> dict[str, list[Any]]:
        return {"rows": [1, 2, 3, 4], "columns": [1, 2, 4, 7, 8], "leftover": ["tall", "wide"], "split": [0, 1], "width": list(self.bytes.widths), "task_rows": [1, 2, 4, 8, 64], "task_blocks": [1, 2, 64]}

    def default(self, op: OpCall, target: Target) -> dict[str, Any]:
        return {"rows": 1, "columns": 4, "leftover": "tall", "split": 0, "width": self.bytes.widths[0], "task_rows": 64, "task_blocks": 64}

    def build(self, op: OpCall, params: Mapping[str, Any], target: Target) -> Kernel:
        return ByteKernel(op, params, self.bytes).kernel(self.name, target)


AVX512VNNI = ByteIsa("x86-avx512vnni", (64, 32, 16), 4)
AVXVNNI = ByteIsa("x86-avxvnni", (32, 16), 4)
AVX2 = ByteIsa("x86-avx2", (32, 16), 2)

for _isa in (AVX512VNNI, AVXVNNI, AVX2):
    register("qc.conv2d", DepthwiseRow(f"{_isa.name}/depthwise", _isa.name, _isa))
