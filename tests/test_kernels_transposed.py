"""Transposed convolutions as convolutions of their phases equal the reference arithmetic on every CPU row: bit for bit, float ones on whole numbers too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from emulated import ARM
from emulated_kernels import Prepared, run_on_x86, run_prepared
from kernel_cases import Case, data
from tools import require_target
from x86_emulation import HOST, TARGETS, each, runs_here

from qcompiler import schedules
from qcompiler.base.targets import Target, find_target
from qcompiler.schedules.conv_transposed import TransposedRow, phases_of
from qcompiler.schedules.table import Layout, OpCall, select

BIG = 3.4028234663852886e38
INT8 = {"x_zero_point": -7, "zero_point": 5, "low": -128, "high": 127, "out_dtype": "int8"}
NETS: dict[str, tuple[Any, ...]] = {  # input, outputs, kernel, strides, padding, output_padding, dilation, groups
    "decoder": ((1, 5, 6, 24), 40, (4, 4), (2, 2), (1, 1, 1, 1), (0, 0), (1, 1), 1),
    "no-overlap": ((2, 3, 4, 9), 5, (2, 2), (2, 2), (0, 0, 0, 0), (0, 0), (1, 1), 1),
    "uneven": ((1, 5, 6, 7), 10, (3, 3), (2, 2), (1, 1, 1, 1), (1, 1), (1, 1), 1),
    "line": ((1, 1, 11, 12), 17, (1, 8), (1, 4), (0, 2, 0, 1), (0, 1), (1, 1), 1),
    "asymmetric": ((2, 4, 3, 6), 4, (2, 4), (1, 3), (0, 2, 1, 1), (0, 0), (2, 1), 2),
    "dilated": ((1, 4, 5, 8), 20, (3, 3), (2, 3), (2, 1, 1, 3), (1, 0), (2, 2), 1),
    "gaps": ((1, 4, 3, 4), 8, (1, 2), (3, 3), (0, 0, 0, 0), (2, 1), (1, 1), 1),
    "depthwise": ((1, 4, 4, 18), 18, (4, 4), (2, 2), (1, 1, 1, 1), (0, 0), (1, 1), 18),
    "cropped": ((1, 4, 5, 3), 6, (5, 5), (2, 2), (4, 3, 4, 3), (0, 0), (1, 1), 1),
    "one-stride": ((1, 6, 5, 16), 33, (3, 3), (1, 1), (1, 0, 1, 2), (0, 0), (1, 1), 1),
}


def case(name: str, floats: bool, attrs: dict[str, Any] | None = None, pitch: int = 0) -> Case:
    image, outputs, kernel, strides, padding, extra, dilation, groups = NETS[name]
    geometry = {"strides": list(strides), "padding": list(padding), "output_padding": list(extra), "dilation": list(dilation), "groups": groups}
    w, rng = np.maximum(data(2, outputs, *kernel, image[3] // groups), -127), np.random.default_rng(3)
    bias = rng.integers(-900, 900, outputs).astype(np.int32)
    out = {"halo": (1, 0, 2, 1), "pitch": outputs + pitch} if pitch else {}
    if floats:  # sums below 2^24 are exact in any order
        operands = [data(1, *image).astype(np.float32), w.astype(np.float32), bias.astype(np.float32)]
        return Case("qc.f32.conv2d_transpose", operands, geometry | {"low": -BIG, "high": BIG} | (attrs or {}), out=out, constants=(1, 2))
    multiplier = (rng.uniform(20, 90, outputs) / (5000 * np.sqrt(w[0].size))).astype(np.float32)
    return Case("qc.conv2d_transpose", [data(1, *image), w, bias, multiplier], geometry | INT8 | (attrs or {}), out=out, constants=(1, 2, 3))


CASES = {f"{name}-{kind}": case(name, kind == "float") for name in NETS for kind in ("int8", "float")} | {
    "pitch-int8": case("no-overlap", False, pitch=3),
    "pitch-float": case("decoder", True, {"low": 0.0, "high": 6000.0}, pitch=3),
    "clamped": case("uneven", False, {"low": -20, "high": 33}),
    "float-out": case("decoder", False, {"out_dtype": "float32", "float_low": -3.0, "float_high": 11.5}),
}


SAMPLE = {"decoder-int8", "dilated-int8", "asymmetric-float", "pitch-int8", "float-out"}


def prepared(target: Target) -> list[Prepared]:
    """All cases, of one row of each architecture; rows differ in their dot steps."""
    made = [Prepared.of(name, c, target) for name, c in CASES.items() if target.name in ("x86-avx2", "arm64-neon") or name in SAMPLE]
    assert all((p.step.kernel.row.split("/")[0] in target.rows) == ("depthwise" not in p.step.writes) for p in made)
    return made


@pytest.mark.parametrize("target", each(TARGETS))
@runs_here
def test_x86(target: Target, tmp_path: Path) -> None:
    run_on_x86(lambda: prepared(target), target, tmp_path)


@pytest.mark.parametrize("name", ARM)
def test_arm(name: str, tmp_path: Path) -> None:
    target = find_target(name)
    require_target(target)
    run_prepared(prepared(target), target, tmp_path)


@runs_here
def test_every_sampled_schedule_is_exact(tmp_path: Path) -> None:
    rng, made = np.random.default_rng(7), []
    for name in ("decoder", "uneven", "dilated"):
        one = case(name, False)
        one.prepare(HOST)
        row = select(one.op, HOST)
        assert isinstance(row, TransposedRow)
        space = row.space(one.op, HOST)
        for i in range(2):
            params = {k: v[rng.integers(len(v))] for k, v in space.items()}
            p = Prepared.of(f"{name}-{i}", one, HOST)
            p.step.kernel = row.build(one.op, params, HOST)
            made.append(p)
    run_prepared(made, HOST, tmp_path)


def test_phases_cover_the_output_once() -> None:
    schedules.load(HOST)
    for name in NETS:
        for pitch in (0, 3):
            one = case(name, True, pitch=pitch)
            one.prepare(HOST)
            op = OpCall(one.op.name, one.op.operands, one.op.attrs, one.op.output)
            seen = np.zeros(one.op.output.shape[1:3], int)
            taps = 0
            for phase in phases_of(op, joins=not pitch):
                for column in phase.columns:
                    seen[phase.row.first :: op.attrs["strides"][0], column.first :: op.attrs["strides"][1]] += 1
                    taps += len(phase.row.taps) * len(column.taps)
            assert (seen == 1).all(), name
            strides, weight = op.attrs["strides"], op.operands[1]
            assert isinstance(weight, np.ndarray)
            if all(n >= s for n, s in zip(seen.shape, strides, strict=True)):
                assert taps == weight.shape[1] * weight.shape[2], "every tap belongs to one phase"


def test_phases_that_do_not_overlap_are_channels() -> None:
    one = case("no-overlap", True)
    one.prepare(HOST)
    assert [len(p.columns) for p in phases_of(one.op, joins=True)] == [2, 2]
    layout = Layout((1, 4, 4), "float32")
    row = select(one.op, HOST)
    assert "rank 3" in str(row.refuse(OpCall(one.op.name, [layout, *one.op.operands[1:]], one.op.attrs, one.op.output), HOST))
