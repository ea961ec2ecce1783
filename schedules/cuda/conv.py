"""Rows of convolution and dense layers as tiled matrix products: on tensor cores (wgmma, sm_90a alone; mma.sync) and on dp4a. Weights that all
fit into 4 bits are kept in as many where that is estimated to be no slower."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.schedules.builder import Emitter, make_kernel
from qcompiler.schedules.conv import wrap
from qcompiler.schedules.cuda import gemm_plan as plan
from qcompiler.schedules.cuda.epilogue import Epilogue, finish_arrays
from qcompiler.schedules.cuda.gemm import Gemm
from qcompiler.schedules.cuda.gemm_four import AsynchronousFourBitGemm, FourBitGemm
from qcompiler.schedules.cuda.tail import GoesOn
from qcompiler.schedules.cuda.wgmma import AsynchronousGemm
from qcompiler.schedules.depthwise_plan import refuse_depthwise
from qcompiler.schedules.portable.conv import check_operands
from qcompiler.schedules.table import Kernel, Layout, Need, OpCall, joined, register


@dataclass
class GemmRow(GoesOn):
    """`qc.conv2d` or `qc.dense` on one unit."""

    operator: str
    unit: plan.Unit
    name: str = field(init=False)
    own_channels = False

    def __post_init__(self) -> None:
        self.name = f"{self.unit.name}/{self.operator.removeprefix('qc.')}{'-int4' if self.unit.bits == 4 else ''}"

    @property
    def isa(self) -> str:
        return self.unit.name

    def refuse(self, op: OpCall, target: Target) -> str | None:
        reason = check_operands(op)
        if reason:
            return reason
        x = op.operands[0]
        assert isinstance(x, Layout)
        if x.dtype != "int8":
            return f"the input is stored as {x.dtype}; supported: int8."
        if len(x.shape) == 4 and not self.operator.endswith("dense"):
            if refuse_depthwise(op, wide=True) is None:
                return "a depthwise convolution has a row of its own."
            g = plan.Geometry.of(op)
            if g.groups > 1 and g.inputs % 4:
                return "channels of a group are no multiple of 4."
        elif x.channel_pitch % 4 and len(x.shape) != 4:
            return "rows of the input are not aligned to 4 bytes."
        return self.refuse_weights(op, target)

    def refuse_weights(self, op: OpCall, target: Target) -> str | None:
        """Why another row of the target takes them in the number of bits that it reads."""
        x, weight = op.operands[:2]
        assert isinstance(x, Layout) and isinstance(weight, np.ndarray)
        if not plan.in_four_bits(weight):
            return "some weight lies outside of -8 .. 7, or they are too many." if self.unit.bits == 4 else None
        units = [u for u in plan.UNITS if u.name in target.rows]
        units = [u for u in units if u.columns == units[0].columns]  # dp4a alone, or tensor cores alone
        read = joined(Layout(x.shape, x.dtype), self.needs(op, target)[:1])  # as it will be, whether layouts are decided or not
        g = plan.Geometry.of(replace(op, operands=[read, *op.operands[1:]], output=Layout(op.output.shape, op.output.dtype)))
        best = plan.quickest(g, units, str(target.tvm["arch"]))
        return None if best == self.unit else f"weights in {best.bits} bits are estimated to be quicker by {best.name}."

    def needs(self, op: OpCall, target: Target) -> list[Need]:
        x = op.operands[0]
        assert isinstance(x, Layout)
        channels = x.shape[-1]
        pitch = 1 if len(x.shape) != 4 else 4 if channels <= 4 else 8 if channels <= 8 else 16
        return [Need(pitch=pitch), *[Need() for _ in op.tensors[1:]]]

    def space(self, op: OpCall, target: Target) -> dict[str, list[Any]]:
        return plan.design_space(self.unit, plan.Geometry.of(op))

    def default(self, op: OpCall, target: Target) -> dict[str, Any]:
        return plan.best_tile(plan.Geometry.of(op), self.unit, str(target.tvm["arch"])).params()

    def build(self, op: OpCall, params: Mapping[str, Any], target: Target) -> Kernel:
        g, tile = plan.Geometry.of(op), plan.Tile(**params)
        reason = tile.refuse(self.unit) or tile.refuse_layer(g)
        if reason:
            raise ValueError(f"{self.name}: {reason}")
        weight, bias = (np.asarray(o) for o in op.operands[1:3])
        zero = int(op.attrs["x_zero_point"])
        folded = wrap(bias.astype(np.int64) - zero * weight.reshape(weight.shape[0], -1).astype(np.int64).sum(axis=1))
        channel = np.arange(g.pieces[0] * plan.PIECE)
        channels = np.where(channel < g.outputs, channel + np.arange(g.groups)[:, None] * g.outputs, -1).reshape(-1)
        arrays = [plan.pack(weight, g, self.unit), *finish_arrays(op, folded, channels)]

        def emit(k: Emitter) -> None:
            fill = k.i32(plan.repeated_byte(zero)) if g.bounded else T.int32(0)
            end = Epilogue(k, k.arrays[1:], tile.run(self.unit, g.span), g.outputs, g.groups)
            kinds = (FourBitGemm, AsynchronousFourBitGemm) if self.unit.bits == 4 else (Gemm, AsynchronousGemm)
            kinds[self.unit.warps > 1](k, g, tile, self.unit, fill).emit(end)

        threads = tile.tiles(g) * tile.split_k * tile.threads
        shared = {} if tile.split_k == 1 else {"scratch": tile.scratch(g), "counters": tile.tiles(g)}
        macs = g.pixels * weight.size
        return make_kernel(self.name, op, target, emit, arrays=arrays, macs=macs, threads=threads, block=tile.threads, params=params, **shared)


for _kind in ("qc.conv2d", "qc.dense"):
    for _unit in plan.UNITS:
        register(_kind, GemmRow(_kind, _unit))
