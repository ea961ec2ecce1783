"""The row template of convolution and dense layers: what it refuses and needs, its design space, its heuristic, its constants."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qcompiler.base.targets import Target
from qcompiler.numerics.arithmetic import limits
from qcompiler.schedules import conv_plan as plan
from qcompiler.schedules.builder import canonical, offset_of
from qcompiler.schedules.conv_epilogue import FLOAT_MAX, Epilogue, Parameters
from qcompiler.schedules.conv_kernel import ConvKernel
from qcompiler.schedules.conv_steps import sort_steps
from qcompiler.schedules.isa import Isa
from qcompiler.schedules.table import Kernel, Layout, Need, OpCall, kernel_key

HEADROOM = 2.0
"""How many times larger constants may grow that replace an operator's while its code stays: code trusts that sums times multipliers stay below 2^30 only where
this many times as much would. Attribute `headroom` of an operator stands in its place."""
ALIKE = 0.02  # of an operator's estimated time, that constants packed alike for several shapes may cost at one of them


@dataclass
class ConvRow:
    """`qc.conv2d`, `qc.dense`, `qc.f32.conv2d` or `qc.f32.dense` on one ISA."""

    operator: str
    unit: Isa
    isa: str
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = f"{self.isa}/{self.operator.removeprefix('qc.')}"

    @property
    def own_channels(self) -> bool:
        return self.operator.endswith("conv2d")

    def refuse(self, op: OpCall, target: Target) -> str | None:
        constants = 3 if self.unit.is_float else 4
        x, weight = op.operands[0], op.operands[1]
        if not isinstance(x, Layout) or not all(isinstance(o, np.ndarray) for o in op.operands[1:constants]):
            return "the input must be computed at run time, and weight, bias and multiplier must be constants."
        assert isinstance(weight, np.ndarray)
        if x.dtype != self.unit.input_dtype:
            return f"the input is stored as {x.dtype}; supported: {self.unit.input_dtype}."
        if self.operator.endswith("conv2d") and (len(x.shape) != 4 or weight.ndim != 4):
            return f"the input has rank {len(x.shape)} and the weight rank {weight.ndim}; supported: 4 and 4."
        for residual in op.operands[constants:]:
            supported = [self.unit.input_dtype, *([] if self.unit.is_float else ["int16"])]
            if not isinstance(residual, Layout) or residual.dtype not in supported:
                return f"the residual must be computed at run time and stored as {' or '.join(supported)}."
            if op.output.dtype == "float32" != self.unit.input_dtype:
                return "a residual needs an output of 8 or 16 bits."
        if op.output.dtype == "int16" and (self.unit.is_float or op.attrs.get("zero_point", 0)):
            return "a 16-bit output must have the zero point 0."
        geometry, _ = self.geometry(op)
        return self.unit.refuse(geometry.pixels[1] * geometry.pixels[2], geometry.inputs, weight)

    def geometry(self, op: OpCall) -> tuple[plan.Geometry, int]:
        geometry, joined = plan.merge_groups(plan.geometry_of(op), self.unit)
        return plan.wrapped(geometry, self.unit), joined

    def needs(self, op: OpCall, target: Target) -> list[Need]:
        if self.operator.endswith("dense"):
            return [Need() for _ in op.tensors]
        return [Need(halo=self.geometry(op)[0].halo(), pitch=self.pitch(op)), *[Need() for _ in op.tensors[1:]]]

    def pitch(self, op: OpCall) -> int:
        """Of the input: whole groups must lie within the pixel."""
        geometry, group = self.geometry(op)[0], self.unit.group
        if geometry.inputs % group == 0:
            return 1
        pitch = (geometry.groups - 1) * geometry.inputs + -(-geometry.inputs // group) * group
        return -(-pitch // group) * group

    def space(self, op: OpCall, target: Target) -> dict[str, list[Any]]:
        return plan.design_space(self.geometry(op)[0], self.unit)

    def default(self, op: OpCall, target: Target) -> dict[str, Any]:
        return plan.default_tiling(self.geometry(op)[0], self.unit).params()

    def alike(self, ops: Sequence[OpCall], target: Target) -> list[dict[str, Any]]:
        own = [self.default(op, target) for op in ops]
        if len({p["blocks"] for p in own}) == 1:
            return own
        least = [self.within(op, target, p["blocks"])[0] for op, p in zip(ops, own, strict=True)]
        found = [[self.within(op, target, blocks) for op in ops] for blocks in sorted({p["blocks"] for p in own})]
        cost, best = min(((max(c / a for (c, _), a in zip(points, least, strict=True)), i) for i, points in enumerate(found)))
        return [params for _, params in found[best]] if cost <= 1 + ALIKE else own

    def within(self, op: OpCall, target: Target, blocks: int) -> tuple[float, dict[str, Any]]:
        """Estimated cycles of the best point of so many blocks, by which channels are packed; the point."""
        geometry = self.geometry(op)[0]
        tile = plan.best_tile(geometry, self.unit, [blocks])
        return plan.cycles(geometry, self.unit, *tile), plan.tiling_of(geometry, self.unit, tile).params()

    def build(self, op: OpCall, params: Mapping[str, Any], target: Target) -> Kernel:
        geometry, joined = self.geometry(op)
        tiling = plan.Tiling(**params)
        epilogue = self.epilogue(op)
        emitter = self.kernel(geometry, tiling, epilogue)
        weight, *lanes = (np.asarray(o) for o in op.operands[1 : 3 if self.unit.is_float else 4])
        weight = weight.reshape(weight.shape[0], 1, 1, -1) if weight.ndim == 2 else weight
        constants = [*self.constants(op, weight, lanes, emitter, joined), self.parameters(op)]
        key = kernel_key("conv", self.unit, geometry, tiling, epilogue)
        macs, scratch = plan.geometry_of(op).macs, emitter.tasks * emitter.scratch
        return Kernel(emitter.build, emitter.tasks, constants, key, self.name, scratch, macs, tiling.params())

    def constants(self, op: OpCall, weight: np.ndarray, lanes: Sequence[np.ndarray], emitter: ConvKernel, joined: int) -> list[np.ndarray]:
        """weight [O, KH, KW, I/groups], and of each channel the bias and (int8) the multipliers, packed."""
        bias, groups, packed = lanes[0], emitter.g.groups, emitter.epilogue.packed
        constants, absent = self.pack(plan.merge_weight(weight, groups * joined, joined), emitter)
        if self.unit.is_float:
            return [*constants, plan.pack_lanes(bias.astype(np.float32), self.unit, emitter.channels, groups, packed)]
        # sum((u - offset - zx) * w) = sum(u * w) - (zx + offset) * sum(w), for storage u = q + offset
        shift = int(op.attrs["x_zero_point"]) + self.unit.storage_offset
        folded = bias.astype(np.int64) - shift * weight.astype(np.int64).sum(axis=(1, 2, 3))
        sums = wrap(plan.pack_lanes(folded, self.unit, emitter.channels, groups, packed) + np.reshape(absent, -1))
        return [*constants, sums, self.multipliers(lanes[1], emitter, groups)]

    def multipliers(self, rows: np.ndarray, emitter: ConvKernel, groups: int) -> np.ndarray:
        """[O], or [2, O] with those of negative numbers: a vector of each row in turn."""
        each, packed = rows.astype(np.float32).reshape(emitter.multipliers, -1), emitter.epilogue.packed
        lanes = [plan.pack_lanes(row, self.unit, emitter.channels, groups, packed) for row in each]
        return np.stack([row.reshape(-1, self.unit.lanes) for row in lanes], axis=1).reshape(-1)

    def kernel(self, geometry: plan.Geometry, tiling: plan.Tiling, epilogue: Epilogue) -> ConvKernel:
        return ConvKernel(geometry, self.unit, tiling, epilogue)

    def pack(self, weight: np.ndarray, emitter: ConvKernel) -> tuple[list[np.ndarray], np.ndarray]:
        """For weights [G, O, KH, KW, I], the constants that hold them, and what is missing of each lane's sum."""
        steps = plan.steps_of(weight, self.unit, emitter.channels, emitter.epilogue.packed)
        if emitter.sorted:
            packed, table, absent = sort_steps(steps, emitter.g, self.unit, emitter.channels)
            return [packed, table], absent
        form = self.unit.forms[-1]
        return [plan.pack(steps, form, emitter.channels)], form.missing(steps).sum(2)

    def epilogue(self, op: OpCall) -> Epilogue:
        residual, attrs = len(op.tensors) == 2, op.attrs
        bends = "" if self.unit.is_float or len(op.operands[3].shape) == 1 else "sum" if attrs.get("bends_sum") else "accumulator"
        if self.unit.is_float:
            return Epilogue("float32", residual, float(attrs["low"]) > -FLOAT_MAX, float(attrs["high"]) < FLOAT_MAX, True)
        if op.output.dtype == "float32":
            return Epilogue("float32", False, attrs.get("float_low") is not None, attrs.get("float_high") is not None, True, bends=bends)
        weight, bias, multiplier = (np.abs(np.asarray(o, np.float64)) for o in op.operands[1:4])
        largest = (bias + 255 * weight.reshape(weight.shape[0], -1).sum(axis=1)) * multiplier.reshape(-1, weight.shape[0])
        exact = bool((largest * op.attrs.get("headroom", HEADROOM) < 2**30).all())
        if op.output.dtype == "int16":
            return Epilogue("int16", residual, True, True, exact, bends=bends)
        offset = attrs.get("zero_point", 0) + offset_of(op.output.dtype) != 0
        return Epilogue(op.output.dtype, residual, attrs.get("low", -128) > -128, attrs.get("high", 127) < 127, exact, offset, bends)

    def parameters(self, op: OpCall) -> np.ndarray:
        """See `Parameters`."""
        a, made = op.attrs, Parameters(self.unit)
        if self.unit.is_float:
            return made.array(bounds=(float(a["low"]), float(a["high"])))
        if op.output.dtype == "float32":
            low, high = a.get("float_low"), a.get("float_high")
            return made.array(bounds=(-FLOAT_MAX if low is None else low, FLOAT_MAX if high is None else high))
        residual = (0, 0, 0.0)
        if len(op.tensors) > 1:
            factor, zero = int(a["residual_multiplier"]), int(a.get("residual_zero_point", 0)) + offset_of(op.tensors[1].dtype)
            residual = (factor, wrap(-zero * factor), 2.0 ** -int(a.get("residual_shift", 0)))
        low, high = limits(canonical(op.output.dtype), a.get("low"), a.get("high"))
        if op.output.dtype == "int16":
            return made.array(residual=residual, bounds=(low, high))
        offset = offset_of(op.output.dtype)
        return made.array((int(a.get("zero_point", 0)) + offset, low + offset, high + offset), residual)


def wrap(value: Any) -> Any:
    """Integers (a number or an int64 array) modulo 2^32, as int32."""
    wrapped = (np.asarray(value, np.int64) & 0xFFFFFFFF).astype(np.uint32).view(np.int32)
    return wrapped if wrapped.ndim else int(wrapped)
