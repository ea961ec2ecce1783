"""The row template of convolution and dense layers: what it refuses and needs, its design space, its heuristic, its constants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from qcompiler.schedules.conv_kernel import ConvKernel, Epilogue, Parameters, subgroups_of
from qcompiler.schedules.conv_plan import Geometry, Tiling, default_tiling, design_space, geometry_of, merge_groups, merge_weight, pack, pack_lanes
from qcompiler.schedules.table import Kernel, Layout, Need, OpCall, kernel_key
from qcompiler.schedules.x86.isa import Isa
from qcompiler.targets import Target

_FLOAT_MAX = 3.4028234663852886e38


@dataclass(frozen=True)
class ConvRow:
    """`qc.conv2d`, `qc.dense`, `qc.f32.conv2d` or `qc.f32.dense` on one ISA."""

    operator: str
    unit: Isa
    isa: str

    @property
    def name(self) -> str:
        return f"{self.isa}/{self.operator.removeprefix('qc.')}"

    def refuse(self, op: OpCall, target: Target) -> str | None:
        x, weight = op.operands[0], op.operands[1]
        if not isinstance(x, Layout) or not all(isinstance(o, np.ndarray) for o in op.operands[1 : 3 if self.unit.kind == "fma" else 4]):
            return "the input must be computed at run time, and weight, bias and multiplier must be constants."
        assert isinstance(weight, np.ndarray)
        if x.dtype != self.unit.input_dtype:
            return f"the input is stored as {x.dtype}; supported: {self.unit.input_dtype}."
        if self.operator.endswith("conv2d") and (len(x.shape) != 4 or weight.ndim != 4):
            return f"the input has rank {len(x.shape)} and the weight rank {weight.ndim}; supported: 4 and 4."
        if self.unit.kind != "fma" and op.output.dtype == "float32" and len(op.tensors) == 2:
            return "a residual needs an 8-bit output."
        return None

    def geometry(self, op: OpCall) -> tuple[Geometry, int]:
        return merge_groups(geometry_of(op), self.unit)

    def needs(self, op: OpCall, target: Target) -> list[Need]:
        if self.operator.endswith("dense"):
            return [Need() for _ in op.tensors]
        geometry, _ = self.geometry(op)
        group = self.unit.group
        pitch = 1
        if geometry.inputs % group:  # whole groups must lie within the pixel
            pitch = (geometry.groups - 1) * geometry.inputs + -(-geometry.inputs // group) * group
            pitch = -(-pitch // group) * group
        return [Need(halo=geometry.halo(), pitch=pitch), *[Need() for _ in op.tensors[1:]]]

    def space(self, op: OpCall, target: Target) -> dict[str, list[Any]]:
        return design_space(self.geometry(op)[0], self.unit)

    def default(self, op: OpCall, target: Target) -> dict[str, Any]:
        return default_tiling(self.geometry(op)[0], self.unit).params()

    def build(self, op: OpCall, params: Mapping[str, Any], target: Target) -> Kernel:
        geometry, joined = self.geometry(op)
        tiling = Tiling(**params)
        epilogue = self.epilogue(op)
        emitter = ConvKernel(geometry, self.unit, tiling, epilogue)
        weight, bias = (np.asarray(o) for o in op.operands[1:3])
        weight = weight.reshape(weight.shape[0], 1, 1, -1) if weight.ndim == 2 else weight
        order = subgroups_of(emitter.channels) if epilogue.packed else None
        groups = geometry.groups
        constants = [pack(merge_weight(weight, groups * joined, joined), self.unit, emitter.channels, order)]
        if self.unit.kind == "fma":
            constants.append(pack_lanes(bias.astype(np.float32), self.unit, emitter.channels, groups, order))
        else:
            # sum((u - 128 - zx) * w) = sum(u * w) - (zx + 128) * sum(w), for storage u = q + 128
            shift = int(op.attrs["x_zero_point"]) + 128
            folded = bias.astype(np.int64) - shift * weight.astype(np.int64).sum(axis=(1, 2, 3))
            wrapped = folded.astype(np.uint64).astype(np.uint32).view(np.int32)
            constants.append(pack_lanes(wrapped, self.unit, emitter.channels, groups, order))
            multiplier = np.asarray(op.operands[3], np.float32)
            constants.append(pack_lanes(multiplier, self.unit, emitter.channels, groups, order))
        constants.append(self.parameters(op))
        key = kernel_key("conv", self.unit, geometry, tiling, epilogue)
        return Kernel(emitter.build(), emitter.tasks, constants, key, self.name, macs=geometry_of(op).macs, params=tiling.params())

    def epilogue(self, op: OpCall) -> Epilogue:
        residual, attrs = len(op.tensors) == 2, op.attrs
        if self.unit.kind == "fma":
            return Epilogue("float32", residual, float(attrs["low"]) > -_FLOAT_MAX, float(attrs["high"]) < _FLOAT_MAX, True)
        if op.output.dtype == "float32":
            return Epilogue("float32", False, attrs.get("float_low") is not None, attrs.get("float_high") is not None, True)
        weight, bias, multiplier = (np.abs(np.asarray(o, np.float64)) for o in op.operands[1:4])
        largest = (bias + 255 * weight.reshape(weight.shape[0], -1).sum(axis=1)) * multiplier
        exact = bool((largest < 2**30).all()) and int(attrs.get("residual_shift") or 1) > 0
        return Epilogue(op.output.dtype, residual, attrs["low"] > -128, attrs["high"] < 127, exact)

    def parameters(self, op: OpCall) -> np.ndarray:
        """See `Parameters`."""
        a, made = op.attrs, Parameters(self.unit)
        if self.unit.kind == "fma":
            return made.array(0, 0, 0, 0, 0, 1.0, float(a["low"]), float(a["high"]))
        if op.output.dtype == "float32":
            low, high = a.get("float_low"), a.get("float_high")
            return made.array(0, 0, 0, 0, 0, 1.0, -_FLOAT_MAX if low is None else low, _FLOAT_MAX if high is None else high)
        offset = 128 if op.output.dtype == "uint8" else 0
        factor, shift, zero = 0, 0, 0
        if len(op.tensors) == 2:
            factor, shift = int(a["residual_multiplier"]), int(a["residual_shift"])
            zero = int(a["residual_zero_point"])
        constant = int(np.int64(-(zero + 128) * factor).astype(np.int32))
        return made.array(int(a["zero_point"]) + offset, int(a["low"]) + offset, int(a["high"]) + offset, factor, constant, 2.0**-shift, 0.0, 0.0)
