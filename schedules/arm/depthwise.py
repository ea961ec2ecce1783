"""Depthwise convolution on ARM, 8 channels at a time. The halo holds the zero point, whose share of the sum is folded into the bias.

With SDOT, kernel taps fill the instruction: the pixels of a bundle of up to four taps (`depthwise_plan`) are interleaved channel by channel by
ZIP1 and ZIP2, once for all outputs of the register tile that touch the bundle, and each SDOT does 4 taps x 4 channels.

Without it, SMULL and SMLAL multiply 8 channels of one tap; two products are summed in int16, which is exact for weights in [-127, 127]
(2 * 128 * 127 < 2^15), and SADDW adds the sums to int32.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.numerics.spec import RESIDUAL_LIMIT
from qcompiler.schedules.arm.isa import DOTPROD, FLOAT, I8MM, NEON, NEON32, Arm
from qcompiler.schedules.builder import make_kernel
from qcompiler.schedules.conv_epilogue import by_sign
from qcompiler.schedules.depthwise_float import FloatDepthwiseRow
from qcompiler.schedules.depthwise_nest import DepthwiseNest
from qcompiler.schedules.depthwise_plan import Geometry, TapPlan, blocks_of, default_tasks, plan_taps, refuse_depthwise
from qcompiler.schedules.isa import call, load, scalar, shuffle
from qcompiler.schedules.table import Kernel, Need, OpCall, register

WIDTH = 8  # channels of a vector
MAX_STEP = 450  # vector instructions of one tile: bounds code size and the time LLVM takes for it
MACS_PER_TASK = 200_000
L2_BYTES = 512 << 10  # of the cores this is made for; an input beyond it is better read once


class ByteKernel(DepthwiseNest):
    """An int8 kernel while it is written. `taps` of a bundle share a dot. Weights are packed [block][pattern][channel][tap of the bundle]."""

    taps: int

    def __init__(self, op: OpCall, params: Mapping[str, Any], unit: Arm) -> None:
        super().__init__(op, blocks_of(op.output.shape[3], (WIDTH,)), params)
        g, self.unit = self.g, unit
        self.plan = plan_taps(g.kernel, g.strides, g.dilation, self.tile, self.taps, str(params["leftover"]))
        self.residual = op.tensors[1] if len(op.tensors) > 1 else None

    def build(self, row: str, target: Target) -> Kernel:
        w, bias, multiplier = (np.asarray(o) for o in self.op.operands[1:4])
        w = w[..., 0]
        folded = bias.astype(np.int64) - int(self.op.attrs["x_zero_point"]) * w.astype(np.int64).sum((1, 2))
        multiplier = multiplier.reshape(-1, len(w))  # a second row: for negative numbers
        peak = (np.abs(folded) + 128 * np.abs(w.astype(np.int64)).sum((1, 2))) * np.abs(multiplier.astype(np.float64))
        self.bounded = float(peak.max(initial=0.0)) < RESIDUAL_LIMIT
        order = np.concatenate([np.arange(first, first + WIDTH) for first, _ in self.blocks])
        spare = max(0, int(order.max()) + 1 - len(w))  # lanes past the last channel
        w, folded = (np.pad(v, [(0, spare)] + [(0, 0)] * (v.ndim - 1)) for v in (w, folded))
        multiplier = np.pad(multiplier, [(0, 0), (0, spare)])
        self.rows, self.row = len(multiplier), len(order)
        placed = np.zeros((len(self.plan.patterns), len(order), self.taps), np.int8)
        for p, pattern in enumerate(self.plan.patterns):
            for slot, tap in enumerate(pattern):
                if tap is not None:
                    placed[p, :, slot] = w[order, tap[0], tap[1]]
        weights = placed.reshape(len(self.plan.patterns), len(self.blocks), WIDTH, self.taps).transpose(1, 0, 2, 3)
        arrays = [np.ascontiguousarray(weights).reshape(-1), folded[order].astype(np.int32), multiplier[:, order].astype(np.float32).reshape(-1)]
        facts = (self.params, self.bounded)
        return make_kernel(row, self.op, target, self.emit, tasks=self.tasks.count, arrays=arrays, macs=self.g.macs, facts=facts)

    def prepare(self) -> None:
        a, k, self.dtype = self.op.attrs, self.k, self.op.output.dtype
        self.bends_sum = bool(a.get("bends_sum"))
        if self.dtype == "float32":
            self.float_bounds = [None if a.get(n) is None else k.f32(a[n]) for n in ("float_low", "float_high")]
            return
        zero, low, high = (int(a[name]) for name in ("zero_point", "low", "high"))
        self.zero = T.bind(T.Cast("int16", k.i32(zero)))
        self.bounds = [T.bind(T.Cast("int8", k.i32(v))) for v in (low, high)] if (low, high) != (-128, 127) else None
        if self.residual:
            self.residual_zero, self.factor = k.i32(int(a["residual_zero_point"])), k.i32(int(a["residual_multiplier"]))
            self.scale = k.f32(2.0 ** -int(a["residual_shift"]))

    @abstractmethod
    def sums(self, source: Any, packed: Any, done: Any) -> None:
        """Emit the tile's sums: `done(output, [int32x4 of channels 0 to 3, of 4 to 7])` as each is complete, once per output."""

    def step(self, source: Any, at: tuple[Any, Any, Any, Any], packed: Any, width: int) -> None:
        out = self.place(self.op.output, at)
        residual = self.place(self.residual, at) if self.residual else None
        self.last_use = {o: i for i, bundle in enumerate(self.plan.bundles) for o, _ in bundle.uses}
        self.sums(source, packed, lambda o, acc: self.finish(acc, packed, out(o), None if residual is None else residual(o)))

    def finish(self, acc: list[Any], packed: Any, index: Any, residual: Any) -> None:
        """Requantize and store one output."""
        multipliers = [load(self.k.arrays[2], packed + 4 * i, 4) for i in range(2)]
        negative = [load(self.k.arrays[2], packed + (self.row + 4 * i), 4) for i in range(2)] if self.rows > 1 else []
        if negative and not self.bends_sum:
            multipliers = [by_sign(a, m, n, 4) for a, m, n in zip(acc, multipliers, negative, strict=True)]
        scaled = [T.Cast("float32x4", a) * m for a, m in zip(acc, multipliers, strict=True)]
        if self.dtype == "float32":
            low, high = self.float_bounds
            for i, value in enumerate(scaled):
                value = value if low is None else T.max(value, T.broadcast(low, 4))
                self.save(index, 4 * i, value if high is None else T.min(value, T.broadcast(high, 4)), 4)
            return
        if not self.bounded:
            limit = float(RESIDUAL_LIMIT)
            scaled = [T.max(T.min(v, scalar(limit, "float32", 4)), scalar(-limit, "float32", 4)) for v in scaled]
        ints = [self.unit.to_int(v) for v in scaled]
        if residual is not None:
            r = T.bind(T.Cast("int16x8", load(self.k.inputs[1], residual, WIDTH)))
            parts = [T.Cast("int32x4", shuffle([r], range(i, i + 4))) - T.broadcast(self.residual_zero, 4) for i in (0, 4)]
            ints = [t + part * T.broadcast(self.factor, 4) for t, part in zip(ints, parts, strict=True)]
            scales = [T.broadcast(self.scale, 4)] * 2
            if self.bends_sum:
                ints = [T.bind(t) for t in ints]
                scales = [by_sign(t, s, n, 4) for t, s, n in zip(ints, scales, negative, strict=True)]
            ints = [self.unit.to_int(T.Cast("float32x4", t) * s) for t, s in zip(ints, scales, strict=True)]
        words = shuffle([self.unit.narrow("int16x4", i) for i in ints], range(WIDTH))
        words = call("int16x8", "llvm.sadd.sat", words, T.broadcast(self.zero, WIDTH))  # saturating: an excess must not wrap
        value = self.unit.narrow("int8x8", words)
        if self.bounds:
            value = T.min(T.max(value, T.broadcast(self.bounds[0], WIDTH)), T.broadcast(self.bounds[1], WIDTH))
        self.save(index, 0, T.bind(value), WIDTH)


class DotKernel(ByteKernel):
    """Bundles of four taps, two SDOT per bundle and output."""

    taps = 4

    def sums(self, source: Any, packed: Any, done: Any) -> None:
        weights, bias, _ = self.k.arrays
        first = T.bind(packed * (len(self.plan.patterns) * self.taps))
        acc: dict[int, list[Any]] = {}
        for i, bundle in enumerate(self.plan.bundles):
            pixels = [T.bind(self.pixel(source, r, c, WIDTH)) for r, c in bundle.pixels]
            taps = pixels + [pixels[-1]] * (self.taps - len(pixels))  # weights of absent taps are 0: any value will do
            pairs = [T.bind(_zip(taps[t], taps[t + 1])) for t in (0, 2)]  # 8 channels x 2 taps
            halves = [T.bind(shuffle(pairs, [16 * (e % 2) + 8 * half + 2 * (e // 2) + b for e in range(8) for b in (0, 1)])) for half in (0, 1)]
            for o, p in bundle.uses:
                total = acc.pop(o, None) or [load(bias, packed + 4 * h, 4) for h in (0, 1)]
                w = [load(weights, first + (2 * p + h) * 16, 16) for h in (0, 1)]
                total = [T.bind(call("int32x4", "llvm.aarch64.neon.sdot.v4i32.v16i8", t, x, v)) for t, x, v in zip(total, halves, w, strict=True)]
                if self.last_use[o] > i:
                    acc[o] = total
                else:
                    done(o, total)


class MullKernel(ByteKernel):
    """A bundle is a pixel. Products are summed two by two in int16, then added to int32."""

    taps = 1

    def sums(self, source: Any, packed: Any, done: Any) -> None:
        weights, bias, _ = self.k.arrays
        first = T.bind(packed * len(self.plan.patterns))
        acc: dict[int, list[Any]] = {}
        pending: dict[int, Any] = {}
        for i, bundle in enumerate(self.plan.bundles):
            x = T.bind(self.pixel(source, *bundle.pixels[0], WIDTH))
            for o, p in bundle.uses:
                words = self.unit.mull(x, load(weights, first + p * WIDTH, WIDTH))
                last = self.last_use[o] == i
                if o not in pending and not last:
                    pending[o] = T.bind(words)
                    continue
                words = T.bind(pending.pop(o) + words if o in pending else words)
                total = acc.pop(o, None) or [load(bias, packed + 4 * h, 4) for h in (0, 1)]
                total = [T.bind(t + T.Cast("int32x4", shuffle([words], range(4 * h, 4 * h + 4)))) for h, t in enumerate(total)]
                if last:
                    done(o, total)
                else:
                    acc[o] = total


def _zip(a: Any, b: Any) -> Any:
    """ZIP1: alternating elements of two int8x8."""
    return shuffle([a, b], [side * 8 + i for i in range(8) for side in (0, 1)])


@dataclass(frozen=True)
class DepthwiseRow:
    """`qc.conv2d` with one input channel per output channel.

    Tunables, besides those of `DepthwiseNest`: `leftover`, see `plan_taps`.
    """

    name: str
    isa: str
    unit: Arm
    kernel: type[ByteKernel]
    own_channels = True

    def refuse(self, op: OpCall, target: Target) -> str | None:
        reason = refuse_depthwise(op)
        if reason is None and any(t.dtype != "int8" for t in op.tensors):
            reason = "activations must be stored as int8."
        return reason or (self.unit.refuse(1, 1, np.asarray(op.operands[1])) if self.unit.kind == "mull" else None)

    def needs(self, op: OpCall, target: Target) -> list[Need]:
        g = Geometry.of(op)
        pitch = WIDTH if g.channels < WIDTH else 1  # a vector is read whole
        return [Need(halo=g.padding, pitch=pitch), *[Need(pitch=pitch)] * (len(op.tensors) - 1)]

    def space(self, op: OpCall, target: Target) -> dict[str, list[Any]]:
        height, width = Geometry.of(op).out
        return {
            "rows": [r for r in (1, 2, 3, 4) if r <= height],
            "columns": [c for c in (1, 2, 3, 4, 5, 6, 7, 8) if c <= width],
            "leftover": ["tall", "wide"] if self.kernel.taps > 1 else ["tall"],
            "order": ["channels", "rows"],
            "row_tasks": [1, 2, 4, 8, 16],
            "channel_tasks": [1, 2, 4, 8],
        }

    def default(self, op: OpCall, target: Target) -> dict[str, Any]:
        g, space = Geometry.of(op), self.space(op, target)
        keys = ("rows", "columns", "leftover")
        points = [dict(zip(keys, p, strict=True)) for p in product(*(space[k] for k in keys))]
        best = min(points, key=lambda p: self.cycles(g, p))
        row_tasks, channel_tasks = default_tasks(g, -(-g.out[0] // best["rows"]), MACS_PER_TASK)
        order = "rows" if g.channels > WIDTH and op.tensors[0].bytes > L2_BYTES else "channels"  # blocks share cache lines
        return best | {"order": order, "row_tasks": row_tasks, "channel_tasks": channel_tasks}

    def cycles(self, g: Geometry, point: Mapping[str, Any]) -> float:
        """Estimated cycles of a channel block, with two vector units (one of which multiplies without SDOT) and two load units."""
        tile = (int(point["rows"]), int(point["columns"]))
        plan = plan_taps(g.kernel, g.strides, g.dilation, tile, self.kernel.taps, str(point["leftover"]))
        if self.kernel.taps == 4:
            vector, multiply, live = 2 * plan.dots + 4 * len(plan.bundles), 0, 2 * plan.live + 4
        else:
            vector, multiply, live = 2 * plan.dots + 2 * plan.outputs, plan.dots, 3 * plan.live + 2
        vector += 14 * plan.outputs
        if vector > MAX_STEP and tile != (1, 1):
            return float("inf")
        loads = sum(len(b.pixels) for b in plan.bundles) + self.held(plan) * plan.dots
        spilled = max(0, live - self.unit.registers) * len(plan.bundles)
        step = max((vector + spilled) / 2, float(multiply), (loads + spilled) / 2) + 4
        return -(-g.out[0] // tile[0]) * -(-g.out[1] // tile[1]) * step

    def held(self, plan: TapPlan) -> float:
        """Loads of weights per dot of a bundle: those that don't fit beside the accumulators are loaded at each use."""
        vectors = len(plan.patterns) * (2 if self.kernel.taps == 4 else 1)
        free = max(0, self.unit.registers - (2 if self.kernel.taps == 4 else 3) * plan.live - 6)
        return (2 if self.kernel.taps == 4 else 1) * max(0, vectors - free) / vectors

    def build(self, op: OpCall, params: Mapping[str, Any], target: Target) -> Kernel:
        return self.kernel(op, params, self.unit).build(self.name, target)


# Cores with the matrix instruction use SDOT here, whose taps it would multiply with zeros.
for _isa, _unit, _kernel in (
    (I8MM.name, DOTPROD, DotKernel),
    (DOTPROD.name, DOTPROD, DotKernel),
    (NEON.name, NEON, MullKernel),
    (NEON32.name, NEON32, MullKernel),
):
    register("qc.conv2d", DepthwiseRow(f"{_isa}/depthwise", _isa, _unit, _kernel))
register("qc.f32.conv2d", FloatDepthwiseRow(f"{FLOAT.name}/f32-depthwise", FLOAT.name, (4,)))
