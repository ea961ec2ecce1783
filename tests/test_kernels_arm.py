"""Convolution, dense and depthwise kernels of ARM equal numerics.py bit for bit, emulated. All cases of a target are steps of one library."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated import ARM
from emulated_kernels import Prepared, run_prepared
from tools import require_target

from qcompiler import schedules
from qcompiler.backend.lowering import Step
from qcompiler.base.targets import Target, find_target
from qcompiler.numerics import operators as numerics
from qcompiler.schedules.harness import store
from qcompiler.schedules.table import KERNELS, Layout, OpCall, Row, select

BIG = 3.4028234663852886e38


@dataclass
class Case:
    """One operator on random data. `image` [N, H, W, C], or [..., K] of a dense layer; `out`: halo and pitch of the output and the residual."""

    image: tuple[int, ...]
    outputs: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    pad: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    residual: bool = False
    dense: bool = False
    floats: bool = False
    attrs: dict[str, Any] = field(default_factory=dict)
    out: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    scale: float = 1.0  # of the multipliers: large ones saturate nearly everything
    extreme: bool = False  # inputs -128 and 127, weights -127 and 127
    row: Row | None = None  # None: the best

    @property
    def name(self) -> str:
        return ("qc.f32." if self.floats else "qc.") + ("dense" if self.dense else "conv2d")

    def attributes(self) -> dict[str, Any]:
        geometry = {"strides": list(self.stride), "padding": list(self.pad), "dilation": list(self.dilation), "groups": self.groups}
        if self.floats:
            attrs: dict[str, Any] = {"low": -BIG, "high": BIG}
        else:
            attrs = {"x_zero_point": -7, "zero_point": 5, "low": -128, "high": 127, "out_dtype": "int8"}
            if self.residual:
                attrs |= {"residual_zero_point": -3, "residual_multiplier": 1400, "residual_shift": 11}
        return ({} if self.dense else geometry) | attrs | self.attrs

    def data(self, seed: int) -> tuple[np.ndarray, list[np.ndarray], np.ndarray | None]:
        """(input, constants, residual)."""
        rng = np.random.default_rng(seed)
        shape = (self.outputs, self.image[-1]) if self.dense else (self.outputs, *self.kernel, self.image[3] // self.groups)
        if self.floats:
            x, w, bias = (rng.standard_normal(s).astype(np.float32) for s in (self.image, shape, (self.outputs,)))
            residual = rng.standard_normal(self.shape()).astype(np.float32) if self.residual else None
            return x, [w, bias], residual
        if self.extreme:
            x, w = rng.choice(np.array([-128, 127], np.int8), self.image), rng.choice(np.array([-127, 127], np.int8), shape)
        else:
            x, w = rng.integers(-128, 128, self.image).astype(np.int8), rng.integers(-127, 128, shape).astype(np.int8)
        bias = rng.integers(-9000, 9000, self.outputs).astype(np.int32)
        typical = 70 * 74 * np.sqrt(w[0].size) * (2.0**-11 if self.residual else 1.0)
        multiplier = (self.scale * rng.uniform(20, 90, self.outputs) / typical).astype(np.float32)
        residual = rng.integers(-128, 128, self.shape()).astype(np.int8) if self.residual else None
        return x, [w, bias, multiplier], residual

    def shape(self) -> tuple[int, ...]:
        """Of the output."""
        if self.dense:
            return (*self.image[:-1], self.outputs)
        top, left, bottom, right = self.pad
        sizes = [(self.image[1] + top + bottom, 0), (self.image[2] + left + right, 1)]
        return (self.image[0], *((s - (self.kernel[i] - 1) * self.dilation[i] - 1) // self.stride[i] + 1 for s, i in sizes), self.outputs)

    def want(self, x: np.ndarray, constants: list[np.ndarray], residual: np.ndarray | None) -> np.ndarray:
        result: np.ndarray = numerics.OPERATORS[self.name](x, *constants, *([] if residual is None else [residual]), **self.attributes())
        return result


CONV = {
    "pointwise": Case((1, 8, 8, 32), 32),
    "batch": Case((3, 5, 7, 16), 48),
    "one-pixel": Case((1, 1, 1, 64), 100),
    "three-channels": Case((1, 15, 13, 3), 17, (7, 7), (2, 2), (3, 3, 3, 3)),
    "one-channel": Case((2, 9, 9, 1), 8, (3, 3), pad=(1, 1, 1, 1)),
    "five-channels": Case((2, 9, 11, 5), 24, (3, 3), pad=(1, 1, 1, 1)),
    "twelve-channels": Case((1, 6, 5, 12), 6, (3, 3), pad=(1, 1, 1, 1)),
    "strided": Case((1, 13, 14, 24), 33, (3, 3), (2, 2), (1, 1, 1, 1)),
    "asymmetric": Case((1, 12, 11, 8), 16, (2, 5), (1, 2), (0, 3, 1, 1)),
    "dilated": Case((1, 13, 12, 16), 20, (3, 3), pad=(2, 2, 2, 2), dilation=(2, 2)),
    "layouts": Case((2, 6, 9, 16), 20, (3, 3), pad=(1, 1, 1, 1), out={"halo": (1, 2, 1, 3), "pitch": 36}),
    "residual": Case((1, 9, 9, 24), 64, residual=True),
    "residual-ragged": Case((2, 7, 6, 12), 37, (3, 3), pad=(1, 1, 1, 1), residual=True, out={"halo": (0, 1, 1, 0), "pitch": 40}),
    "residual-clamped": Case((1, 7, 7, 16), 16, residual=True, attrs={"low": 5, "high": 90}),
    "residual-overflow": Case((1, 4, 7, 16), 32, residual=True, scale=1e10),
    "clamped": Case((1, 7, 9, 16), 48, attrs={"low": -20, "high": 33}),
    "overflow": Case((1, 4, 7, 16), 32, scale=1e9),
    "extreme": Case((1, 8, 8, 128), 48, (3, 3), pad=(1, 1, 1, 1), extreme=True, attrs={"x_zero_point": -128}),
    "extreme-zero": Case((1, 6, 8, 64), 17, extreme=True, attrs={"x_zero_point": 127, "zero_point": -128}),
    "float-out": Case((1, 5, 9, 20), 27, (3, 3), pad=(1, 1, 1, 1), attrs={"out_dtype": "float32"}),
    "float-out-clamped": Case((1, 5, 9, 20), 27, attrs={"out_dtype": "float32", "float_low": -3.0, "float_high": 11.5}),
    "grouped": Case((1, 9, 8, 64), 96, (3, 3), pad=(1, 1, 1, 1), groups=2),
    "grouped-ragged": Case((1, 5, 8, 10), 34, groups=2),
    "odd-tile": Case((1, 5, 7, 40), 24, params={"rows": 1, "cols": 3, "blocks": 3, "order": "pixels", "unroll": 8}),
    "one-by-one-tile": Case((1, 5, 7, 24), 24, params={"rows": 1, "cols": 1, "blocks": 2, "unroll": 1}),
    "many-tasks": Case((1, 9, 9, 16), 50, params={"pixel_tasks": 4, "channel_tasks": 2}),
    "dense-one": Case((1, 37), 10, dense=True),
    "dense-rows": Case((6, 21), 33, dense=True),
    "dense-rank-3": Case((1, 13, 128), 96, dense=True, attrs={"out_dtype": "float32"}),
}
DEPTHWISE = {
    "plain": Case((1, 9, 11, 16), 16, (3, 3), pad=(1, 1, 1, 1), groups=16),
    "few-channels": Case((2, 6, 8, 5), 5, (3, 3), pad=(1, 1, 1, 1), groups=5),
    "ragged-strided": Case((1, 12, 13, 20), 20, (3, 3), (2, 2), (1, 1, 1, 1), groups=20),
    "five": Case((1, 9, 8, 24), 24, (5, 5), pad=(2, 2, 2, 2), groups=24),
    "asymmetric": Case((1, 8, 9, 11), 11, (2, 3), (1, 2), (0, 2, 1, 0), groups=11),
    "dilated": Case((1, 9, 9, 8), 8, (3, 3), pad=(2, 2, 2, 2), dilation=(2, 2), groups=8),
    "residual": Case((1, 7, 6, 19), 19, (3, 3), pad=(1, 1, 1, 1), groups=19, residual=True, out={"halo": (1, 0, 0, 1), "pitch": 24}),
    "residual-overflow": Case((1, 4, 5, 8), 8, (3, 3), pad=(1, 1, 1, 1), groups=8, residual=True, scale=1e10),
    "clamped": Case((1, 5, 5, 8), 8, (3, 3), pad=(1, 1, 1, 1), groups=8, attrs={"low": -5, "high": 70}),
    "overflow": Case((1, 5, 5, 8), 8, (3, 3), pad=(1, 1, 1, 1), groups=8, scale=1e9),
    "extreme": Case((1, 6, 6, 8), 8, (5, 5), pad=(2, 2, 2, 2), groups=8, extreme=True, attrs={"x_zero_point": -128}),
    "float-out": Case((1, 5, 6, 12), 12, (3, 3), pad=(1, 1, 1, 1), groups=12, attrs={"out_dtype": "float32", "float_high": 9.0}),
    "tall-tile": Case((1, 9, 9, 24), 24, (5, 5), (2, 2), (2, 2, 2, 2), groups=24, params={"rows": 4, "columns": 2, "order": "rows"}),
    "tasks": Case((1, 9, 9, 40), 40, (3, 3), pad=(1, 1, 1, 1), groups=40, params={"row_tasks": 4, "channel_tasks": 4}),
}
FLOAT = {
    "pointwise": Case((1, 8, 9, 33), 40, floats=True),
    "first-layer": Case((1, 11, 12, 3), 19, (3, 3), (2, 2), (1, 1, 1, 1), floats=True),
    "residual": Case((2, 7, 6, 8), 37, (3, 3), pad=(1, 1, 1, 1), residual=True, floats=True, attrs={"low": 0.0, "high": 6.0}),
    "dense": Case((5, 41), 23, dense=True, floats=True),
    "depthwise": Case((1, 9, 11, 18), 18, (3, 3), pad=(1, 1, 1, 1), groups=18, floats=True),
}


# -- cases as steps of a library ----------------------------------------------------------------------------------------------------------------


def row_for(op: OpCall, target: Target, case: Case) -> Row:
    """The best row, which must be one of the target's own, and for a depthwise case a depthwise one."""
    row = select(op, target) if case.row is None else case.row
    assert row.isa in target.rows, f"{row.name} is not a row of {target.name}"
    assert ("depthwise" in row.name) == (1 < case.groups == case.outputs), row.name
    return row


def prepare(name: str, case: Case, target: Target, seed: int) -> Prepared:
    x, constants, residual = case.data(seed)
    want = case.want(x, constants, residual)
    output = Layout(want.shape, str(want.dtype), **case.out)
    dtype = "float32" if case.floats else target.storage
    operands: list[Any] = [Layout(x.shape, dtype), *constants]
    if residual is not None:
        operands.append(Layout(residual.shape, dtype, **case.out))
    op = OpCall(case.name, operands, case.attributes(), output)
    row = row_for(op, target, case)
    if len(x.shape) == 4:
        need = row.needs(op, target)[0]
        pitch = -(-x.shape[3] // need.pitch) * need.pitch
        operands[0] = Layout(x.shape, dtype, need.halo, pitch if pitch != x.shape[3] else 0)
    params = row.default(op, target)
    params |= {k: v for k, v in case.params.items() if k in params}
    kernel = row.build(op, params, target)
    inputs = {f"{name}~x": (operands[0], store(x, operands[0], 0 if case.floats else case.attributes()["x_zero_point"]))}
    if residual is not None:
        inputs[f"{name}~residual"] = (operands[-1], store(residual, operands[-1]))
    bound = None
    if case.floats:  # the rounding of a float32 sum: 2^-24 relative to the sum of magnitudes, times its length
        w, bias = (np.abs(c).astype(np.float64) for c in constants)
        plain = replace(case, attrs={}, residual=False).want(np.abs(x).astype(np.float32), [w.astype(np.float32), bias.astype(np.float32)], None)
        bound = (plain + 4) * (w[0].size + 2) * 2.0**-24
    return Prepared(Step(name, op, op.name, kernel, list(inputs), row, params), inputs, output, want, bound)


def run_cases(cases: dict[str, Case], target: Target, folder: Path) -> None:
    schedules.load(target)
    run_prepared([prepare(name, case, target, seed) for seed, (name, case) in enumerate(cases.items())], target, folder)


@pytest.fixture(params=ARM)
def target(request: pytest.FixtureRequest) -> Target:
    row = find_target(request.param)
    require_target(row)
    return row


def test_conv2d_and_dense(target: Target, tmp_path: Path) -> None:
    run_cases(CONV, target, tmp_path)


def test_depthwise(target: Target, tmp_path: Path) -> None:
    run_cases(DEPTHWISE, target, tmp_path)


def test_rows_leave_channels_behind_their_own_alone(target: Target, tmp_path: Path) -> None:
    """Each row of the target that says so, not only the best, into outputs with a pitch."""
    schedules.load(target)
    cases = {}
    for name, floats in (("qc.conv2d", False), ("qc.f32.conv2d", True)):
        for row in (r for r in KERNELS[name] if r.isa in target.rows and r.own_channels):
            kinds = [("deep", Case((1, 12, 13, 64), 75, (3, 3))), ("depthwise", Case((1, 9, 11, 21), 21, (3, 3), groups=21))]
            base = dict(kinds)["depthwise" if "depthwise" in row.name else "deep"]
            for pitch in (base.outputs + 1, base.outputs + 40):
                cases[f"{row.name}-{pitch}"] = replace(base, pad=(1, 1, 1, 1), floats=floats, out={"halo": (1, 0, 2, 1), "pitch": pitch}, row=row)
    assert cases
    run_cases(cases, target, tmp_path)


def test_every_sampled_schedule_is_exact(target: Target, tmp_path: Path) -> None:
    """Random points of the design space; those that a kernel refuses don't count."""
    schedules.load(target)
    rng, cases = np.random.default_rng(7), dict[str, Case]()
    for base in (CONV["residual-ragged"], Case((2, 7, 9, 36), 83), Case((1, 7, 8, 21), 21, (3, 3), (1, 2), (1, 1, 1, 1), groups=21)):
        x, constants, _ = base.data(0)
        row_op = OpCall(base.name, [Layout(x.shape, "int8"), *constants], base.attributes(), Layout(base.shape(), "int8"))
        space = select(row_op, target).space(row_op, target)
        built = 0
        while built < 3:
            case = replace(base, params={k: v[rng.integers(len(v))] for k, v in space.items()})
            try:
                prepare("trial", case, target, 0)
            except ValueError:
                continue
            cases[f"{len(cases)}"] = case
            built += 1
    run_cases(cases, target, tmp_path)


@pytest.mark.parametrize("name", ["arm64-neon", "armv7-neon"])
def test_float(name: str, tmp_path: Path) -> None:
    target = find_target(name)
    require_target(target)
    cases = FLOAT if target.architecture == "aarch64" else {k: c for k, c in FLOAT.items() if k != "depthwise"}
    run_cases(cases, target, tmp_path)


# -- which row takes what ------------------------------------------------------------------------------------------------------------------


def chosen(target: str, size: int, inputs: int, outputs: int, weight: int = 1) -> str:
    row, layout = find_target(target), Layout((1, size, size, inputs), "int8")
    schedules.load(row)
    constants: list[Any] = [np.full((outputs, 1, 1, inputs), weight, np.int8), np.zeros(outputs, np.int32), np.ones(outputs, np.float32)]
    case = Case((1, size, size, inputs), outputs)
    return select(OpCall("qc.conv2d", [layout, *constants], case.attributes(), Layout((1, size, size, outputs), "int8")), row).name


def test_matrix_instructions_take_what_fills_them() -> None:
    assert chosen("arm64-i8mm", 7, 32, 16) == "arm64-i8mm/conv2d"
    assert chosen("arm64-i8mm", 1, 32, 16) == "arm64-dotprod/conv2d"
    assert chosen("arm64-i8mm", 7, 3, 16) == "arm64-dotprod/conv2d"


@pytest.mark.parametrize(("name", "fallback"), [("arm64-neon", "any/conv2d"), ("armv7-neon", "any/conv2d"), ("arm64-dotprod", "arm64-dotprod/conv2d")])
def test_weights_of_minus_128_leave_the_row_that_sums_pairs_in_int16(name: str, fallback: str) -> None:
    assert chosen(name, 7, 32, 16, -127) == f"{name}/conv2d"
    assert chosen(name, 7, 32, 16, -128) == fallback
