"""Convolution and dense kernels of x86 equal numerics.py bit for bit, on every ISA row this machine can execute."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tvm
from conv_cases import CASES, WIDE, Case, row_of
from x86_emulation import TARGETS, build, each, is_emulated, runs_here, sampled

from qcompiler import schedules
from qcompiler.base.targets import Target, find_target
from qcompiler.numerics import operators as numerics
from qcompiler.schedules.conv_plan import Geometry, wrapped
from qcompiler.schedules.conv_steps import step_classes
from qcompiler.schedules.harness import fetch, module_of, run_kernel, store
from qcompiler.schedules.table import Layout, OpCall
from qcompiler.schedules.x86.isa import AVX2 as AVX2_ISA

AVX2, AVXVNNI = find_target("x86-avx2"), find_target("x86-avxvnni")
BIG = 3.4028234663852886e38
pytestmark = runs_here
schedules.load(AVX2)


@pytest.fixture(params=each(TARGETS))
def target(request: pytest.FixtureRequest) -> Target:
    return request.param


SAMPLE = {
    "three-channels", "ragged-5-24", "asymmetric", "halo-out", "residual-ragged", "residual-overflow", "signed-storage", "bell-ragged", "extreme",
    "extreme-zero", "float-out-clamped", "grouped-narrow", "int16-ragged",
}  # fmt: skip


@sampled("name", CASES, SAMPLE)
def test_conv2d(name: str, target: Target) -> None:
    CASES[name].run(target)


@sampled("outputs", [1, 3, 5, 8, 15, 16, 17, 24, 31, 33, 47, 65], {1, 24, 47})
def test_ragged_outputs(outputs: int, target: Target) -> None:
    Case((1, 3, 5, 8), outputs, residual=outputs % 2 == 1).run(target, seed=outputs)


@sampled("width", [1, 2, 3, 6, 7, 13, 29], {13})
def test_ragged_widths(width: int, target: Target) -> None:
    Case((2, 3, width, 8), 32, (3, 3), pad=1).run(target, seed=width)


@pytest.mark.parametrize("attrs", [{}, WIDE, {"out_dtype": "float32"}], ids=["int8", "int16", "float32"])
def test_tiles_run_on_into_the_next_row(attrs: dict[str, Any], target: Target) -> None:
    """Where none divides the rows, and the halo of the output lies between them; and between images."""
    case = Case((2, 11, 13, 16), 40, out={"halo": (1, 2, 1, 3), "pitch": 44}, attrs=attrs)
    x, out = Layout(case.image, "uint8"), Layout((*case.image[:3], case.outputs), "uint8", **case.out)
    geometry = Geometry(x, out, None, case.image[3], case.outputs, 1, (1, 1), (1, 1), (1, 1), (0, 0))
    assert wrapped(geometry, row_of("qc.conv2d", target).unit).wraps
    for cols in (None, 1, 7, 13):
        case.run(target, {"cols": cols, "blocks": 1} if cols else None)


@sampled("cols", [1, 2, 5, 9], {5})
def test_pixels_share_a_vector(cols: int, target: Target) -> None:
    """Also where the last one has it for itself, beside whole vectors and alone."""
    for name, outputs in (("int8", 24), ("int16", 24), ("int8", 5)):
        scale = {"residual_zero_point": 0, "residual_multiplier": 9} if name == "int16" else {}
        Case((1, 3, 11, 16), outputs, residual=True, residual_dtype=name, attrs=scale).run(target, {"rows": 1, "cols": cols, "blocks": -(-outputs // 16)})
    Case((1, 3, 11, 16), 24, attrs={"out_dtype": "float32"}).run(target, {"rows": 1, "cols": cols})


def test_every_sampled_schedule_is_exact(target: Target) -> None:
    """Random points of the design space; those that a kernel refuses don't count."""
    rng, wanted = np.random.default_rng(7), 1 if is_emulated(target) else 5
    cases = [
        Case((1, 6, 13, 20), 53, (3, 3), pad=1, residual=True),
        Case((2, 7, 9, 36), 83),
        Case((1, 8, 9, 32), 64, (3, 3), (1, 2), 1, groups=2),
    ]
    for case in cases[:1] if is_emulated(target) else cases:
        row = row_of("qc.conv2d", target)
        weight = np.zeros((case.outputs, *case.kernel, case.image[3] // case.groups), np.int8)
        output = Layout(case.shape(weight), "uint8")
        op = OpCall("qc.conv2d", [Layout(case.image, "uint8"), weight], case.attributes(), output)
        space, built = row.space(op, target), 0
        for _ in range(60):
            point = {k: v[rng.integers(len(v))] for k, v in space.items()}
            try:
                kernel = case.run(target, point, seed=built)
            except ValueError:
                continue
            assert kernel.params == point
            built += 1
            if built == wanted:
                break
        assert built == wanted


DENSE = [(1, 64, 40), (1, 37, 10), (1, 300, 1), (6, 21, 33), (64, 17, 10), (13, 128, 96)]


@sampled("shape", [(rank, *sizes) for sizes in DENSE for rank in (2, 3)], {(2, 1, 37, 10), (3, 6, 21, 33)})
def test_dense(shape: tuple[int, int, int, int], target: Target) -> None:
    rank, m, k, n = shape
    rng = np.random.default_rng(m + k)
    image = (m, k) if rank == 2 else (1, m, k)
    x, w = rng.integers(-128, 128, image).astype(np.int8), rng.integers(-127, 128, (n, k)).astype(np.int8)
    bias, multiplier = rng.integers(-9000, 9000, n).astype(np.int32), (rng.uniform(20, 90, n) / (5200 * np.sqrt(k))).astype(np.float32)
    attrs = {"x_zero_point": 9, "zero_point": -11, "low": -128, "high": 127, "out_dtype": "int8"}
    output = Layout((*image[:-1], n), "uint8")
    op, row = OpCall("qc.dense", [Layout(image, "uint8"), w, bias, multiplier], attrs, output), row_of("qc.dense", target)
    assert row.refuse(op, target) is None
    kernel, host = build(row, op, row.default(op, target), target)
    got = fetch(run_kernel(kernel, [store(x, op.tensors[0])], output, host), output)
    np.testing.assert_array_equal(got, numerics.dense(x, w, bias, multiplier, **attrs))


FLOAT = {
    "pointwise": Case((1, 8, 9, 33), 40),
    "first-layer": Case((1, 11, 12, 3), 19, (3, 3), (2, 2), 1),
    "residual": Case((2, 7, 6, 8), 37, (3, 3), pad=1, residual=True, attrs={"low": 0.0, "high": 6.0}),
    "grouped": Case((1, 6, 7, 12), 24, (3, 3), pad=1, groups=3, out={"halo": (1, 1, 1, 1), "pitch": 26}),
    "runs-on": Case((1, 11, 13, 16), 40, out={"halo": (1, 2, 1, 3), "pitch": 44}),
}


@sampled("name", FLOAT, {"residual"})
def test_float_conv2d(name: str, target: Target) -> None:
    """Within the rounding of a float32 sum: 2^-24 relative to the sum of magnitudes, times its length."""
    case, rng = FLOAT[name], np.random.default_rng(3)
    attrs = {k: v for k, v in case.attributes().items() if k in ("strides", "padding", "dilation", "groups")} | {"low": -BIG, "high": BIG}
    attrs |= case.attrs
    x = rng.standard_normal(case.image).astype(np.float32)
    w = rng.standard_normal((case.outputs, *case.kernel, case.image[3] // case.groups)).astype(np.float32)
    bias = rng.standard_normal(case.outputs).astype(np.float32)
    output = Layout(case.shape(w), "float32", **case.out)
    operands: list[Any] = [Layout(case.image, "float32"), w, bias]
    residual = rng.standard_normal(output.shape).astype(np.float32) if case.residual else None
    if residual is not None:
        operands.append(Layout(output.shape, "float32"))
    op, row = OpCall("qc.f32.conv2d", operands, attrs, output), row_of("qc.f32.conv2d", target)
    assert row.refuse(op, target) is None
    op.operands[0] = Layout(case.image, "float32", row.needs(op, target)[0].halo)
    kernel, host = build(row, op, row.default(op, target), target)
    inputs = [store(x, op.tensors[0])] + ([store(residual, op.tensors[1])] if residual is not None else [])
    got = fetch(run_kernel(kernel, inputs, output, host), output)
    bound = (case.convolve(np.abs(x), np.abs(w)) + 4) * (w[0].size + 2) * 2.0**-24
    assert (np.abs(got - numerics.f32_conv2d(x, w, bias, residual, **attrs)) <= bound).all()


def test_float_dense(target: Target) -> None:
    rng = np.random.default_rng(4)
    x, w, bias = (rng.standard_normal(s).astype(np.float32) for s in ((5, 41), (23, 41), (23,)))
    output = Layout((5, 23), "float32")
    op, row = OpCall("qc.f32.dense", [Layout((5, 41), "float32"), w, bias], {"low": -BIG, "high": BIG}, output), row_of("qc.f32.dense", target)
    kernel, host = build(row, op, row.default(op, target), target)
    got = fetch(run_kernel(kernel, [store(x, op.tensors[0])], output, host), output)
    bound = (np.abs(x).astype(np.float64) @ np.abs(w.T) + 4) * 43 * 2.0**-24
    assert (np.abs(got - numerics.f32_dense(x, w, bias, low=-BIG, high=BIG)) <= bound).all()


# -- what is not arithmetic ----------------------------------------------------------------------------------------------------------------


def sample_op(inputs: int = 32, outputs: int = 32, **attrs: Any) -> OpCall:
    case = Case((1, 6, 6, inputs), outputs)
    rng = np.random.default_rng(5)
    weight = rng.integers(-9, 9, (outputs, 1, 1, inputs)).astype(np.int8)
    tables = [np.ones(outputs, np.int32), np.full(outputs, 1e-3, np.float32)]
    return OpCall("qc.conv2d", [Layout(case.image, "uint8"), weight, *tables], case.attributes() | attrs, Layout((1, 6, 6, outputs), "uint8"))


def test_code_is_shared_between_layers_that_differ_in_constants(target: Target) -> None:
    row = row_of("qc.conv2d", target)
    built = []
    for op in (sample_op(), sample_op(zero_point=-40, x_zero_point=3), sample_op(low=0)):
        built.append(row.build(op, row.default(op, target), target))
    assert built[0].key == built[1].key != built[2].key
    tvm.ir.assert_structural_equal(built[0].func, built[1].func, map_free_vars=True)


def test_constants_hold_the_weights_once(target: Target) -> None:
    row, op = row_of("qc.conv2d", target), sample_op(64, 96)
    kernel = row.build(op, row.default(op, target), target)
    assert kernel.constants[0].dtype == np.int8 and kernel.constants[0].nbytes == 64 * 96


def test_wide_convolutions_have_tasks_for_many_threads_and_small_ones_have_one(target: Target) -> None:
    row = row_of("qc.conv2d", target)

    def tasks(size: int, inputs: int, outputs: int) -> int:
        op = sample_op(inputs, outputs)
        op.operands[0], op.output = Layout((1, size, size, inputs), "uint8"), Layout((1, size, size, outputs), "uint8")
        return row.build(op, row.default(op, target), target).tasks

    assert tasks(56, 256, 128) >= 16
    assert tasks(7, 512, 2048) >= 16
    assert tasks(4, 16, 16) == 1


def test_refusals_say_why(target: Target) -> None:
    row, op = row_of("qc.conv2d", target), sample_op()
    weight = op.operands[1]
    op.operands[1] = Layout((32, 1, 1, 32), "int8")
    assert "must be constants" in str(row.refuse(op, target))
    op.operands[1], op.operands[0] = weight, Layout((1, 6, 6, 32), "int8")
    assert "stored as int8; supported: uint8" in str(row.refuse(op, target))
    with pytest.raises(ValueError, match="larger than the output"):
        op = sample_op()
        row.build(op, row.default(op, target) | {"rows": 3}, target)


def test_alder_lake_gets_vex_encoded_dots() -> None:
    row, op = row_of("qc.conv2d", AVXVNNI), sample_op()
    kernel = row.build(op, row.default(op, AVXVNNI), AVXVNNI)
    assembly = tvm.tirx.build(module_of(kernel, len(kernel.constants) + 2), target=tvm.target.Target(AVXVNNI.tvm)).inspect_source("asm")
    assert "vpdpbusd" in assembly and "zmm" not in assembly and "{vex}" in assembly


# -- the forms of a dot step without VNNI -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 1, 2])
def test_pairs_that_could_saturate_are_refused(order: int) -> None:
    """VPMADDUBSW, as its manual has it, against the exact sum, at every pair of weights near the bound and the extremes of activations."""
    form = AVX2_ISA.forms[order]
    weights = np.array([(a, b) for a in range(-127, 128) for b in range(-127, 128) if abs(abs(a) + abs(b) - 128) <= 3 or abs(a) == abs(b)], np.int8)
    steps = np.zeros((len(weights), 8, 4), np.int8)
    steps[:, 5, form.order[2:]] = weights  # one lane of eight, one pair of two
    sums = [weights.astype(np.int64) @ (u, v) for u in (0, 255) for v in (0, 255)]
    exact = np.all([(s >= -(2**15)) & (s < 2**15) for s in sums], axis=0)
    assert exact.any() and not exact.all()
    np.testing.assert_array_equal(form.takes(steps), exact)


# weights of a step that only one form takes, besides the last one, which takes any: a pair of 64 and 64 is at the bound, one of 64 and 65 beyond it
STEPS = {0: (64, 64, 65, 63), 1: (-64, -65, -64, -63), 2: (64, 65, 63, 64), 3: (65, 64, 127, 127)}


@pytest.mark.parametrize("blocks,kernel", [(1, (1, 1)), (2, (1, 1)), (2, (3, 3)), (3, (3, 3))])
def test_every_class_of_steps(kernel: tuple[int, int], blocks: int) -> None:
    """Weights at the bound and at the extremes, full activations, in every combination of forms."""
    for form, step in STEPS.items():
        assert [f.takes(np.array(step).reshape(1, 1, 4)).item() for f in AVX2_ISA.forms[:3]] == [form == i for i in range(3)]
    rng, pad, channels, outputs = np.random.default_rng(blocks), kernel[0] // 2, 64, 24
    of_block = np.arange(outputs) // 4 % 2 if blocks == 2 else np.zeros(outputs, int)  # whose channels are packed together
    w = np.zeros((outputs, *kernel, channels), np.int8)
    for step in range(channels // 4):  # 16 combinations of two forms
        for block, form in enumerate((step % 4, step // 4)):
            w[of_block == block, ..., 4 * step : 4 * step + 4] = STEPS[form]
    x = rng.choice(np.array([-128, 127, 127], np.int8), (1, 5, 9, channels))
    attrs = Case(x.shape, outputs, kernel, pad=pad).attributes() | {"x_zero_point": -128}
    bias, multiplier = np.zeros(outputs, np.int32), np.full(outputs, 1e-4, np.float32)
    row, output = row_of("qc.conv2d", AVX2), Layout((1, 5, 9, outputs), "uint8")
    op = OpCall("qc.conv2d", [Layout(x.shape, "uint8", (pad,) * 4), w, bias, multiplier], attrs, output)
    built = row.build(op, row.default(op, AVX2) | {"rows": 1, "cols": 2, "blocks": blocks}, AVX2)
    depth, tiles = w[0].size // 4, -(-outputs // (8 * blocks))
    ends = built.constants[1].reshape(tiles, -1)[0, : len(step_classes(AVX2_ISA, blocks))]
    assert (np.diff(ends, prepend=0) > 0).all() and ends[-1] == depth
    got = fetch(run_kernel(built, [store(x, op.tensors[0], -128)], output, AVX2), output)
    np.testing.assert_array_equal(got, numerics.conv2d(x, w, bias, multiplier, **attrs))


def test_weights_decide_the_order_of_steps_and_never_the_code() -> None:
    row, narrow, wide = row_of("qc.conv2d", AVX2), sample_op(64), sample_op(64)
    wide.operands[1] = np.full((32, 1, 1, 64), 127, np.int8)
    kernels = [row.build(op, row.default(op, AVX2), AVX2) for op in (narrow, wide)]
    assert kernels[0].key == kernels[1].key
    tvm.ir.assert_structural_equal(kernels[0].func, kernels[1].func, map_free_vars=True)
    ends = [k.constants[1].reshape(32 // (8 * k.params["blocks"]), -1)[:, 0] for k in kernels]
    assert (ends[0] == 16).all() and (ends[1] == 0).all()
    assert [a.nbytes for a in kernels[0].constants] == [a.nbytes for a in kernels[1].constants]
