"""Depthwise 8-bit convolution on x86: kernel taps, not input channels, fill the dot instruction.

Vectors run along channels. A bundle of up to four input pixels (`depthwise_plan`) is interleaved channel by channel with byte unpacks, so that one
VPDPBUSD does 4 taps x 16 channels; a bundle serves every output of the register tile that touches it. Unpacks work within 128-bit parts and
spread the channels of a vector of B bytes over four vectors, its slots:

    slot k, dword 4 * part + i  <->  channel 16 * part + 4 * k + i          (part < B / 16, i < 4)

Weights, bias and multipliers are packed in that order at compile time, and the epilogue's VPACKSSDW and VPACKUSWB, which work within parts too,
undo it. Vectors that the channels do not fill hold those of several output columns side by side (`Fold`). Without VNNI two taps are interleaved,
widened to int16 and summed by VPMADDWD (exact; VPMADDUBSW would saturate).

The epilogue clamps after rounding: bounds are integers and rint is monotone, so clip(rint(v), low - z, high - z) == rint(clip(v, low - z, high - z)),
and the saturation of the packs does most of it. That needs |v| < 2^31 (VCVTPS2DQ), which the weights prove at compile time; where they can't, a
clip in float comes first.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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
from qcompiler.schedules.conv_epilogue import by_sign
from qcompiler.schedules.depthwise_float import FloatDepthwiseRow
from qcompiler.schedules.depthwise_nest import DepthwiseNest
from qcompiler.schedules.depthwise_plan import Geometry, Pair, TapPlan, blocks_of, default_tasks, plan_taps, refuse_depthwise
from qcompiler.schedules.isa import call, demand, load, save, scalar, shuffle
from qcompiler.schedules.table import Kernel, Layout, Need, OpCall, register

MAX_STEP = 350  # vector instructions of one tile that the heuristic allows: LLVM spills in larger ones; and those that `build` does: each takes LLVM 1 ms
LARGEST_STEP = 1500
L2_BYTES = 1 << 20
"""Of the machines we know best. An input beyond it whose blocks of channels share cache lines, and whose rows hardly serve two outputs, is better read once:
measured on a Zen 5 core, "rows" take 0.94 of the time of "channels" there, and 1.0 to 1.3 with a stride of 1 or whole lines. With VNNI and 512 bits, up to
three blocks of a 3x3 kernel take 0.75 to 0.94 by "columns", whatever the size of the input; more blocks, larger kernels and other vectors take 1.0 to 1.5."""
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


# -- vectors --------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fold:
    """What a vector holds: `width` channels of each of `columns` outputs that lie side by side; and the taps of a tile of such vectors."""

    width: int
    columns: int
    plan: TapPlan

    @property
    def lanes(self) -> int:
        """Bytes of the vector."""
        return self.width * self.columns

    @staticmethod
    def of(g: Geometry, width: int, widest: int, point: Mapping[str, Any], taps: int) -> Fold:
        """As many columns as a tile can be divided into, and a vector of `widest` bytes takes; one unless the point says `fold`."""
        rows, across = min(int(point["rows"]), g.out[0]), min(int(point["columns"]), g.out[1])
        columns = math.gcd(across, widest // width) if point["fold"] else 1
        strides, tile = (g.strides[0], g.strides[1] * columns), (rows, across // columns)
        return Fold(width, columns, plan_taps(g.kernel, strides, g.dilation, tile, taps, str(point["leftover"])))

    def output(self, number: int, across: int) -> int:
        """The first output of vector `number` of a tile of `across` columns."""
        row, column = divmod(number, across // self.columns)
        return row * across + column * self.columns


# -- constants ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Packed:
    """Constants in the order the kernel reads them, block after block."""

    weights: np.ndarray  # int8 or int16 [block][pattern][slot][lane][tap], for each block `patterns` of them
    bias: np.ndarray  # int32 [block][slot][lane], the input's zero point and storage offset folded in
    multiplier: np.ndarray  # float32 [row][block][slot][lane], the second row for negative numbers
    patterns: int
    peak: float  # bound on |acc * multiplier|


def pack_constants(op: OpCall, blocks: Sequence[Pair], folds: Mapping[int, Fold], isa: ByteIsa) -> Packed:
    """bias' = bias - (x_zero_point + 128) * sum(w), because the input is stored as q + 128 and padding holds its zero point."""
    w, bias, multiplier = np.asarray(op.operands[1])[..., 0].astype(np.int64), np.asarray(op.operands[2]), np.asarray(op.operands[3], np.float32)
    folded = bias.astype(np.int64) - (int(op.attrs["x_zero_point"]) + 128) * w.sum((1, 2))
    multiplier = multiplier.reshape(-1, len(w))
    peak = (np.abs(folded) + 255 * np.abs(w).sum((1, 2))) * np.abs(multiplier.astype(np.float64))
    spare = max(first + width for first, width in blocks) - len(w)  # lanes past the last channel
    w, folded = (np.pad(v, [(0, spare)] + [(0, 0)] * (v.ndim - 1)) for v in (w, folded))
    multiplier = np.pad(multiplier, [(0, 0), (0, spare)])
    most = max(len(fold.plan.patterns) for fold in folds.values())
    channels = [first + channel_order(folds[width].lanes) % width for first, width in blocks]
    weights = []
    for c, (_, width) in zip(channels, blocks, strict=True):
        placed = np.zeros((most, *c.shape, isa.taps), isa.weight_dtype)
        for p, pattern in enumerate(folds[width].plan.patterns):
            for slot, tap in enumerate(pattern):
                if tap is not None:
                    placed[p, ..., slot] = w[c, tap[0], tap[1]]
        weights.append(placed.reshape(-1))
    order = np.concatenate([c.reshape(-1) for c in channels])
    return Packed(np.concatenate(weights), folded[order].astype(np.int32), multiplier[:, order], most, float(peak.max(initial=0.0)))


# -- the kernel ---------------------------------------------------------------------------------------------------------------------------


class ByteKernel(DepthwiseNest):
    """An int8 depthwise kernel while it is written. `split`: the four slots are computed two at a time, which halves the live accumulators."""

    def __init__(self, op: OpCall, params: Mapping[str, Any], isa: ByteIsa) -> None:
        widths = [w for w in isa.widths if w <= int(params["width"])]
        blocks = blocks_of(op.output.shape[3], widths)
        super().__init__(op, blocks, params)
        self.isa, self.halves = isa, [[0], [1]] if params["split"] else [[0, 1]]
        self.folds = {width: Fold.of(self.g, width, widths[0], params, isa.taps) for _, width in blocks}
        self.constants = pack_constants(op, self.blocks, self.folds, isa)
        self.bounded = self.constants.peak < RESIDUAL_LIMIT
        self.residual = op.tensors[1] if len(op.tensors) > 1 else None

    def lanes(self, width: int) -> int:
        return self.folds[width].lanes

    def build(self, row: str, target: Target) -> Kernel:
        arrays, facts = [self.constants.weights, self.constants.bias, self.constants.multiplier.reshape(-1)], (self.params, self.bounded)
        return make_kernel(row, self.op, target, self.emit, tasks=self.tasks.count, arrays=arrays, macs=self.g.macs, facts=facts)

    def prepare(self) -> None:
        a, k, self.dtype = self.op.attrs, self.k, self.op.output.dtype
        self.bends_sum = bool(a.get("bends_sum"))
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
        fold, size = self.folds[width], self.lanes(width)
        lanes, operand = size // 4, size // 4 * self.isa.taps
        places = self.places(self.op.output, at, fold)
        residuals = self.places(self.residual, at, fold) if self.residual else None
        first = T.bind(packed * (self.constants.patterns * self.isa.taps))
        last_use = {o: i for i, bundle in enumerate(fold.plan.bundles) for o, _ in bundle.uses}
        values: dict[int, list[Any]] = {}
        for halves in self.halves:
            slots = [2 * half + side for half in halves for side in (0, 1)]
            acc: dict[int, list[Any]] = {}
            for i, bundle in enumerate(fold.plan.bundles):
                pixels = [T.bind(T.reinterpret(f"int8x{size}", self.vector(source, r, c, fold))) for r, c in bundle.pixels]
                vectors = [v for half in halves for v in self.isa.interleave(pixels, half, size)]
                for o, p in bundle.uses:
                    sums = acc.pop(o, None) or [load(bias, packed + s * lanes, lanes) for s in slots]
                    w = [load(weights, first + (4 * p + s) * operand, operand) for s in slots]
                    sums = [T.bind(self.isa.dot(a, v, u, size)) for a, v, u in zip(sums, vectors, w, strict=True)]
                    if last_use[o] > i:
                        acc[o] = sums
                        continue
                    added = None if residuals is None else self.joined(self.k.inputs[1], residuals(o), width)
                    values.setdefault(o, []).extend(self.finish(sums, slots, packed, added, size))
                    if halves == self.halves[-1]:
                        self.write(values.pop(o), places(o), fold)

    def places(self, layout: Layout, at: tuple[Any, Any, Any, Any], fold: Fold) -> Callable[[int], list[Any]]:
        """Where in `layout` (of the output's shape) the columns of a vector begin, by its number."""
        place = self.place(layout, at)

        def found(number: int) -> list[Any]:
            first = fold.output(number, self.tile[1])
            return [place(first + column) for column in range(fold.columns)]

        return found

    def vector(self, source: Any, row: int, column: int, fold: Fold) -> Any:
        """The input pixels that one tap of a vector of outputs reads: at (row, column) from `source`, and so on along the row."""
        x, step = self.op.tensors[0], self.g.strides[1]
        if step * x.channel_pitch == fold.width:  # they touch
            return self.pixel(source, row, column, fold.lanes)
        places = [source + (row * x.rows[1] + column + i * step) * x.channel_pitch for i in range(fold.columns)]
        return self.joined(self.k.inputs[0], places, fold.width)

    def joined(self, buffer: Any, places: Sequence[Any], width: int) -> Any:
        """`width` bytes of each place, side by side."""
        parts = [load(buffer, place, width) for place in places]
        return parts[0] if len(parts) == 1 else shuffle(parts, range(width * len(parts)))

    def finish(self, sums: list[Any], slots: list[int], packed: Any, residual: Any, width: int) -> list[Any]:
        """int16 vectors of two slots each (float32 output: a vector per slot), of some slots of one output."""
        lanes, (rows, row) = width // 4, self.constants.multiplier.shape
        multipliers = [load(self.k.arrays[2], packed + s * lanes, lanes) for s in slots]
        negative = [load(self.k.arrays[2], packed + (row + s * lanes), lanes) for s in slots] if rows > 1 else []
        if negative and not self.bends_sum:
            multipliers = [by_sign(a, m, n, lanes) for a, m, n in zip(sums, multipliers, negative, strict=True)]
        scaled = [T.Cast(f"float32x{lanes}", a) * m for a, m in zip(sums, multipliers, strict=True)]
        if self.dtype == "float32":
            return [T.bind(v) for v in scaled]
        if not self.bounded:
            limit = float(RESIDUAL_LIMIT)
            scaled = [T.max(T.min(v, scalar(limit, "float32", lanes)), scalar(-limit, "float32", lanes)) for v in scaled]
        ints = [to_int(v, width) for v in scaled]
        if residual is not None:
            totals = [T.bind(t + self.share(residual, s, width)) for t, s in zip(ints, slots, strict=True)]
            scales = [T.broadcast(self.scale, lanes)] * len(totals)
            if self.bends_sum:
                scales = [by_sign(t, s, n, lanes) for t, s, n in zip(totals, scales, negative, strict=True)]
            scaled = [T.Cast(f"float32x{lanes}", t) * s for t, s in zip(totals, scales, strict=True)]
            if self.bends_sum:  # a negative slope may lead beyond int32
                scaled = [T.min(v, scalar(float(RESIDUAL_LIMIT), "float32", lanes)) for v in scaled]
            ints = [to_int(v, width) for v in scaled]
        words = [pack("packssdw", f"int16x{width // 2}", ints[i], ints[i + 1], width) for i in range(0, len(ints), 2)]
        if self.zero is not None:  # saturating: what the pack cut off must not wrap
            words = [call(f"int16x{width // 2}", "llvm.sadd.sat", w, T.broadcast(self.zero, width // 2)) for w in words]
        return [T.bind(w) for w in words]

    def share(self, stored: Any, slot: int, width: int) -> Any:
        """int32 `(r - residual_zero_point) * residual_multiplier` of one slot of a vector of the residual."""
        zeros = scalar(0, "int8", width)
        words = unpack(T.reinterpret(f"int8x{width}", stored), zeros, width, 1, slot // 2)
        stored = T.reinterpret(f"int32x{width // 4}", unpack(words, zeros, width, 2, slot % 2))
        return (stored - T.broadcast(self.residual_zero, width // 4)) * T.broadcast(self.factor, width // 4)

    def write(self, values: list[Any], places: Sequence[Any], fold: Fold) -> None:
        """Store one vector of outputs, whose columns begin at `places`: two int16 vectors, or four float32 slots."""
        size, width = fold.lanes, fold.width
        if self.dtype == "float32":
            low, high = self.float_bounds
            order = np.argsort(channel_order(size).reshape(-1))
            for first in range(0, size, size // 4):
                value = shuffle(values, order[first : first + size // 4].tolist())
                value = value if low is None else T.max(value, T.broadcast(low, size // 4))
                value = value if high is None else T.min(value, T.broadcast(high, size // 4))
                self.save(places[first // width], first % width, value, size // 4)
            return
        out = T.reinterpret(f"uint8x{size}", pack("packuswb", f"int8x{size}", values[0], values[1], size))
        if self.bounds:
            out = T.min(T.max(out, T.broadcast(self.bounds[0], size)), T.broadcast(self.bounds[1], size))
        if self.dtype == "int8":
            out = T.reinterpret(f"int8x{size}", T.bitwise_xor(out, scalar(128, "uint8", size)))
        if self.g.channels == self.op.output.channel_pitch == width:  # the columns touch
            save(self.k.output, places[0], out, size)
            return
        out = T.bind(out)
        for column, place in enumerate(places):
            self.save(place, 0, shuffle([out], range(column * width, (column + 1) * width)) if fold.columns > 1 else out, width)


# -- rows ---------------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DepthwiseRow:
    """`qc.conv2d` with one input channel per output channel.

    Tunables, besides those of `DepthwiseNest`: `leftover`, see `plan_taps`; `split`, see `ByteKernel`; `width`, bytes of the widest vector; `fold`, see
    `Fold`: where vectors of all widths take as long, those of few channels are worth filling.
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
            "fold": [0, 1],
            "width": list(self.unit.widths),
            "order": ["channels", "rows", "columns"],
            "row_tasks": [1, 2, 4, 8, 16],
            "channel_tasks": [1, 2, 4, 8],
        }

    def default(self, op: OpCall, target: Target) -> dict[str, Any]:
        g, space = Geometry.of(op), self.space(op, target)
        keys = ("rows", "columns", "leftover", "split")
        points = [dict(zip(keys, p, strict=True)) | {"fold": 1} for p in product(*(space[k] for k in keys))]
        best = min(points, key=lambda p: self.cycles(g, p))
        apart = g.channels > self.unit.widths[0] and g.channels % self.unit.widths[0] > 0 and g.strides[0] > 1
        # few weights that are soon loaded again, four taps and a cache line at a time
        few = self.unit.taps == 4 and self.unit.widths[0] == 64 and g.channels <= 192 and math.prod(g.kernel) <= 9
        order = "columns" if apart and few else "rows" if apart and op.tensors[0].bytes > L2_BYTES else "channels"
        # a block's weights are loaded once a task, and its rows stay in L1 for the next ones: tasks of whole blocks first
        blocks = max(1, g.channels // self.unit.widths[0]) if order == "channels" else 1
        row_tasks, channel_tasks = default_tasks(g, -(-g.out[0] // best["rows"]), MACS_PER_TASK, blocks)
        return best | {"width": self.unit.widths[0], "order": order, "row_tasks": row_tasks, "channel_tasks": channel_tasks}

    def instructions(self, fold: Fold) -> tuple[int, int, int]:
        """Vector instructions of a step: all, those of the two units that multiply, those of the three that multiply or shuffle."""
        plan = fold.plan
        dot = 4 * plan.dots
        spread = (8 if self.unit.taps == 4 else 6) * len(plan.bundles)
        join = (fold.columns - 1) * (sum(len(b.pixels) for b in plan.bundles) + plan.outputs)
        add = 0 if self.unit.taps == 4 else dot
        return dot + add + spread + join + 17 * plan.outputs, dot + 4 * plan.outputs, dot + spread + join + 7 * plan.outputs

    def cycles(self, g: Geometry, point: Mapping[str, Any]) -> float:
        """Estimated cycles of all channel blocks, on four 256-bit units (a 512-bit instruction occupies two).

        A step is bound by its instructions or by those that only some units execute, and half of its loads, one vector per cycle, come on top: weights
        that don't fit the registers beside the accumulators are memory operands. What this picks on a Zen 5 core was within 4 % of the fastest of about
        70 points on seven layers of nine, and within 13 % on all.
        """
        total, widest = 0.0, self.unit.widths[0]
        for width, count in Counter(width for _, width in blocks_of(g.channels, self.unit.widths)).items():
            total += count * self.step_cycles(
                Fold.of(g, width, widest, point, self.unit.taps), bool(point["split"]), (point["rows"], point["columns"]) == (1, 1)
            )
        return float(-(-g.out[0] // point["rows"]) * -(-g.out[1] // point["columns"]) * total)

    def step_cycles(self, fold: Fold, split: bool, least: bool) -> float:
        """Of one tile of one block; infinite for one of too many instructions, unless it is the `least` there is."""
        plan, (total, multiply, shuffled) = fold.plan, self.instructions(fold)
        if total > MAX_STEP and not least:
            return math.inf
        passes, weights = (2 if split else 1), 4 * len(plan.patterns)
        used = (plan.live + 1) * 4 // passes + 4  # accumulators, a bundle, temporaries
        unkept = min(max(used + weights - self.unit.registers, 0), weights) / weights
        pixels = fold.columns * sum(len(b.pixels) for b in plan.bundles)
        loads = 4 * plan.dots * unkept + passes * pixels + 8 * plan.outputs
        return max(total / 2, multiply, shuffled * 2 / 3) + loads / 2 + 5

    def build(self, op: OpCall, params: Mapping[str, Any], target: Target) -> Kernel:
        kernel = ByteKernel(op, params, self.unit)
        size = max(self.instructions(fold)[0] for fold in kernel.folds.values())
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
