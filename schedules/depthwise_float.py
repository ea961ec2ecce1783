"""Depthwise float32 convolution on x86 and 64-bit ARM: FMA over lanes of channels.

A step computes a tile of outputs of one channel vector. Input pixels are visited row by row, each loaded once for all outputs that it touches;
the weights of the kernel rows in use stay in registers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.schedules.builder import make_kernel
from qcompiler.schedules.depthwise_nest import DepthwiseNest
from qcompiler.schedules.depthwise_plan import Geometry, blocks_of, default_tasks, plan_taps, refuse_depthwise
from qcompiler.schedules.isa import call, load
from qcompiler.schedules.table import Kernel, Need, OpCall

MACS_PER_TASK = 200_000


class FloatKernel(DepthwiseNest):
    """A float32 depthwise kernel while it is written. Constants: weights [block][tap][lane] and bias [block][lane]."""

    def __init__(self, op: OpCall, params: Mapping[str, Any], widths: tuple[int, ...]) -> None:
        blocks = blocks_of(op.output.shape[3], [w for w in widths if w <= int(params["width"])])
        super().__init__(op, blocks, params)
        g = self.g
        plan = plan_taps(g.kernel, g.strides, g.dilation, self.tile, 1, "tall")  # a bundle is a pixel, a pattern is a tap
        self.taps = [pattern[0] for pattern in plan.patterns]
        self.pixels = sorted(plan.bundles, key=lambda b: b.pixels)  # row by row
        self.residual = op.tensors[1] if len(op.tensors) > 1 else None

    def build(self, row: str, target: Target) -> Kernel:
        w, bias = np.asarray(self.op.operands[1], np.float32)[..., 0], np.asarray(self.op.operands[2], np.float32)
        spare = max(first + width for first, width in self.blocks) - len(w)
        w, bias = (np.pad(v, [(0, spare)] + [(0, 0)] * (v.ndim - 1)) for v in (w, bias))
        lanes = [np.arange(first, first + width) for first, width in self.blocks]
        weights = np.concatenate([w[c, tap[0], tap[1]] for c in lanes for tap in self.taps if tap is not None])
        arrays = [weights, bias[np.concatenate(lanes)]]
        return make_kernel(row, self.op, target, self.emit, tasks=self.tasks.count, arrays=arrays, macs=self.g.macs, facts=self.params)

    def prepare(self) -> None:
        self.low, self.high = self.k.f32(self.op.attrs["low"]), self.k.f32(self.op.attrs["high"])

    def step(self, source: Any, at: tuple[Any, Any, Any, Any], packed: Any, width: int) -> None:
        weights, bias = self.k.arrays
        out = self.place(self.op.output, at)
        residual = self.place(self.residual, at) if self.residual else None
        first = T.bind(packed * len(self.taps))
        last_use = {o: i for i, pixel in enumerate(self.pixels) for o, _ in pixel.uses}
        acc: dict[int, Any] = {}
        for i, pixel in enumerate(self.pixels):
            x = T.bind(self.pixel(source, *pixel.pixels[0], width))
            for o, tap in pixel.uses:
                total = acc.pop(o) if o in acc else load(bias, packed, width)
                total = T.bind(call(f"float32x{width}", "llvm.fma", x, load(weights, first + tap * width, width), total))
                if last_use[o] > i:
                    acc[o] = total
                    continue
                if residual is not None:
                    total = total + load(self.k.inputs[1], residual(o), width)
                self.save(out(o), 0, T.min(T.max(total, T.broadcast(self.low, width)), T.broadcast(self.high, width)), width)


@dataclass(frozen=True)
class FloatDepthwiseRow:
    """`qc.f32.conv2d` with one input channel per output channel.

    Tunables, besides those of `DepthwiseNest`: `width`, lanes of the widest vector.
    """

    name: str
    isa: str
    widths: tuple[int, ...]
    own_channels = True

    def refuse(self, op: OpCall, target: Target) -> str | None:
        return refuse_depthwise(op)

    def needs(self, op: OpCall, target: Target) -> list[Need]:
        g = Geometry.of(op)
        pitch = self.widths[-1] if g.channels < self.widths[-1] else 1  # the narrowest vector is read whole
        return [Need(halo=g.padding, pitch=pitch), *[Need(pitch=pitch)] * (len(op.tensors) - 1)]

    def space(self, op: OpCall, target: Target) -> dict[str, list[Any]]:
        height, width = Geometry.of(op).out
        return {
            "rows": [r for r in (1, 2, 3, 4) if r <= height],
            "columns": [c for c in (1, 2, 4, 7, 8) if c <= width],
            "width": list(self.widths),
            "order": ["channels", "rows"],
            "row_tasks": [1, 2, 4, 8, 16],
            "channel_tasks": [1, 2, 4, 8],
        }

    def default(self, op: OpCall, target: Target) -> dict[str, Any]:
        g = Geometry.of(op)
        columns = min((c for c in (8, 7, 4) if c <= g.out[1]), key=lambda c: -(-g.out[1] // c) * c, default=g.out[1])
        row_tasks, channel_tasks = default_tasks(g, g.out[0], MACS_PER_TASK)
        return {"rows": 1, "columns": columns, "width": self.widths[0], "order": "channels", "row_tasks": row_tasks, "channel_tasks": channel_tasks}

    def build(self, op: OpCall, params: Mapping[str, Any], target: Target) -> Kernel:
        return FloatKernel(op, params, self.widths).build(self.name, target)
