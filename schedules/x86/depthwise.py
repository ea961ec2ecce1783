"""Depthwise 8-bit convolution on x86: kernel taps, not input channels, fill the dot instruction.

Vectors run along channels. A bundle of up to four input pixels (`depthwise_plan`) is interleaved channel by channel with byte unpacks, so that one
VPDPBUSD does 4 taps x 16 channels; a bundle serves every output of the register tile that touches it. Unpacks work within 128-bit parts and
spread the channels of a vector of B bytes over four vectors, its slots:

    slot k, dword 4 * part + i  <->  channel 16 * part + 4 * k + i          (part < B / 16, i < 4)

Weights, bias and multipliers are packed in that order at compile time, and the epilogue's VPACKSSDW and VPACKUSWB, which work within parts too,
undo it. Without VNNI two taps are interleaved, widened to int16 and summed by VPMADDWD (exact; VPMADDUBSW would saturate).

The epilogue clamps after rounding: bounds are integers and rint is monotone, so clip(rint(v), low - z, high - z) == rint(clip(v, low - z, high - z)),
and the saturation of the packs does most of it. That needs |v| < 2^31 (VCVTPS2DQ), which the weights prove at compile time; where they can't, a
clip in float comes first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.numerics.spec import RESIDUAL_LIMIT
from qcompiler.schedules.avx2 import multiply_pairs
from qcompiler.schedules.builder import make_kernel
from qcompiler.schedules.depthwise_float import FloatDepthwiseRow
from qcompiler.schedules.depthwise_nest import DepthwiseNest
from qcompiler.schedules.depthwise_plan import Geometry, Pair, TapPlan, blocks_of, default_tasks, plan_taps, refuse_depthwise
from qcompiler.schedules.isa import call, demand, load, scalar, shuffle
from qcompiler.schedules.table import Kernel, Need, OpCall, register

MAX_STEP = 450  # vector instructions of one tile that the heuristic allows, and those that `build` does: LLVM takes about 1 ms for each
LARGEST_STEP = 1500
L2_BYTES = 1 << 20  # of the machines we know best; an input beyond it is better read once
MACS_PER_TASK = 400_000  # about 5 microseconds, against about 2 for handing out a task


# -- instructions -------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ByteIsa:
    """How a row multiplies bytes. `widths`: vector bytes, widest first. `taps`: pixels of a bundle, 4 with VPDPBUSD, 2 with VPMADDWD."""

    name: str
    widths: tuple[int, ...]
    taps: int
    registers: int

    def __post_init__(self) -> None:
        demand(
            self.name,
            {
                "widths are those of vectors widest first": list(self.widths) == sorted({64, 32, 16}.intersection(self.widths), reverse=True) != [],
                "taps are 2 or 4": self.taps in (2, 4),
                "AVX512 has 32 registers and AVX2 16": self.registers == (32 if 64 in self.widths else 16),
            },
        )

    @property
    def weight_dtype(self) -> str:
        return "int8" if self.taps == 4 else "int16"

    def interleave(self, pixels: Sequence[Any], half: int, width: int) -> list[Any]:
        """Slots 2 * half and 2 * half + 1 of a bundle: the taps of each channel side by side, as bytes (words without VNNI)."""
        taps = [*pixels, *[pixels[-1]] * (self.taps - len(pixels))]  # the weights of absent taps are 0: any value will do
        pairs = [T.bind(unpack(taps[i], taps[i + 1], width, 1, half)) for i in range(0, self.taps, 2)]
        if self.taps == 4:
            return [T.bind(unpack(pairs[0], pairs[1], width, 2, side)) for side in (0, 1)]
        return [T.bind(T.reinterpret(f"int16x{width // 2}", unpack(pairs[0], scalar(0, "int8", width), width, 1, side))) for side in (0, 1)]

    def dot(self, acc: Any, x: Any, w: Any, width: int) -> Any:
        lanes = width // 4
        if self.taps == 4:
            return call(f"int32x{lanes}", f"llvm.x86.avx512.vpdpbusd.{8 * width}", acc, x, w)
        return acc + multiply_pairs(x, w, lanes)


def unpack(a: Any, b: Any, width: int, size: int, half: int) -> Any:
    """VPUNPCK{L,H}: alternating elements of `size` bytes from the low (`half` 0) or high halves of each 128-bit part of two int8 vectors."""
    starts = [16 * part + 8 * half + size * e + side * width for part in range(width // 16) for e in range(8 // size) for side in (0, 1)]
    return shuffle([a, b], [start + byte for start in starts for byte in range(size)])


def channel_order(width: int) -> np.ndarray:
    """[4, width / 4]: which channel of a block of `width` each lane of each slot holds."""
    part, i = np.divmod(np.arange(width // 4), 4)
    return np.stack([16 * part + 4 * slot + i for slot in range(4)])


def to_int(value: Any, width: int) -> Any:
    """float32 lanes to int32, ties to even; out of range gives INT32_MIN."""
    if width == 64:
        rounding = tirx.const(4, "int32")  # the current mode, which is to nearest even
        return call("int32x16", "llvm.x86.avx512.mask.cvtps2dq.512", value, scalar(0, "int32", 16), tirx.const(-1, "int16"), rounding)
    return call(f"int32x{width // 4}", {32: "llvm.x86.avx.cvt.ps2dq.256", 16: "llvm.x86.sse2.cvtps2dq"}[width], value)


def pack(name: str, dtype: str, a: Any, b: Any, width: int) -> Any:
    """`name` "packssdw" or "packuswb": two vectors of `width` bytes, saturated to half the element size, within 128-bit parts."""
    prefix, suffix = {64: ("avx512", ".512"), 32: ("avx2", ""), 16: ("sse2", ".128")}[width]
    return call(dtype, f"llvm.x86.{prefix}.{name}{suffix}", a, b)


# -- constants ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """Constants in the order the kernel reads them, block after block."""

    weights: np.ndarray  # int8 or int16 [block][pattern][slot][lane][tap]
    bias: np.ndarray  # int32 [block][slot][lane], the input's zero point and storage offset folded in
    multiplier: np.ndarray  # float32 [block][slot][lane]
    peak: float  # bound on |acc * multiplier|


def pack_constants(op: OpCall, blocks: Sequence[Pair], plan: TapPlan, isa: ByteIsa) -> Packed:
    """bias' = bias - (x_zero_point + 128) * sum(w), because the input is stored as q + 128 and padding holds its zero point."""
    w, bias, multiplier = np.asarray(op.operands[1])[..., 0].astype(np.int64), np.asarray(op.operands[2]), np.asarray(op.operands[3], np.float32)
    folded = bias.astype(np.int64) - (int(op.attrs["x_zero_point"]) + 128) * w.sum((1, 2))
    peak = (np.abs(folded) + 255 * np.abs(w).sum((1, 2))) * np.abs(multiplier.astype(np.float64))
    spare = max(first + width for first, width in blocks) - len(w)  # lanes past the last channel
    w, folded, multiplier = (np.pad(v, [(0, spare)] + [(0, 0)] * (v.ndim - 1)) for v in (w, folded, multiplier))
    channels = [first + channel_order(width) for first, width in blocks]
    weights = []
    for c in channels:
        placed = np.zeros((len(plan.patterns), *c.shape, isa.taps), isa.weight_dtype)
        for p, pattern in enumerate(plan.patterns):
            for slot, tap in enumerate(pattern):
                if tap is not None:
                    placed[p, ..., slot] = w[c, tap[0], tap[1]]
        weights.append(placed.reshape(-1))
    order = np.concatenate([c.reshape(-1) for c in channels])
    return Packed(np.concatenate(weights), folded[order].astype(np.int32), multiplier[order], float(peak.max(initial=0.0)))


# -- the kernel ---------------------------------------------------------------------------------------------------------------------------


class ByteKernel(DepthwiseNest):
    """An int8 depthwise kernel while it is written. `split`: the four slots are computed two at a time, which halves the live accumulators."""

    def __init__(self, op: OpCall, params: Mapping[str, Any], isa: ByteIsa) -> None:
        blocks = blocks_of(op.output.shape[3], [w for w in isa.widths if w <= int(params["width"])])
        super().__init__(op, blocks, params)
        self.isa, self.halves = isa, [[0], [1]] if params["split"] else [[0, 1]]
        self.plan = plan_taps(self.g.kernel, self.g.strides, self.g.dilation, self.tile, isa.taps, str(params["leftover"]))
        self.constants = pack_constants(op, self.blocks, self.plan, isa)
        self.bounded = self.constants.peak < RESIDUAL_LIMIT
        self.residual = op.tensors[1] if len(op.tensors) > 1 else None

    def build(self, row: str, target: Target) -> Kernel:
        arrays, facts = [self.constants.weights, self.constants.bias, self.constants.multiplier], (self.params, self.bounded)
        return make_kernel(row, self.op, target, self.emit, tasks=self.tasks.count, arrays=arrays, macs=self.g.macs, facts=facts)

    def prepare(self) -> None:
        a, k, self.dtype = self.op.attrs, self.k, self.op.output.dtype
        if self.dtype == "float32":
            self.float_bounds = [None if a.get(n) is None else k.f32(a[n]) for n in ("float_low", "float_high")]
            return
        zero, low, high = (int(a[name]) + 128 for name in ("zero_point", "low", "high"))
        self.zero = T.bind(T.Cast("int16", k.i32(zero))) if zero else None
        self.bounds = [T.bind(T.Cast("uint8", k.i32(v))) for v in (low, high)] if (low, high) != (0, 255) else None
        if self.residual:
            self.residual_zero, self.factor = k.i32(int(a["residual_zero_point"]) + 128), k.i32(int(a["residual_multiplier"]))
            self.scale = k.f32(2.0 ** -int(a["residual_shift"]))

    def step(self, source: Any, at: tuple[Any, Any, Any, Any], packed: Any, width: int) -> None:
        weights, bias, _ = self.k.arrays
        lanes, size = width // 4, width // 4 * self.isa.taps
        out = self.place(self.op.output, at)
        residual = self.place(self.residual, at) if self.residual else None
        first = T.bind(packed * (len(self.plan.patterns) * self.isa.taps))
        last_use = {o: i for i, bundle in enumerate(self.plan.bundles) for o, _ in bundle.uses}
        values: dict[int, list[Any]] = {}
        for halves in self.halves:
            slots = [2 * half + side for half in halves for side in (0, 1)]
            acc: dict[int, list[Any]] = {}
            for i, bundle in enumerate(self.plan.bundles):
                pixels = [T.bind(T.reinterpret(f"int8x{width}", self.pixel(source, r, c, width))) for r, c in bundle.pixels]
                vectors = [v for half in halves for v in self.isa.interleave(pixels, half, width)]
                for o, p in bundle.uses:
                    sums = acc.pop(o, None) or [load(bias, packed + s * lanes, lanes) for s in slots]
                    w = [load(weights, first + (4 * p + s) * size, size) for s in slots]
                    sums = [T.bind(self.isa.dot(a, v, u, width)) for a, v, u in zip(sums, vectors, w, strict=True)]
                    if last_use[o] > i:
                        acc[o] = sums
                        continue
                    values.setdefault(o, []).extend(self.finish(sums, slots, packed, None if residual is None else residual(o), width))
                    if halves == self.halves[-1]:
                        self.write(values.pop(o), out(o), width)

    def finish(self, sums: list[Any], slots: list[int], packed: Any, residual: Any, width: int) -> list[Any]:
        """int16 vectors of two slots each (float32 output: a vector per slot), of some slots of one output."""
        lanes = width // 4
        scaled = [T.Cast(f"float32x{lanes}", a) * load(self.k.arrays[2], packed + s * lanes, lanes) for a, s in zip(sums, slots, strict=True)]
        if self.dtype == "float32":
            return [T.bind(v) for v in scaled]
        if not self.bounded:
            limit = float(RESIDUAL_LIMIT)
            scaled = [T.max(T.min(v, scalar(limit, "float32", lanes)), scalar(-limit, "float32", lanes)) for v in scaled]
        ints = [to_int(v, width) for v in scaled]
        if residual is not None:
            ints = [t + self.share(residual, s, width) for t, s in zip(ints, slots, strict=True)]
            ints = [to_int(T.Cast(f"float32x{lanes}", t) * T.broadcast(self.scale, lanes), width) for t in ints]
        words = [pack("packssdw", f"int16x{width // 2}", ints[i], ints[i + 1], width) for i in range(0, len(ints), 2)]
        if self.zero is not None:  # saturating: what the pack cut off must not wrap
            words = [call(f"int16x{width // 2}", "llvm.sadd.sat", w, T.broadcast(self.zero, width // 2)) for w in words]
        return [T.bind(w) for w in words]

    def share(self, index: Any, slot: int, width: int) -> Any:
        """int32 `(r - residual_zero_point) * residual_multiplier` of one slot."""
        zeros = scalar(0, "int8", width)
        r = T.reinterpret(f"int8x{width}", load(self.k.inputs[1], index, width))
        words = unpack(r, zeros, width, 1, slot // 2)
        stored = T.reinterpret(f"int32x{width // 4}", unpack(words, zeros, width, 2, slot % 2))
        return (stored - T.broadcast(self.residual_zero, width // 4)) * T.broadcast(self.factor, width // 4)

    def write(self, values: list[Any], index: Any, width: int) -> None:
        """Store one output: two int16 vectors, or four float32 slots."""
        if self.dtype == "float32":
            low, high = self.float_bounds
            order = np.argsort(channel_order(width).reshape(-1))
            for first in range(0, width, width // 4):
                value = shuffle(values, order[first : first + width // 4].tolist())
                value = value if low is None else T.max(value, T.broadcast(low, width // 4))
                value = value if high is None else T.min(value, T.broadcast(high, width // 4))
                self.save(index, first, value, width // 4)
            return
        out = T.reinterpret(f"uint8x{width}", pack("packuswb", f"int8x{width}", values[0], values[1], width))
        if self.bounds:
            out = T.min(T.max(out, T.broadcast(self.bounds[0], width)), T.broadcast(self.bounds[1], width))
        if self.dtype == "int8":
            out = T.reinterpret(f"int8x{width}", T.bitwise_xor(out, scalar(128, "uint8", width)))
        self.save(index, 0, out, width)


# -- rows ---------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DepthwiseRow:
    """`qc.conv2d` with one input channel per output channel.

    Tunables, besides those of `DepthwiseNest`: `leftover`, see `plan_taps`; `split`, see `ByteKernel`; `width`, bytes of the widest vector.
    """

    name: str
    isa: str
    unit: ByteIsa
    own_channels = True

    def refuse(self, op: OpCall, target: Target) -> str | None:
        reason = refuse_depthwise(op)
        if reason is None and any(t.dtype != "uint8" for t in op.tensors):
            reason = "activations must be stored as uint8."
        return reason

    def needs(self, op: OpCall, target: Target) -> list[Need]:
        g = Geometry.of(op)
        pitch = 16 if g.channels < 16 else 1  # the narrowest vector is read whole
        return [Need(halo=g.padding, pitch=pitch), *[Need(pitch=pitch)] * (len(op.tensors) - 1)]

    def space(self, op: OpCall, target: Target) -> dict[str, list[Any]]:
        height, width = Geometry.of(op).out
        return {
            "rows": [r for r in (1, 2, 3, 4) if r <= height],
            "columns": [c for c in (1, 2, 3, 4, 5, 6, 7, 8, 10, 14) if c <= width],
            "leftover": ["tall", "wide"],
            "split": [0, 1],
            "width": list(self.unit.widths),
            "order": ["channels", "rows"],
            "row_tasks": [1, 2, 4, 8, 16],
            "channel_tasks": [1, 2, 4, 8],
        }

    def default(self, op: OpCall, target: Target) -> dict[str, Any]:
        g, space = Geometry.of(op), self.space(op, target)
        keys = ("rows", "columns", "leftover", "split")
        points = [dict(zip(keys, p, strict=True)) for p in product(*(space[k] for k in keys))]
        best = min(points, key=lambda p: self.cycles(g, p))
        row_tasks, channel_tasks = default_tasks(g, -(-g.out[0] // best["rows"]), MACS_PER_TASK)
        order = "rows" if g.channels > self.unit.widths[0] and op.tensors[0].bytes > L2_BYTES else "channels"
        return best | {"width": self.unit.widths[0], "order": order, "row_tasks": row_tasks, "channel_tasks": channel_tasks}

    def instructions(self, plan: TapPlan) -> tuple[int, int, int]:
        """Vector instructions of a step: all, those of the two units that multiply, those of the three that multiply or shuffle."""
        dot = 4 * plan.dots
        spread = (8 if self.unit.taps == 4 else 6) * len(plan.bundles)
        add = 0 if self.unit.taps == 4 else dot
        return dot + add + spread + 17 * plan.outputs, dot + 4 * plan.outputs, dot + spread + 7 * plan.outputs

    def cycles(self, g: Geometry, point: Mapping[str, Any]) -> float:
        """Estimated cycles of a channel block, of full-width vectors on four 256-bit units (a 512-bit instruction occupies two).

        A step is bound by its instructions, by those that only some units execute, or by its loads, one vector per cycle: weights that don't fit
        the registers beside the accumulators are memory operands. Measured steps of good points take 2 to 10 % more; what this picks was within
        7 % of the fastest of about 30 points per layer.
        """
        tile = (point["rows"], point["columns"])
        plan = plan_taps(g.kernel, g.strides, g.dilation, tile, self.unit.taps, point["leftover"])
        total, multiply, shuffled = self.instructions(plan)
        if total > MAX_STEP and tile != (1, 1):
            return math.inf
        passes, weights = (2 if point["split"] else 1), 4 * len(plan.patterns)
        used = (plan.live + 1) * 4 // passes + 4  # accumulators, a bundle, temporaries
        unkept = min(max(used + weights - self.unit.registers, 0), weights) / weights
        loads = 4 * plan.dots * unkept + passes * sum(len(b.pixels) for b in plan.bundles) + 8 * plan.outputs
        step: float = max(total / 2, multiply, shuffled * 2 / 3, loads) + 5
        return float(-(-g.out[0] // tile[0]) * -(-g.out[1] // tile[1]) * step)

    def build(self, op: OpCall, params: Mapping[str, Any], target: Target) -> Kernel:
        kernel = ByteKernel(op, params, self.unit)
        size = self.instructions(kernel.plan)[0]
        if size > LARGEST_STEP and kernel.tile != (1, 1):
            raise ValueError(f"a step of {kernel.tile[0]} x {kernel.tile[1]} outputs has {size} instructions, more than {LARGEST_STEP}")
        return kernel.build(self.name, target)


AVX512VNNI = ByteIsa(name="x86-avx512vnni", widths=(64, 32, 16), taps=4, registers=32)
AVX512 = ByteIsa(name="x86-avx512", widths=(64, 32, 16), taps=2, registers=32)
AVXVNNI = ByteIsa(name="x86-avxvnni", widths=(32, 16), taps=4, registers=16)
AVX2 = ByteIsa(name="x86-avx2", widths=(32, 16), taps=2, registers=16)

for _unit in (AVX512VNNI, AVX512, AVXVNNI, AVX2):
    register("qc.conv2d", DepthwiseRow(f"{_unit.name}/depthwise", _unit.name, _unit))

for _isa, _widths in (("x86-avx512vnni", (16, 8)), ("x86-avx512", (16, 8)), ("x86-avx2", (8,))):
    register("qc.f32.conv2d", FloatDepthwiseRow(f"{_isa}/f32-depthwise", _isa, _widths))
