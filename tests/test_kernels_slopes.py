"""Leaky rectifiers at the ends of convolutions, transposed ones and dense layers equal the reference arithmetic bit for bit, on every row of every target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_emulated import Emulated
from emulated import ARM
from emulated_kernels import Prepared, run_on_x86, run_prepared
from kernel_cases import Case, data
from tools import require_target
from x86_emulation import TARGETS, each, runs_here

from qcompiler.base.targets import Target, find_target

GEOMETRY: dict[str, tuple[Any, ...]] = {  # input, outputs, kernel, groups
    "conv": ((2, 5, 7, 12), 37, (3, 3), 1),
    "large": ((1, 9, 9, 32), 48, (3, 3), 1),  # by Winograd's transforms where there are such
    "pointwise": ((1, 6, 9, 32), 64, (1, 1), 1),
    "groups": ((1, 6, 9, 20), 12, (3, 3), 4),
    "depthwise": ((1, 6, 11, 53), 53, (3, 3), 53),
    "narrow": ((1, 5, 6, 3), 3, (3, 3), 3),
}
WIDE = {"out_dtype": "int16", "zero_point": 0, "low": -32768, "high": 32767}
ADDED = {"residual_zero_point": -3, "residual_multiplier": 1400, "residual_shift": 11}
STREAM = WIDE | {"residual_zero_point": 0, "residual_multiplier": 9000, "residual_shift": 14}
ENDS: dict[str, tuple[dict[str, Any], str, float]] = {  # attributes, type of the residual, scale of the multipliers
    "plain": ({}, "", 1),
    "clamped": ({"low": -20, "high": 33}, "", 1),
    "far": ({}, "", 1e9),
    "before": (ADDED, "int8", 1),
    "behind": (ADDED | {"bends_sum": True}, "int8", 1),
    "far-before": (ADDED, "int8", 1e10),
    "far-behind": (ADDED | {"bends_sum": True, "residual_shift": 0}, "int8", 1e10),
    "float": ({"out_dtype": "float32", "float_low": -3.0, "float_high": 11.5}, "", 1),
    "wide": (WIDE, "", 250),
    "wide-before": (STREAM, "int16", 2000),
    "wide-behind": (STREAM | {"bends_sum": True, "low": -900}, "int16", 2000),
}


def case(operator: str, geometry: str, end: str) -> Case:
    """Slopes from -1.5 to 2, 0 and 1 among them; of sums beyond int32, larger ones."""
    image, outputs, kernel, groups = GEOMETRY[geometry]
    attrs: dict[str, Any] = {"x_zero_point": -7, "zero_point": 5, "low": -128, "high": 127, "out_dtype": "int8"}
    added, residual, scale = ENDS[end]
    rng = np.random.default_rng(len(geometry) + 10 * len(end))
    w = np.maximum(data(2, outputs, *kernel, image[-1] // groups), -127)
    if operator == "qc.dense":
        w = w[:, 0, 0]
    else:
        attrs |= {"strides": [1, 1], "padding": [1, 0, 1, 1], "dilation": [1, 1], "groups": groups}
    if operator == "qc.conv2d_transpose":
        attrs |= {"strides": [2, 2], "output_padding": [0, 1]}
    bias = rng.integers(-900, 900, outputs).astype(np.int32)
    shift = added.get("residual_shift", 0)
    positive = scale * rng.uniform(20, 90, outputs) / (5000 * np.sqrt(w[0].size)) * (2.0**11 if residual == "int8" else 1.0)
    slopes = rng.uniform(-1.5, 2.0, outputs)
    slopes[:2] = 0, 1
    negative = slopes * (2.0**-shift * (1 if shift else 1e3) if added.get("bends_sum") else positive)
    operands = [data(1, *image), w, bias, np.stack([positive, negative]).astype(np.float32)]
    attrs |= added
    if residual:
        shape = Case(operator, [*operands[:3], operands[3][0]], {k: v for k, v in attrs.items() if not k.startswith(("residual", "bends"))}).shape()
        operands.append(rng.integers(*{"int8": (-128, 128), "int16": (-(2**15), 2**15)}[residual], shape).astype(residual))
    return Case(operator, operands, attrs, constants=(1, 2, 3))


CASES = {f"{geometry}-{end}": case("qc.conv2d", geometry, end) for geometry in ("conv", "depthwise") for end in ENDS}
CASES |= {f"{geometry}-{end}": case("qc.conv2d", geometry, end) for geometry in ("large", "pointwise", "groups", "narrow") for end in ("plain", "behind")}
CASES |= {f"dense-{end}": case("qc.dense", "pointwise", end) for end in ("plain", "before", "float")}
CASES |= {f"{geometry}-transposed": case("qc.conv2d_transpose", geometry, "plain") for geometry in ("conv", "groups", "narrow")}
SAMPLE = ["conv-plain", "conv-behind", "depthwise-plain", "depthwise-far-before", "depthwise-behind", "dense-plain", "conv-transposed"]


@pytest.mark.parametrize("target", each(TARGETS))
@runs_here
def test_x86(target: Target, tmp_path: Path) -> None:
    rows = set[str]()

    def prepared() -> list[Prepared]:
        made = [Prepared.of(name, CASES[name], target) for name in (CASES if target.name == "x86-avx2" else SAMPLE)]
        rows.update(p.step.kernel.row.split("/")[1] for p in made)
        return made

    run_on_x86(prepared, target, tmp_path)
    assert {"conv2d", "depthwise", "dense", "conv2d_transpose"} <= rows
    assert target.name != "x86-avx2" or "winograd" in rows


@pytest.mark.parametrize("name", ARM)
def test_arm(name: str, tmp_path: Path) -> None:
    target = find_target(name)
    require_target(target)
    run_prepared([Prepared.of(n, CASES[n], target) for n in (CASES if name in ("arm64-neon", "armv7-neon") else SAMPLE)], target, tmp_path)


@pytest.mark.parametrize("name", ["cuda-sm75-dp4a", "cuda-sm80", "cuda-sm90a"])
def test_cuda(name: str, tmp_path: Path) -> None:
    target = find_target(name)
    names = [*SAMPLE, "conv-float", "conv-wide-behind", "conv-far-before", "groups-plain", "narrow-transposed"]
    emulated = Emulated({f"k_{n.replace('-', '_')}": CASES[n].prepare(target) for n in names}, target, tmp_path)
    for n in names:
        CASES[n].check(emulated.run(f"k_{n.replace('-', '_')}", CASES[n].inputs, CASES[n].output))
