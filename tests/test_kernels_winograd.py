"""Winograd's 3x3 convolution equals numerics.py bit for bit: it is a faster way to the same integers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from x86_emulation import HOST, build, runs_here, sampled

from qcompiler import schedules
from qcompiler.base.targets import Target
from qcompiler.numerics import operators as numerics
from qcompiler.schedules.conv_plan import geometry_of
from qcompiler.schedules.harness import fetch, module_of, run_kernel, store
from qcompiler.schedules.table import KERNELS, Kernel, Layout, OpCall, select
from qcompiler.schedules.winograd import WinogradRow
from qcompiler.schedules.winograd_forms import FORMS, INVERSE_OF_9
from qcompiler.tuning.bench import Bench

pytestmark = runs_here
schedules.load(HOST)
ROWS = {r.isa: r for r in KERNELS["qc.conv2d"] if isinstance(r, WinogradRow)}
ROW = ROWS[HOST.name]


def operator(image: tuple[int, ...], outputs: int, pad: Any = 1, seed: int = 0, extreme: str = "", out: Any = None, **attrs: Any) -> tuple[OpCall, list[Any]]:
    """A 3x3 convolution on random data, or on inputs and weights of the greatest magnitude: all alike, or with random signs."""
    rng, channels = np.random.default_rng(seed), image[3]
    pads = [pad] * 4 if isinstance(pad, int) else list(pad)
    shape = (outputs, 3, 3, channels)
    if extreme == "alike":
        x, w = np.full(image, 127, np.int8), np.where(np.arange(outputs) % 2, 127, -127).astype(np.int8)[:, None, None, None] * np.ones(shape, np.int8)
    elif extreme:
        x, w = rng.choice(np.array([-128, 127], np.int8), image), rng.choice(np.array([-127, 127], np.int8), shape)
    else:
        x, w = rng.integers(-128, 128, image).astype(np.int8), rng.integers(-127, 128, shape).astype(np.int8)
    bias = rng.integers(-9000, 9000, outputs).astype(np.int32)
    multiplier = (rng.uniform(20, 90, outputs) / (70 * 74 * np.sqrt(9 * channels))).astype(np.float32)
    attributes: dict[str, Any] = {"strides": [1, 1], "padding": pads, "dilation": [1, 1], "groups": 1, "x_zero_point": -7, "zero_point": 5}
    attributes |= {"low": -128, "high": 127, "out_dtype": "int8"} | attrs
    shape = (image[0], image[1] + pads[0] + pads[2] - 2, image[2] + pads[1] + pads[3] - 2, outputs)
    output = Layout(shape, "uint8" if attributes["out_dtype"] == "int8" else attributes["out_dtype"], **(out or {}))
    arrays = [x, w, bias, multiplier]
    operands: list[Any] = [Layout(image, "uint8"), w, bias, multiplier]
    if "residual_shift" in attributes:
        arrays.append(rng.integers(-128, 128, shape).astype(np.int8))
        operands.append(Layout(shape, "uint8", **(out or {})))
    return OpCall("qc.conv2d", operands, attributes, output), arrays


def check(op: OpCall, arrays: list[Any], target: Target = HOST, point: dict[str, Any] | None = None, form: int | None = None) -> Kernel:
    row = ROWS[target.name]
    point = row.point(geometry_of(op), form) if form else point
    assert target != HOST or row.refuse(op, target) is None  # wider vectors refuse what is too narrow to pay, and are exact there too
    op.operands[0] = Layout(op.tensors[0].shape, "uint8", row.needs(op, target)[0].halo)
    kernel, host = build(row, op, row.default(op, target) | (point or {}), target)
    inputs = [store(arrays[0], op.tensors[0], op.attrs["x_zero_point"]), *[store(r, op.tensors[1]) for r in arrays[4:]]]
    got = fetch(run_kernel(kernel, inputs, op.output, host), op.output)
    np.testing.assert_array_equal(got, numerics.conv2d(*arrays, **op.attrs))
    return kernel


RESIDUAL = {"residual_zero_point": -3, "residual_multiplier": 1400, "residual_shift": 11}
CASES: dict[str, dict[str, Any]] = {
    "even": {"image": (1, 8, 8, 32), "outputs": 32},
    "odd": {"image": (2, 7, 9, 48), "outputs": 64},
    "batch": {"image": (3, 14, 14, 32), "outputs": 32},
    "ragged": {"image": (1, 13, 11, 38), "outputs": 61},
    "no-padding": {"image": (1, 10, 9, 32), "outputs": 40, "pad": 0},
    "asymmetric": {"image": (1, 10, 9, 32), "outputs": 40, "pad": (2, 0, 1, 1)},
    "residual": {"image": (1, 9, 9, 32), "outputs": 48, **RESIDUAL},
    "halo-out": {"image": (1, 13, 13, 32), "outputs": 36, "out": {"halo": (1, 2, 1, 3), "pitch": 40}, **RESIDUAL},
    "clamped": {"image": (1, 8, 8, 64), "outputs": 32, "low": -20, "high": 33},
    "float": {"image": (1, 8, 8, 64), "outputs": 35, "out_dtype": "float32"},
    "int16": {"image": (1, 9, 9, 32), "outputs": 40, "out_dtype": "int16", "zero_point": 0, "low": -9000, "high": 32767, **RESIDUAL},
    "several-tasks": {"image": (1, 28, 28, 64), "outputs": 64},
    "alike": {"image": (1, 8, 8, 512), "outputs": 16, "extreme": "alike", "x_zero_point": -128},
    "signs": {"image": (1, 8, 8, 320), "outputs": 16, "extreme": "signs", "x_zero_point": 127},
    "deep": {"image": (1, 9, 9, 1024), "outputs": 16, "extreme": "alike", "x_zero_point": -128},
    "most": {"image": (1, 8, 8, 228), "outputs": 16, "extreme": "alike", "x_zero_point": 127},
}


@pytest.mark.parametrize("form", FORMS)
@sampled("name", CASES, {"ragged"})
def test_conv2d(name: str, target: Target, form: int) -> None:
    if target.name not in ROWS:  # VNNI and AMX multiply bytes fast enough
        op, _ = operator(**CASES[name])
        assert not isinstance(select(op, target), WinogradRow)
        return
    assert check(*operator(**CASES[name]), target, form=form).params["form"] == form


def test_every_sampled_schedule_is_exact() -> None:
    rng, built = np.random.default_rng(3), 0
    for seed in range(80):
        op, arrays = operator((1, 9, 12, 36), 56, seed=seed)
        point = {k: v[rng.integers(len(v))] for k, v in ROW.space(op, HOST).items()}
        try:
            kernel = check(op, arrays, HOST, point)
        except ValueError:
            continue
        assert kernel.params == point
        built += 1
        if built == 4:
            return
    raise AssertionError(f"only {built} points could be built")


@pytest.mark.parametrize("m", FORMS)
def test_intermediate_sums_fit_their_types(m: int) -> None:
    """The bounds that the forms state, from the matrices: of any bytes, any weights, as many channels as they say."""
    form = FORMS[m]
    x, w = np.array(form.matrices[0]), np.array(form.matrices[1])
    low, high = -form.offset, 255 - form.offset
    for gains in (x, np.array([np.outer(a, b).reshape(-1) for a in x for b in x])):  # after one axis, and after both
        reach = [abs(row[row > 0].sum() * a + row[row < 0].sum() * b) for row in gains for a, b in ((low, high), (high, low))]
        assert max(reach) < 2**15
    weight = np.abs(w).sum(axis=1).max() ** 2 * 127
    assert weight < 2**15 and 2 * max(reach) * weight < 2**31, "VPMADDWD's sum of two products"
    if m == 2:
        assert form.channels * max(reach) * weight * 2 < 2**31
    else:
        assert form.channels * 9 * 127 * max(-low, high) < 2**25 and form.channels > 200


@pytest.mark.parametrize("m", FORMS)
def test_the_transforms_are_winograd(m: int) -> None:
    rng, n = np.random.default_rng(0), m + 2
    d, g = rng.integers(0, 256, (n, n)), rng.integers(-127, 128, (3, 3))
    b, w, a = (np.array(matrix) for matrix in FORMS[m].matrices)
    product = (w @ g @ w.T) * (b @ d @ b.T)
    direct = [[int((d[i : i + 3, j : j + 3] * g).sum()) for j in range(m)] for i in range(m)]
    np.testing.assert_array_equal(a @ product @ a.T, {2: 4, 4: 576}[m] * np.array(direct))
    assert (9 * INVERSE_OF_9) % 2**32 == 1


def test_each_form_where_it_pays() -> None:
    """The smaller tile where weights are many and tiles few."""
    cases = (((1, 56, 56, 64), 64, 4), ((1, 28, 28, 128), 128, 4), ((1, 7, 7, 512), 512, 4), ((1, 6, 6, 64), 64, 2), ((1, 3, 20, 64), 64, 2))
    for image, outputs, form in cases:
        op, _ = operator(image, outputs)
        assert ROW.default(op, HOST)["form"] == form, image
        assert ROW.space(op, HOST)["form"] == ([2] if min(image[1:3]) < 4 else [2, 4])


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"image": (1, 8, 8, 33)}, "even number of inputs"),
        ({"image": (1, 8, 8, 8)}, "8 input and 32 output channels"),
        ({"outputs": 4}, "4 output channels"),
        ({"strides": [2, 2]}, "strides"),
        ({"dilation": [2, 2]}, "dilation"),
        ({"image": (1, 3, 3, 32), "pad": 0}, "smaller than a tile"),
        ({"image": (1, 3, 3, 32)}, "cost what they save"),
    ],
)
def test_refusals(change: dict[str, Any], reason: str) -> None:
    op, _ = operator(**({"image": (1, 8, 8, 32), "outputs": 32} | change))
    assert reason in str(ROW.refuse(op, HOST))


def test_it_is_chosen_and_multiplies_in_pairs() -> None:
    op, _ = operator((1, 14, 14, 64), 64)
    assert select(op, HOST) is ROW
    op.operands[0] = Layout((1, 14, 14, 64), "uint8", (1, 1, 1, 1))
    kernel = ROW.build(op, ROW.default(op, HOST), HOST)
    assembly = tvm.tirx.build(module_of(kernel, len(kernel.constants) + 3), target=tvm.target.Target(HOST.tvm)).inspect_source("asm")
    assert "vpmaddwd" in assembly and "vpmaddubsw" not in assembly


def test_a_candidate_of_the_tuner_keeps_its_scratch_when_another_needs_more() -> None:
    op, _ = operator((1, 16, 16, 32), 64)
    op.operands[0] = Layout((1, 16, 16, 32), "uint8", ROW.needs(op, HOST)[0].halo)
    bench = Bench(ROW, op, HOST, 1)
    larger = bench.build(ROW.default(op, HOST) | {"channel_tasks": 4})
    assert larger.kernel.scratch > bench.default.kernel.scratch
    for candidate in (bench.default, larger):
        assert candidate.scratch is not None and candidate.scratch.nbytes >= candidate.kernel.scratch
        assert candidate.pointers[-1].value == candidate.scratch.ctypes.data
    bench.check(larger, {**ROW.default(op, HOST), "channel_tasks": 4})
    assert np.isfinite(bench.race([bench.default, larger], 2, 1)).all()
