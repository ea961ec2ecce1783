"""Depthwise kernels of x86 equal numerics.py bit for bit (float ones within rounding), on every ISA row this machine can execute."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st
from x86_emulation import TARGETS, build, each, runs_here, sampled

from qcompiler import schedules
from qcompiler.base.targets import Target, find_target
from qcompiler.numerics import operators as numerics
from qcompiler.schedules.harness import fetch, module_of, run_kernel, store
from qcompiler.schedules.table import KERNELS, Kernel, Layout, OpCall, Row, select

AVX512VNNI, AVX512, AVX2, AVXVNNI = (find_target(f"x86-{n}") for n in ("avx512vnni", "avx512", "avx2", "avxvnni"))
schedules.load(AVX2)


@pytest.fixture(params=each(TARGETS))
def target(request: pytest.FixtureRequest) -> Target:
    return request.param


def row_of(operator: str, target: Target) -> Row:
    return next(r for isa in target.rows for r in KERNELS[operator] if r.isa == isa and "depthwise" in r.name)


@dataclasses.dataclass
class Case:
    """A depthwise convolution on random data; `out` and `more` are further fields of the output's and the input's layout."""

    channels: int
    size: tuple[int, int] = (6, 9)
    kernel: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    pad: tuple[int, int, int, int] = (1, 1, 1, 1)
    dilation: tuple[int, int] = (1, 1)
    batch: int = 1
    zero: int = -128
    bounds: tuple[int, int] = (-128, 127)
    storage: str = "uint8"
    residual: bool = False
    extreme: bool = False  # only -128 and 127, weights only -127 and 127
    scale: float = 1.0  # of the multipliers
    attrs: dict[str, Any] = dataclasses.field(default_factory=dict)
    out: dict[str, Any] = dataclasses.field(default_factory=dict)
    halo: int = 0  # of the input, beyond what the row needs

    def geometry(self) -> dict[str, Any]:
        return {"strides": list(self.strides), "padding": list(self.pad), "dilation": list(self.dilation), "groups": self.channels}

    def shape(self) -> tuple[int, ...]:
        """Of the output."""
        x, w = np.zeros((self.batch, *self.size, self.channels)), np.zeros((self.channels, *self.kernel, 1))
        return numerics.convolve(x, w, self.strides, self.pad, self.dilation, self.channels).shape

    def layouts(self, row: Row, op: OpCall, target: Target) -> None:
        """Decide the operands' layouts by what the row needs."""
        assert row.refuse(op, target) is None
        for i, need in enumerate(row.needs(op, target)):
            at = 0 if i == 0 else 4 if op.name == "qc.conv2d" else 3
            layout, halo = op.operands[at], tuple(h + self.halo for h in need.halo)
            op.operands[at] = dataclasses.replace(layout, halo=halo, pitch=-(-self.channels // need.pitch) * need.pitch)

    def run(self, target: Target, params: dict[str, Any] | None = None, seed: int = 0) -> Kernel:
        """Build and run; the stored result must equal the reference in every bit."""
        rng, n = np.random.default_rng(seed), self.channels
        image, weight = (self.batch, *self.size, n), (n, *self.kernel, 1)
        if self.extreme:
            x, w = rng.choice(np.array([-128, 127], np.int8), image), rng.choice(np.array([-127, 127], np.int8), weight)
        else:
            x, w = rng.integers(-128, 128, image).astype(np.int8), rng.integers(-127, 128, weight).astype(np.int8)
        bias = rng.integers(-3000, 3000, n).astype(np.int32)
        typical = 70 * 74 * np.sqrt(w[0].size) * (2.0**-11 if self.residual else 1.0)
        multiplier = (self.scale * rng.uniform(20, 200, n) / typical).astype(np.float32)
        attrs = self.geometry() | {"x_zero_point": 11, "zero_point": self.zero, "low": self.bounds[0], "high": self.bounds[1], "out_dtype": "int8"}
        residual = None
        operands: list[Any] = [Layout(image, "uint8"), w, bias, multiplier]
        if self.residual:
            attrs |= {"residual_zero_point": -3, "residual_multiplier": 1400, "residual_shift": 11}
            residual = rng.integers(-128, 128, self.shape()).astype(np.int8)
            operands.append(Layout(self.shape(), "uint8"))
        attrs |= self.attrs
        dtype = "float32" if attrs["out_dtype"] == "float32" else self.storage
        op = OpCall("qc.conv2d", operands, attrs, Layout(self.shape(), dtype, **self.out))
        row = row_of("qc.conv2d", target)
        self.layouts(row, op, target)
        kernel, host = build(row, op, row.default(op, target) | (params or {}), target)
        inputs = [store(x, op.tensors[0], attrs["x_zero_point"])] + ([] if residual is None else [store(residual, op.tensors[1])])
        got = fetch(run_kernel(kernel, inputs, op.output, host), op.output)
        want = numerics.conv2d(x, w, bias, multiplier, residual, **attrs)
        assert got.dtype == want.dtype and got.shape == want.shape
        np.testing.assert_array_equal(got, want)
        assert kernel.macs == got.size * w[0].size
        return kernel


CASES = {
    **{f"channels-{c}": Case(c, (5, 6)) for c in (2, 3, 8, 16, 17, 24, 33, 40, 64, 120, 144)},
    "stride-2": Case(72, (9, 11), strides=(2, 2)),
    "stride-3-1": Case(32, (10, 7), strides=(3, 1), pad=(0, 1, 1, 0)),
    "5x5": Case(48, (9, 10), (5, 5), pad=(2, 2, 2, 2)),
    "5x5-stride-2": Case(80, (9, 10), (5, 5), (2, 2), (1, 1, 2, 2)),
    "7x7": Case(16, (9, 9), (7, 7), pad=(3, 3, 3, 3)),
    "3x1": Case(64, (7, 5), (3, 1), pad=(1, 0, 1, 0)),
    "1x5": Case(64, (4, 12), (1, 5), pad=(0, 2, 0, 2)),
    "2x2": Case(32, (6, 6), (2, 2), (2, 2), (0, 0, 0, 0)),
    "1x1": Case(40, (3, 5), (1, 1), pad=(0, 0, 0, 0)),
    "dilation": Case(32, (11, 12), (3, 3), pad=(2, 3, 2, 3), dilation=(2, 3)),
    "dilation-stride": Case(16, (11, 12), (3, 5), (2, 2), (2, 4, 2, 4), (2, 2)),
    "one-row": Case(64, (1, 20), (1, 3), pad=(0, 1, 0, 1)),
    "one-pixel": Case(128, (1, 1)),
    "batch": Case(24, batch=3),
    "halo-and-pitch": Case(40, out={"halo": (1, 2, 0, 1), "pitch": 48}, halo=2),
    "halo-few-channels": Case(5, out={"halo": (1, 1, 1, 1), "pitch": 8}, halo=1),
    "extremes": Case(96, (9, 9), (5, 5), pad=(2, 2, 2, 2), extreme=True),
    "saturating": Case(64, extreme=True, scale=3000.0),
    "beyond-int32": Case(48, extreme=True, scale=1e9),
    "tiny-multiplier": Case(32, extreme=True, scale=1e-9),
    "zero-point": Case(72, zero=9),
    "zero-point-bounds": Case(64, zero=-20, bounds=(-20, 101)),
    "zero-point-saturating": Case(64, zero=127, extreme=True, scale=1e9),
    "bounds": Case(64, bounds=(-128, 80)),
    "int8-storage": Case(96, zero=4, bounds=(-100, 110), storage="int8"),
    "residual": Case(80, zero=3, residual=True),
    "residual-few-channels": Case(6, zero=3, residual=True, bounds=(3, 127)),
    "residual-beyond-int32": Case(32, zero=-128, residual=True, scale=1e6, extreme=True),
    "float-output": Case(88, attrs={"out_dtype": "float32"}),
    "float-output-few-channels": Case(6, attrs={"out_dtype": "float32", "float_low": 0.0, "float_high": 30.0}),
}


SAMPLE = {
    "channels-3", "channels-120", "dilation-stride", "1x5", "halo-few-channels", "saturating", "beyond-int32", "zero-point-bounds", "int8-storage",
    "residual-few-channels", "residual-beyond-int32", "float-output-few-channels",
}  # fmt: skip


@runs_here
@sampled("name", CASES, SAMPLE)
def test_equals_the_reference(name: str, target: Target) -> None:
    CASES[name].run(target)


COLUMNS = {  # vectors of outputs that lie side by side
    "touch": Case(32, (5, 9)),
    "four-touch": Case(16, (5, 11)),
    "apart": Case(32, (5, 9), out={"halo": (1, 2, 0, 1), "pitch": 48}, halo=1),
    "few-channels": Case(5, (5, 9), out={"halo": (1, 1, 1, 1), "pitch": 16}),
    "behind-wider": Case(112, (5, 9)),
    "stride-2": Case(48, (9, 18), strides=(2, 2)),
    "stride-3-1": Case(16, (10, 21), strides=(1, 3)),
    "dilation": Case(32, (7, 12), pad=(2, 3, 2, 3), dilation=(2, 3)),
    "5x5": Case(24, (7, 10), (5, 5), pad=(2, 2, 2, 2)),
    "residual": Case(80, (5, 9), zero=3, residual=True),
    "residual-touch": Case(16, (5, 9), residual=True, bounds=(-128, 90)),
    "int8-storage": Case(32, (5, 9), zero=4, bounds=(-100, 110), storage="int8"),
    "float-output": Case(40, (5, 9), attrs={"out_dtype": "float32", "float_low": 0.0, "float_high": 30.0}),
}


@runs_here
@sampled("name", COLUMNS, {"few-channels", "stride-2", "residual", "float-output"})
@pytest.mark.parametrize("point", [{"columns": 4}, {"rows": 2, "columns": 6, "leftover": "wide"}, {"columns": 4, "fold": 0}], ids=str)
def test_columns_share_vectors(name: str, point: dict[str, Any], target: Target) -> None:
    COLUMNS[name].run(target, {"rows": 1} | point)


@runs_here
@pytest.mark.parametrize("order", ["channels", "rows", "columns"])
def test_any_order_of_tiles_and_blocks(order: str, target: Target) -> None:
    """Blocks of all widths, ragged edges in both directions, and tasks of some rows."""
    Case(112, (9, 15), strides=(2, 2), batch=2).run(target, {"order": order, "rows": 2, "columns": 3, "row_tasks": 2, "channel_tasks": 1})


def test_vectors_of_few_channels_are_filled() -> None:
    """Half as many dot steps for two columns as for one after the other."""
    attrs = Case(32).geometry() | {"x_zero_point": 0, "zero_point": -128, "low": -128, "high": 127, "out_dtype": "int8"}
    constants = [np.ones((32, 3, 3, 1), np.int8), np.zeros(32, np.int32), np.full(32, 1e-3, np.float32)]
    op = OpCall("qc.conv2d", [Layout((1, 4, 8, 32), "uint8", (1, 1, 1, 1)), *constants], attrs, Layout((1, 4, 8, 32), "uint8"))
    row = row_of("qc.conv2d", AVX512VNNI)
    point = row.default(op, AVX512VNNI) | {"rows": 2, "columns": 4}
    apart, together = (str(row.build(op, point | {"fold": fold}, AVX512VNNI).func).count("vpdpbusd") for fold in (0, 1))
    assert apart == 2 * together > 0


@runs_here
@sampled("seed", range(8), {2})
def test_points_of_the_space_are_exact(seed: int, target: Target) -> None:
    rng = np.random.default_rng(seed)
    shape = [(3, 3), (5, 5), (3, 5), (2, 3)][seed % 4]
    case = Case(int(rng.choice([20, 64, 136, 200])), (int(rng.integers(5, 10)), int(rng.integers(5, 13))), shape, ((1, 1), (2, 2))[seed % 2])
    case.zero = int(rng.integers(-128, 128))
    op = OpCall(
        "qc.conv2d",
        [Layout((1, *case.size, case.channels), "uint8"), np.zeros((case.channels, *shape, 1), np.int8)],
        case.geometry(),
        Layout(case.shape(), "uint8"),
    )
    space = row_of("qc.conv2d", target).space(op, target)
    for _ in range(10):
        try:
            kernel = case.run(target, {k: v[int(rng.integers(len(v)))] for k, v in space.items()}, seed=seed)
        except ValueError:  # too long a step
            continue
        assert kernel.tasks >= 1
        return
    pytest.fail("no point could be built")


@runs_here
def test_too_long_a_step_is_refused(target: Target) -> None:
    with pytest.raises(ValueError, match=r"a step of 4 x 14 outputs has \d+ instructions, more than 1500"):
        Case(32, (14, 14), (5, 5), pad=(2, 2, 2, 2)).run(target, {"rows": 4, "columns": 14})


FLOAT_CASES = {
    **{f"channels-{c}": Case(c, (5, 6)) for c in (2, 8, 9, 24, 100)},
    "5x5-stride-2": Case(24, (9, 10), (5, 5), (2, 2), (1, 1, 2, 2)),
    "dilation": Case(32, (11, 12), (3, 3), pad=(2, 3, 2, 3), dilation=(2, 3)),
    "batch-halo-pitch": Case(20, batch=2, out={"halo": (1, 2, 0, 1), "pitch": 32}, halo=1),
    "residual": Case(40, residual=True),
    "residual-few-channels": Case(3, residual=True),
}


@runs_here
@sampled("name", FLOAT_CASES, {"residual"})
@pytest.mark.parametrize("point", [{}, {"rows": 2, "columns": 4, "width": 8, "row_tasks": 2, "channel_tasks": 2}], ids=["default", "other"])
def test_float_is_within_rounding(name: str, point: dict[str, Any], target: Target) -> None:
    case, rng = FLOAT_CASES[name], np.random.default_rng(3)
    n = case.channels
    x = rng.standard_normal((case.batch, *case.size, n)).astype(np.float32)
    w, bias = rng.standard_normal((n, *case.kernel, 1)).astype(np.float32), rng.standard_normal(n).astype(np.float32)
    residual = rng.standard_normal(case.shape()).astype(np.float32) if case.residual else None
    attrs = case.geometry() | {"low": -0.5, "high": 4.0}
    operands: list[Any] = [Layout(x.shape, "float32"), w, bias] + ([Layout(case.shape(), "float32")] if case.residual else [])
    op = OpCall("qc.f32.conv2d", operands, attrs, Layout(case.shape(), "float32", **case.out))
    row = row_of("qc.f32.conv2d", target)
    case.layouts(row, op, target)
    kernel, host = build(row, op, row.default(op, target) | point, target)
    inputs = [store(v, layout, 0, garbage=0) for v, layout in zip([x] + ([] if residual is None else [residual]), op.tensors, strict=True)]
    got = fetch(run_kernel(kernel, inputs, op.output, host), op.output)
    want = numerics.f32_conv2d(x, w, bias, residual, **attrs)
    # every partial sum is below 64 here, and there are at most 27 roundings of half a unit in the last place (2^-18 below 64)
    np.testing.assert_allclose(got, want, rtol=0, atol=27 * 2.0**-19)


def test_code_does_not_depend_on_constants() -> None:
    row = row_of("qc.conv2d", AVX512VNNI)
    keys = set()
    for seed, (x_zero, zero) in enumerate([(11, -128), (-5, -128), (0, -128)]):
        rng = np.random.default_rng(seed)
        attrs = Case(64).geometry() | {"x_zero_point": x_zero, "zero_point": zero, "low": -128, "high": 127, "out_dtype": "int8"}
        w = rng.integers(-127, 128, (64, 3, 3, 1)).astype(np.int8)
        op = OpCall(
            "qc.conv2d",
            [Layout((1, 8, 8, 64), "uint8", (1, 1, 1, 1)), w, np.zeros(64, np.int32), np.full(64, 1e-3, np.float32)],
            attrs,
            Layout((1, 8, 8, 64), "uint8"),
        )
        kernel = row.build(op, row.default(op, AVX512VNNI), AVX512VNNI)
        keys.add(kernel.key)
    assert len(keys) == 1


@pytest.mark.parametrize(
    ("groups", "channels", "outputs", "reason"),
    [(4, 4, 8, "must be equal"), (2, 4, 4, "must be equal"), (1, 1, 1, "more than 1")],
)
def test_refuses_what_is_not_depthwise(groups: int, channels: int, outputs: int, reason: str) -> None:
    w = np.zeros((outputs, 3, 3, channels // groups), np.int8)
    attrs = {"strides": [1, 1], "padding": [1, 1, 1, 1], "dilation": [1, 1], "groups": groups, "out_dtype": "int8"}
    op = OpCall(
        "qc.conv2d",
        [Layout((1, 8, 8, channels), "uint8"), w, np.zeros(outputs, np.int32), np.ones(outputs, np.float32)],
        attrs,
        Layout((1, 8, 8, outputs), "uint8"),
    )
    assert reason in (row_of("qc.conv2d", AVX512VNNI).refuse(op, AVX512VNNI) or "")


def test_the_table_prefers_it() -> None:
    attrs = {"strides": [1, 1], "padding": [1, 1, 1, 1], "dilation": [1, 1], "groups": 32, "out_dtype": "int8"}
    w = np.zeros((32, 3, 3, 1), np.int8)
    op = OpCall("qc.conv2d", [Layout((1, 8, 8, 32), "uint8"), w, np.zeros(32, np.int32), np.ones(32, np.float32)], attrs, Layout((1, 8, 8, 32), "uint8"))
    assert [select(op, t).name for t in TARGETS] == [f"{t.name}/depthwise" for t in TARGETS]
    op = OpCall("qc.f32.conv2d", [Layout((1, 8, 8, 32), "float32"), w.astype(np.float32), np.zeros(32, np.float32)], attrs, Layout((1, 8, 8, 32), "float32"))
    assert [select(op, t).name for t in (AVX512VNNI, AVX512, AVXVNNI)] == [f"x86-{n}/f32-depthwise" for n in ("avx512vnni", "avx512", "avx2")]


def test_vex_encoded_where_the_target_has_no_avx512() -> None:
    """AVX-VNNI kernels use the VEX encoding of VPDPBUSD, AVX2 ones VPMADDWD and never the saturating VPMADDUBSW."""
    for target, wanted in ((AVXVNNI, "{vex}\tvpdpbusd"), (AVX2, "vpmaddwd")):
        row = row_of("qc.conv2d", target)
        attrs = Case(64).geometry() | {"x_zero_point": 0, "zero_point": -128, "low": -128, "high": 127, "out_dtype": "int8"}
        op = OpCall(
            "qc.conv2d",
            [Layout((1, 8, 8, 64), "uint8", (1, 1, 1, 1)), np.ones((64, 3, 3, 1), np.int8), np.zeros(64, np.int32), np.full(64, 1e-3, np.float32)],
            attrs,
            Layout((1, 8, 8, 64), "uint8"),
        )
        kernel = row.build(op, row.default(op, target), target)
        asm = tvm.tirx.build(module_of(kernel, 2 + len(kernel.constants)), target=tvm.target.Target(target.tvm)).inspect_source("asm")
        assert wanted in asm and "%zmm" not in asm and "vpmaddubsw" not in asm


@given(st.data())
def test_a_plan_multiplies_every_tap_once(data: st.DataObject) -> None:
    from qcompiler.schedules.depthwise_plan import plan_taps

    pair = lambda most: data.draw(st.tuples(st.integers(1, most), st.integers(1, most)))  # noqa: E731
    kernel, strides, dilation, tile = pair(6), pair(3), pair(3), pair(4)
    size, leftover = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.sampled_from(["tall", "wide"]))
    plan = plan_taps(kernel, strides, dilation, tile, size, leftover)
    found = []
    for bundle in plan.bundles:
        assert len(bundle.pixels) <= size
        for output, pattern in bundle.uses:
            for pixel, tap in zip(bundle.pixels, plan.patterns[pattern], strict=False):
                if tap is not None:
                    r, s = divmod(output, tile[1])
                    assert pixel == (r * strides[0] + tap[0] * dilation[0], s * strides[1] + tap[1] * dilation[1])
                    found.append((output, tap))
    assert len(found) == len(set(found)) == tile[0] * tile[1] * kernel[0] * kernel[1]


@given(st.integers(1, 400), st.sampled_from([(64, 32, 16), (32, 16), (16, 8), (8,)]))
def test_blocks_cover_the_channels(channels: int, widths: tuple[int, ...]) -> None:
    from qcompiler.schedules.depthwise_plan import blocks_of

    blocks = blocks_of(channels, widths)
    covered = {c for first, width in blocks for c in range(first, first + width)}
    assert covered >= set(range(channels))
    assert covered == set(range(channels)) or (channels < widths[-1] and blocks == [(0, widths[-1])])
    assert sorted((w for _, w in blocks), reverse=True) == [w for _, w in blocks]


@pytest.mark.parametrize("change", ["numbers", "scale", "bounds"])
def test_code_is_written_once_for_what_it_depends_on(change: str) -> None:
    """Other weights have the same function; multipliers that need a clamp before conversion, or other bounds, another one."""
    first, other = (Case(32, scale=1e6 if change == "scale" and i else 1.0, bounds=(-128, 100 if change == "bounds" and i else 127)) for i in (0, 1))
    kernels = [first.run(AVX2, seed=1), other.run(AVX2, seed=2)]
    assert (kernels[0].func is kernels[1].func) == (kernels[0].key == kernels[1].key) == (change == "numbers")
    assert any((a != b).any() for a, b in zip(kernels[0].constants, kernels[1].constants, strict=True))
