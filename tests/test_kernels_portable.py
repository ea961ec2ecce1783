"""Portable kernels equal numerics.py bit for bit: shapes, layouts, storage types, broadcasting, extremes."""

from __future__ import annotations

import dataclasses
from typing import Any

import binary_cases
import numpy as np
import pytest
from binary_cases import ADD, MUL

from qcompiler import schedules
from qcompiler.base.targets import Target, find_target, missing_features
from qcompiler.numerics import operators as numerics
from qcompiler.numerics import spec
from qcompiler.schedules.harness import fetch, run_kernel, store
from qcompiler.schedules.table import KERNELS, Kernel, Layout, OpCall

TARGETS = list({t.name: t for t in (find_target("x86-avx2"), find_target("native")) if not missing_features(t)}.values())
BASELINE = dataclasses.replace(TARGETS[0], name="baseline", tvm={"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64"}, features=())
MODES = [(TARGETS[0], "int8"), *((t, "uint8") for t in TARGETS)]  # targets and storage types
HALO = (1, 2, 3, 1)
schedules.load(TARGETS[0])
BIG = 3.4028234663852886e38


@pytest.fixture(params=TARGETS, ids=lambda t: t.name)
def target(request: pytest.FixtureRequest) -> Target:
    return request.param


def data(seed: int, *shape: int) -> np.ndarray:
    """Random int8 with both extremes in it."""
    values = np.random.default_rng(seed).integers(-128, 128, shape).astype(np.int8)
    values.reshape(-1)[:: max(1, values.size // 7)] = -128
    values.reshape(-1)[1 :: max(2, values.size // 5)] = 127
    return values


def build(op: OpCall, target: Target) -> Kernel:
    row = next(r for r in KERNELS[op.name] if r.isa == "any")
    assert row.refuse(op, target) is None
    return row.build(op, row.default(op, target), target)


def check(
    target: Target,
    name: str,
    operands: list[Any],
    attrs: dict[str, Any],
    *,
    layouts: dict[int, dict[str, Any]] | None = None,
    out: dict[str, Any] | None = None,
    constants: tuple[int, ...] = (),
    storage: str = "uint8",
    tolerance: float = 0.0,
) -> Kernel:
    """Run one operator on `target` and compare with numerics. `layouts`/`out`: halo and pitch of operands and output."""
    with np.errstate(over="ignore"):
        expected = np.asarray(numerics.OPERATORS[name](*operands, **attrs))
    stored: list[Layout | np.ndarray] = []
    inputs = []
    for index, operand in enumerate(operands):
        if index in constants:
            stored.append(operand)
            continue
        dtype = storage if operand.dtype == np.int8 else str(operand.dtype)
        layout = Layout(operand.shape, dtype, **(layouts or {}).get(index, {}))
        stored.append(layout)
        inputs.append(np.asarray(operand).reshape(-1) if layout.dense and dtype == "float32" else _store(operand, layout))
    output = Layout(expected.shape, storage if expected.dtype == np.int8 else str(expected.dtype), **(out or {}))
    kernel = build(OpCall(name, stored, attrs, output, "node"), target)
    result = fetch(run_kernel(kernel, inputs, output, target), output)
    if tolerance:
        np.testing.assert_allclose(result, expected, rtol=tolerance, atol=tolerance)
    else:
        np.testing.assert_array_equal(result, expected)
    return kernel


def _store(array: np.ndarray, layout: Layout) -> np.ndarray:
    return store(array, layout, zero_point=-77)  # portable kernels must not read the halo


# -- quantize, dequantize ---------------------------------------------------------------------------------------------------------------

NHWC, NCHW = [0, 2, 3, 1], [0, 3, 1, 2]


@pytest.mark.parametrize(
    "shape, axes, out",
    [
        ((1,), None, {}),
        ((3, 37), None, {}),
        ((1, 3, 19, 23), NHWC, {"pitch": 4, "halo": (3, 3, 3, 3)}),
        ((2, 3, 5, 7), NHWC, {}),
        ((1, 1, 9, 11), NHWC, {}),
        ((2, 37, 6, 5), NHWC, {}),
        ((1, 16, 3, 3), NHWC, {"pitch": 20}),
        ((2, 5, 6, 7), None, {"halo": HALO, "pitch": 8}),
        ((1, 3, 180, 301), NHWC, {}),
        ((160, 1001), None, {}),
        ((160001,), None, {}),
    ],
)
@pytest.mark.parametrize("target, storage", MODES, ids=lambda v: getattr(v, "name", v))
def test_quantize(target: Target, shape: tuple[int, ...], axes: list[int] | None, out: dict[str, Any], storage: str) -> None:
    x = np.random.default_rng(1).standard_normal(shape).astype(np.float32)
    special = [np.nan, np.inf, -np.inf, 0.5 * 0.02, 1.5 * 0.02, -0.0, 3e38, -1e-40]
    x.reshape(-1)[: len(special)] = special[: x.size]
    attrs = {"scale": float(np.float32(0.02)), "zero_point": 7, "low": -100, "high": 127} | ({"axes": axes} if axes else {})
    check(target, "qc.quantize", [x], attrs, out=out, storage=storage)


def test_quantize_ties_and_unaligned_source(target: Target) -> None:
    """Half-way points round to even; the source need not be aligned to more than its elements."""
    raw = np.arange(-300, 300, dtype=np.float32)
    x = np.append(np.float32(0), raw * np.float32(0.5))[1:]
    assert x.ctypes.data % 64 != 0 or x[1:].ctypes.data % 64 != 0
    for source in (x, x[1:]):
        check(target, "qc.quantize", [source], {"scale": 1.0, "zero_point": 1})


@pytest.mark.parametrize("shape, axes, layout", [((5, 33), None, {}), ((1, 7, 9, 21), NCHW, {"halo": HALO, "pitch": 24}), ((2, 4, 5, 3), NCHW, {})])
@pytest.mark.parametrize("target, storage", MODES, ids=lambda v: getattr(v, "name", v))
def test_dequantize(target: Target, shape: tuple[int, ...], axes: list[int] | None, layout: dict[str, Any], storage: str) -> None:
    attrs = {"scale": float(np.float32(0.037)), "zero_point": -128} | ({"axes": axes} if axes else {})
    check(target, "qc.dequantize", [data(2, *shape)], attrs, layouts={0: layout}, storage=storage)


# -- add, mul, lut ----------------------------------------------------------------------------------------------------------------------

BROADCASTS = [*binary_cases.BROADCASTS, ((300, 500), ())]


@pytest.mark.parametrize("a, b", BROADCASTS)
@pytest.mark.parametrize("name, attrs", [("qc.add", ADD), ("qc.mul", MUL)], ids=["add", "mul"])
def test_binary(target: Target, name: str, attrs: dict[str, Any], a: tuple[int, ...], b: tuple[int, ...]) -> None:
    check(target, name, [data(1, *a), data(2, *b)], attrs)
    if len(a) == 4:
        check(target, name, [data(1, *a), data(2, *b)], attrs, layouts={0: {"halo": HALO}}, out={"pitch": a[-1] + 3}, storage="int8")
    check(target, name, [data(1, *b), data(2, *a)], attrs, constants=(0,))


@pytest.mark.parametrize("target, storage", MODES, ids=lambda v: getattr(v, "name", v))
def test_lut(target: Target, storage: str) -> None:
    table = data(3, 256)
    every = np.arange(-128, 128, dtype=np.int8)
    check(target, "qc.lut", [every, table], {}, constants=(1,), storage=storage)
    check(target, "qc.lut", [data(1, 2, 5, 6, 7), table], {}, constants=(1,), out={"halo": HALO, "pitch": 8}, storage=storage)
    check(target, "qc.lut", [data(1, 50_001), table], {}, constants=(1,), storage=storage)
    wide = np.random.default_rng(3).integers(-(2**15), 2**15, 256, np.int16)  # into a stream
    check(target, "qc.lut", [every, wide], {}, constants=(1,), storage=storage)
    check(target, "qc.lut", [data(1, 2, 5, 6, 7), wide], {}, constants=(1,), storage=storage)
    for length in (1, 15, 16, 17, 31, 33, 48, 100):
        check(target, "qc.lut", [data(length, 3, length), table], {}, constants=(1,), storage=storage)
        check(target, "qc.lut", [data(length, 1, 2, 3, length), table], {}, constants=(1,), layouts={0: {"pitch": length + 5}}, storage=storage)


@pytest.mark.parametrize("shape", [(1, 5, 6, 33), (2, 3, 4, 5), (7, 64), (40,)])
@pytest.mark.parametrize("target, storage", [*MODES, (BASELINE, "int8")], ids=lambda v: getattr(v, "name", v))
def test_prelu(target: Target, shape: tuple[int, ...], storage: str) -> None:
    """Every input meets slopes below and above 1, negative ones, zero, ties, and some that overflow."""
    negative = np.resize(np.array([0.25, -0.5, 0.0, 1.5, 1e30, -1e30, 0.013], np.float32), shape[-1])
    layouts: dict[str, Any] = {"layouts": {0: {"halo": HALO, "pitch": shape[-1] + 3}}, "out": {"halo": HALO, "pitch": shape[-1] + 2}} if len(shape) == 4 else {}
    attrs = {"multiplier": 0.5, "x_zero_point": -3, "zero_point": 2, "low": -100, "high": 90}
    check(target, "qc.prelu", [data(1, *shape), negative], attrs, constants=(1,), storage=storage, **layouts)
    every = np.broadcast_to(np.arange(-128, 128, dtype=np.int8)[:, None], (256, len(negative)))
    check(target, "qc.prelu", [every, negative], attrs, constants=(1,), storage=storage)


@pytest.mark.parametrize("target, storage", MODES, ids=lambda v: getattr(v, "name", v))
def test_every_pair_of_operands(target: Target, storage: str) -> None:
    """All 65536 pairs: the greatest multipliers, sums and products that clip far outside, and so far that a conversion to int32 overflows."""
    a, b = np.arange(-128, 128, dtype=np.int8)[:, None], np.arange(-128, 128, dtype=np.int8)[None]
    narrow = {"zero_point": 100, "low": -3, "high": 101}
    for multipliers in ((2**23 - 5, 32_000, 23), (-(2**22), 2**22, 1), (12_345, -54_321, 17)):
        attrs = dict(zip(("a_multiplier", "b_multiplier", "shift"), multipliers, strict=True))
        for bounds in ({"zero_point": -128, "low": -128, "high": 127}, narrow):
            check(target, "qc.add", [a + np.int8(0) * b, b], ADD | attrs | bounds, storage=storage)
    for multiplier in (0.0037, 100.0, 40_000.0, 3e38):
        check(target, "qc.mul", [a + np.int8(0) * b, b], MUL | narrow | {"multiplier": float(np.float32(multiplier))}, storage=storage)


# -- pooling ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, kernel, strides, padding, dilation",
    [
        ((1, 12, 13, 64), [3, 3], [2, 2], [1, 1, 1, 1], [1, 1]),
        ((2, 7, 9, 5), [2, 3], [1, 2], [0, 1, 1, 0], [1, 1]),
        ((1, 11, 10, 70), [3, 3], [2, 1], [2, 0, 1, 2], [2, 3]),
        ((1, 3, 3, 33), [3, 3], [1, 1], [1, 1, 1, 1], [1, 1]),
        ((1, 2, 2, 8), [5, 5], [1, 1], [2, 2, 2, 2], [1, 1]),
        ((1, 60, 60, 40), [3, 3], [1, 1], [1, 1, 1, 1], [1, 1]),
    ],
)
def test_pool2d(target: Target, shape: tuple[int, ...], kernel: list[int], strides: list[int], padding: list[int], dilation: list[int]) -> None:
    x = data(4, *shape)
    geometry = {"kernel": kernel, "strides": strides, "padding": padding}
    out = {"halo": HALO, "pitch": shape[-1] + 7}
    check(target, "qc.max_pool2d", [x], geometry | {"dilation": dilation}, layouts={0: {"halo": (2, 1, 0, 1)}}, out=out)
    check(target, "qc.max_pool2d", [x], geometry | {"dilation": dilation}, storage="int8")
    if dilation == [1, 1]:
        for include in (True, False):
            attrs = geometry | {
                "count_include_pad": include,
                "x_zero_point": 9,
                "ratio": 0.7312,
                "zero_point": -3,
                "low": -128,
                "high": 127,
            }
            check(target, "qc.avg_pool2d", [x], attrs, out=out if include else {}, storage="uint8" if include else "int8")


@pytest.mark.parametrize("kernel", [(15, 17), (16, 16), (2, 2)])
@pytest.mark.parametrize("target, storage", MODES, ids=lambda v: getattr(v, "name", v))
def test_average_of_extremes(target: Target, storage: str, kernel: tuple[int, int]) -> None:
    """Windows of the least and of the greatest values: their sums just fit 16 bits, or don't."""
    x = np.full((1, 2 * kernel[0], kernel[1], 40), 127, np.int8)
    x[:, : kernel[0]] = -128
    for include, padding in ((False, [0, 0, 0, 0]), (True, [1, 0, 1, 1])):
        attrs = {"kernel": list(kernel), "strides": list(kernel), "padding": padding, "count_include_pad": include, "x_zero_point": 127}
        check(target, "qc.avg_pool2d", [x], attrs | {"ratio": 0.93, "zero_point": -3}, storage=storage)


def test_average_of_padding_only_is_zero(target: Target) -> None:
    geometry = {"kernel": [2, 2], "strides": [1, 1], "padding": [3, 0, 0, 2]}
    attrs = geometry | {"count_include_pad": False, "x_zero_point": 9, "ratio": 0.7, "zero_point": -3}
    check(target, "qc.avg_pool2d", [data(4, 1, 4, 5, 8)], attrs)


def test_pool_refuses_a_window_of_padding_only() -> None:
    op = OpCall(
        "qc.max_pool2d",
        [Layout((1, 4, 4, 8), "uint8")],
        {"kernel": [2, 2], "strides": [1, 1], "padding": [3, 0, 0, 0]},
        Layout((1, 6, 3, 8), "uint8"),
    )
    reason = KERNELS["qc.max_pool2d"][-1].refuse(op, TARGETS[0])
    assert reason is not None and "row lies in the padding" in reason


@pytest.mark.parametrize(
    "shape, axes, keepdims",
    [
        ((1, 7, 7, 1280), [1, 2], True),
        ((2, 5, 6, 70), [1, 2], False),
        ((1, 7, 7, 3), [1, 2], True),
        ((2, 6, 75), [-1], True),
        ((2, 6, 75), [1], False),
        ((3, 4, 5, 6), [0, 3], False),
        ((400, 300), [1], False),
        ((1, 9, 9, 1001), [1, 2], True),
        ((64,), [0], True),
        ((5, 31), [0, 1], True),
    ],
)
def test_mean(target: Target, shape: tuple[int, ...], axes: list[int], keepdims: bool) -> None:
    attrs = {"axes": axes, "keepdims": keepdims, "x_zero_point": -11, "ratio": 1.913, "zero_point": 4, "low": -128, "high": 127}
    check(target, "qc.mean", [data(5, *shape)], attrs)
    check(
        target,
        "qc.mean",
        [data(5, *shape)],
        attrs,
        storage="int8",
        layouts={0: {"halo": HALO, "pitch": shape[-1] + 3}} if len(shape) == 4 else {},
    )


# -- movement ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis, extents", [(3, (5, 64, 17)), (1, (2, 3)), (2, (4, 1)), (0, (1, 2))])
def test_concat(target: Target, axis: int, extents: tuple[int, ...]) -> None:
    shapes = [[2 if axis else e, 4, 5, 16] for e in extents]
    for shape, extent in zip(shapes, extents, strict=True):
        shape[axis] = extent
    operands = [data(i, *shape) for i, shape in enumerate(shapes)]
    check(target, "qc.concat", operands, {"axis": axis})
    check(
        target,
        "qc.concat",
        operands,
        {"axis": axis - 4},
        layouts={1: {"halo": HALO}},
        out={"halo": HALO, "pitch": 100},
        constants=(0,),
        storage="int8",
    )


def test_large_concat_is_divided(target: Target) -> None:
    kernel = check(target, "qc.concat", [data(0, 1, 80, 90, 48), data(1, 1, 80, 90, 3)], {"axis": 3})
    assert kernel.tasks > 1
    check(target, "qc.concat", [data(0, 350_000), data(1, 77)], {"axis": 0})


@pytest.mark.parametrize(
    "name, shape, attrs, layout",
    [
        ("qc.reshape", (2, 6, 35), {"shape": [2, 5, 6, 7]}, {"halo": HALO, "pitch": 8}),
        ("qc.reshape", (2, 3, 4, 5), {"shape": [6, 20]}, {}),
        ("qc.transpose", (2, 33, 20, 5), {"axes": NHWC}, {"halo": HALO}),
        ("qc.transpose", (2, 9, 10, 37), {"axes": NCHW}, {}),
        ("qc.transpose", (70, 5), {"axes": [1, 0]}, {}),
        ("qc.transpose", (3, 4, 5, 6), {"axes": [3, 1, 0, 2]}, {}),
        ("qc.transpose", (300, 400), {"axes": [1, 0]}, {}),
        ("qc.transpose", (3, 2, 4), {"axes": [2, 1, 0]}, {}),
        ("qc.slice", (2, 9, 10, 40), {"begin": [1, 2, 0, 3], "end": [2, 9, 9, 40], "strides": [1, 3, 2, 1]}, {"pitch": 44}),
        ("qc.slice", (9, 50), {"begin": [0, 5], "end": [9, 50], "strides": [1, 7]}, {}),
        ("qc.pad", (2, 5, 6, 7), {"pads": [[0, 1], [2, 1], [0, 3], [1, 2]], "value": -7}, {"halo": HALO, "pitch": 12}),
        ("qc.pad", (40,), {"pads": [[3, 9]], "value": 100}, {}),
        ("qc.select", (2, 5, 6, 7), {"indices": [[1, 0], [2, 1, *range(5), 3, 2], [], [1, *range(7), 5, 4]]}, {"halo": HALO, "pitch": 12}),
        ("qc.select", (1, 5, 6, 70), {"indices": [[0, 0, 0], [], [5, 4, 3, 2, 1, 0], [*range(69, -1, -1)]]}, {}),
        ("qc.select", (9, 50), {"indices": [[], [49, 49, 49, *range(0, 50, 7), *range(40, 3, -2)]]}, {}),
        ("qc.pad", (5, 6), {"pads": [[0, 0], [0, 0]], "value": 0}, {}),
    ],
)
@pytest.mark.parametrize("target, storage", MODES, ids=lambda v: getattr(v, "name", v))
def test_movement(target: Target, name: str, shape: tuple[int, ...], attrs: dict[str, Any], layout: dict[str, Any], storage: str) -> None:
    source = {0: {"pitch": shape[-1] + 2, "halo": HALO}} if len(shape) == 4 and name != "qc.reshape" else {}
    check(target, name, [data(6, *shape)], attrs, layouts=source, out=layout, storage=storage)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "float32", "int64", "bool", "float16"])
def test_copy(target: Target, dtype: str) -> None:
    x = (data(7, 2, 5, 6, 21) > 0) if dtype == "bool" else data(7, 2, 5, 6, 21).astype("int8" if dtype == "uint8" else dtype)
    source, output = Layout(x.shape, dtype, HALO, 24), Layout(x.shape, dtype, (2, 0, 1, 1))
    for operands in ((source,), (x,)):
        kernel = build(OpCall("qc.copy", list(operands), {}, output), target)
        result = fetch(run_kernel(kernel, [] if operands[0] is x else [store(x, source)], output, target), output)
        np.testing.assert_array_equal(result, x)


@pytest.mark.parametrize(
    "layout",
    [
        Layout((2, 5, 6, 21), "uint8", HALO, 24),
        Layout((1, 7, 7, 64), "int8", (1, 1, 1, 1)),
        Layout((1, 3, 4, 5), "float32", (0, 1, 2, 0)),
        Layout((1, 3, 4, 5), "uint8"),
    ],
)
def test_fill_halo(target: Target, layout: Layout) -> None:
    """Every stored pixel outside the image holds the value; nothing else is written."""
    kernel = build(OpCall("qc.fill_halo", [], {"value": -9}, layout), target)
    stored = run_kernel(kernel, [], layout, target).reshape(layout.shape[0], *layout.rows, layout.channel_pitch)
    top, left = layout.halo[:2]
    inside = np.zeros(stored.shape[:3], bool)
    inside[:, top : top + layout.shape[1], left : left + layout.shape[2]] = True
    untouched = np.frombuffer(bytes([0xA5]) * stored.itemsize, stored.dtype)[0]
    assert (stored[inside] == untouched).all()
    assert (stored[~inside] == (-9 + (128 if layout.dtype == "uint8" else 0))).all()


@pytest.mark.parametrize("channels", [1, 3, 40, 128])
@pytest.mark.parametrize("target, storage", MODES, ids=lambda v: getattr(v, "name", v))
def test_resize2d(target: Target, channels: int, storage: str) -> None:
    rng = np.random.default_rng(8)
    attrs = {n: sorted(rng.integers(0, e, o).tolist()) for n, e, o in (("iy0", 5, 9), ("iy1", 5, 9), ("ix0", 6, 11), ("ix1", 6, 11))}
    attrs |= {"wy": [0, 1024, 512, *rng.integers(0, 1025, 6).tolist()], "wx": rng.integers(0, 1025, 11).tolist(), "size": [9, 11]}
    for method in ("nearest", "linear"):
        out = {"halo": HALO} if method == "linear" else {"pitch": channels + 5}
        check(
            target,
            "qc.resize2d",
            [data(9, 2, 5, 6, channels)],
            attrs | {"method": method},
            layouts={0: {"pitch": channels + 1}},
            out=out,
            storage=storage,
        )


@pytest.mark.parametrize("scale", [(1, 1), (2, 2), (4, 2), (8, 8), (16, 8), (8, 16)])
@pytest.mark.parametrize("target, storage", MODES, ids=lambda v: getattr(v, "name", v))
def test_enlarging_by_powers_of_two(target: Target, storage: str, scale: tuple[int, int]) -> None:
    """Weights with few bits, up to and beyond what 16 bits hold; ties of every kind, and the greatest sums."""
    attrs: dict[str, Any] = {"size": [6 * scale[0], 7 * scale[1]], "method": "linear"}
    for axis, extent, factor in (("y", 6, scale[0]), ("x", 7, scale[1])):
        attrs |= dict(zip((f"i{axis}0", f"i{axis}1", f"w{axis}"), spec.resize_indices(extent, extent * factor, "linear", "half_pixel"), strict=True))
    x = data(9, 1, 6, 7, 43)
    x[:, :3, :3], x[:, 3:, 3:] = 127, -128
    check(target, "qc.resize2d", [x], attrs, layouts={0: {"pitch": 45}}, storage=storage)


# -- matmul, dense, convolution ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "a, b",
    [
        ((5, 7), (7, 33)),
        ((2, 3, 9, 20), (2, 3, 20, 17)),
        ((2, 1, 4, 5), (3, 5, 64)),
        ((1, 40), (40, 1)),
        ((6, 100, 40), (40, 100)),
        ((130, 90), (90, 70)),
        ((4, 1), (1, 24)),
        ((3, 129), (129, 8)),
    ],
)
@pytest.mark.parametrize("out_dtype", ["int8", "float32"])
def test_matmul(target: Target, a: tuple[int, ...], b: tuple[int, ...], out_dtype: str) -> None:
    attrs = {
        "a_zero_point": -128,
        "b_zero_point": 127,
        "multiplier": float(np.float32(3e-4)),
        "zero_point": 2,
        "low": -128,
        "high": 127,
        "out_dtype": out_dtype,
    }
    check(target, "qc.matmul", [data(1, *a), data(2, *b)], attrs)
    check(target, "qc.matmul", [data(1, *a), data(2, *b)], attrs | {"float_low": -1.5}, constants=(1,), storage="int8")


def conv_case(shape: tuple[int, ...], outputs: int, kernel: tuple[int, ...], groups: int) -> list[np.ndarray]:
    rng = np.random.default_rng(11)
    w = rng.integers(-127, 128, (outputs, *kernel, shape[-1] // groups)).astype(np.int8)
    bias = rng.integers(-3000, 3000, outputs).astype(np.int32)
    multiplier = (rng.uniform(0.5, 1.5, outputs) * 0.5 / (60 * 74 * np.sqrt(w[0].size) / 60)).astype(np.float32)
    return [data(10, *shape), w, bias, multiplier]


QUANT = {"x_zero_point": -128, "zero_point": 5, "low": -128, "high": 127, "out_dtype": "int8"}
CONVS = [
    ((1, 6, 7, 5), 9, (3, 3), [1, 1], [1, 1, 1, 1], [1, 1], 1),
    ((2, 9, 8, 6), 70, (3, 2), [2, 1], [0, 2, 1, 0], [1, 2], 1),
    ((1, 7, 7, 20), 20, (3, 3), [1, 1], [1, 1, 1, 1], [1, 1], 20),
    ((1, 8, 7, 70), 70, (5, 5), [2, 2], [2, 2, 2, 2], [1, 1], 70),
    ((1, 6, 5, 6), 9, (3, 3), [1, 1], [1, 0, 1, 0], [1, 1], 3),
    ((1, 6, 5, 4), 12, (3, 3), [1, 1], [2, 2, 2, 2], [2, 2], 4),
    ((1, 6, 5, 128), 128, (3, 3), [1, 1], [1, 1, 1, 1], [1, 1], 32),
    ((1, 6, 5, 24), 16, (1, 3), [1, 1], [0, 1, 0, 1], [1, 1], 8),
    ((1, 6, 5, 14), 21, (2, 2), [1, 1], [0, 1, 1, 0], [1, 1], 7),
    ((1, 6, 5, 18), 54, (3, 3), [2, 2], [1, 1, 1, 1], [1, 1], 18),
    ((1, 1, 20, 3), 8, (1, 5), [1, 2], [0, 2, 0, 2], [1, 1], 1),
    ((1, 1, 1, 64), 200, (1, 1), [1, 1], [0, 0, 0, 0], [1, 1], 1),
    ((1, 20, 20, 64), 96, (3, 3), [1, 1], [1, 1, 1, 1], [1, 1], 1),
]


@pytest.mark.parametrize("shape, outputs, kernel, strides, padding, dilation, groups", CONVS)
def test_conv2d(target: Target, shape: Any, outputs: int, kernel: Any, strides: list[int], padding: list[int], dilation: list[int], groups: int) -> None:
    operands = conv_case(shape, outputs, kernel, groups)
    geometry = {"strides": strides, "padding": padding, "dilation": dilation, "groups": groups}
    layouts = {0: {"halo": HALO, "pitch": shape[-1] + 1}}
    kernel_ = check(target, "qc.conv2d", operands, geometry | QUANT, constants=(1, 2, 3), layouts=layouts, out={"halo": HALO, "pitch": outputs + 3})
    assert kernel_.macs > 0
    check(target, "qc.conv2d", operands, geometry | QUANT | {"out_dtype": "float32"}, constants=(1, 2, 3), storage="int8")
    output = numerics.conv2d(*operands, **geometry, **QUANT)
    residual = {"residual_zero_point": 127, "residual_multiplier": -39_000, "residual_shift": 15}
    scaled = operands[3] * np.float32(2.0**15)
    check(
        target,
        "qc.conv2d",
        [*operands[:3], scaled, data(12, *output.shape)],
        geometry | QUANT | residual,
        constants=(1, 2, 3),
        layouts={4: {"pitch": outputs + 1}},
    )
    x, w, bias = operands[0].astype(np.float32) / 50, operands[1].astype(np.float32) / 90, operands[2].astype(np.float32) / 1000
    bounds = {"low": 0.0, "high": 6.0}
    check(
        target,
        "qc.f32.conv2d",
        [x, w, bias, output.astype(np.float32) / 40],
        geometry | bounds,
        constants=(1, 2),
        layouts=layouts,
        tolerance=1e-4,
    )


@pytest.mark.parametrize(
    "shape, outputs, kernel, strides, padding, output_padding, dilation, groups",
    [
        ((1, 5, 6, 7), 10, (3, 3), [2, 2], [1, 1, 1, 1], [1, 1], [1, 1], 1),
        ((2, 4, 3, 6), 4, (2, 4), [1, 3], [0, 2, 1, 1], [0, 0], [2, 1], 2),
        ((1, 4, 4, 18), 18, (4, 4), [2, 2], [1, 1, 1, 1], [0, 0], [1, 1], 18),
        ((1, 3, 3, 2), 1, (2, 2), [2, 2], [0, 0, 0, 0], [0, 0], [1, 1], 1),
    ],
)
def test_conv2d_transpose(
    target: Target, shape: Any, outputs: int, kernel: Any, strides: Any, padding: Any, output_padding: Any, dilation: Any, groups: int
) -> None:
    operands = conv_case(shape, outputs, kernel, groups)
    attrs = {"strides": strides, "padding": padding, "output_padding": output_padding, "dilation": dilation, "groups": groups}
    check(target, "qc.conv2d_transpose", operands, attrs | QUANT, constants=(1, 2, 3), layouts={0: {"halo": HALO}}, out={"pitch": outputs + 2})
    floats = [operands[0].astype(np.float32) / 50, operands[1].astype(np.float32) / 90, operands[2].astype(np.float32) / 1000]
    check(target, "qc.f32.conv2d_transpose", floats, attrs | {"low": 0.0, "high": 6.0}, constants=(1, 2), layouts={0: {"halo": HALO}}, tolerance=1e-4)


@pytest.mark.parametrize("shape, outputs", [((1, 100), 1000), ((1, 1280), 999), ((5, 33), 10), ((2, 3, 16), 65), ((1, 4, 5, 24), 7), ((3, 8), 1), ((16,), 5)])
def test_dense(target: Target, shape: tuple[int, ...], outputs: int) -> None:
    operands = conv_case(shape, outputs, (), 1)
    check(target, "qc.dense", operands, dict(QUANT), constants=(1, 2, 3))
    check(target, "qc.dense", operands, QUANT | {"out_dtype": "float32"}, constants=(1, 2, 3), storage="int8")
    residual = {"residual_zero_point": -3, "residual_multiplier": 20_000, "residual_shift": 14}
    check(target, "qc.dense", [*operands, data(13, *shape[:-1], outputs)], QUANT | residual, constants=(1, 2, 3))
    x, w, bias = operands[0].astype(np.float32) / 50, operands[1].astype(np.float32) / 90, operands[2].astype(np.float32) / 1000
    check(target, "qc.f32.dense", [x, w, bias], {"low": -BIG, "high": BIG}, constants=(1, 2), tolerance=2e-4)


# -- the table --------------------------------------------------------------------------------------------------------------------------


def test_code_does_not_depend_on_constants() -> None:
    """Layers of equal geometry share one kernel, and different geometries never do."""
    target = TARGETS[0]
    layout = Layout((1, 4, 5, 24), "uint8")
    keys = [build(OpCall("qc.add", [layout, layout], ADD | change, layout), target).key for change in ({}, {"shift": 12, "low": 0, "a_zero_point": 4})]
    assert keys[0] == keys[1]
    other = dataclasses.replace(layout, shape=(1, 4, 5, 23))
    assert build(OpCall("qc.add", [other, other], ADD, other), target).key != keys[0]
    first, second = (build(OpCall("qc.lut", [layout, data(i, 256)], {}, layout), target) for i in (0, 1))
    assert first.key == second.key and (first.constants[0] != second.constants[0]).any()


def test_runs_without_wide_vectors() -> None:
    """The rows make no use of an instruction set: plain x86-64 (SSE2) gives the same bits."""
    check(
        BASELINE,
        "qc.quantize",
        [np.linspace(-3, 3, 3 * 20 * 17, dtype=np.float32).reshape(1, 3, 20, 17)],
        {"scale": 0.015, "zero_point": 3, "axes": NHWC},
        out={"pitch": 4},
    )
    check(BASELINE, "qc.add", [data(1, 1, 5, 6, 17), data(2, 1, 5, 6, 17)], ADD)
    check(
        BASELINE,
        "qc.mean",
        [data(1, 1, 7, 7, 100)],
        {"axes": [1, 2], "keepdims": True, "x_zero_point": 3, "ratio": 1.1, "zero_point": 0, "low": -128, "high": 127},
    )
    operands = conv_case((1, 6, 7, 5), 9, (3, 3), 1)
    check(
        BASELINE,
        "qc.conv2d",
        operands,
        {"strides": [1, 1], "padding": [1, 1, 1, 1], "dilation": [1, 1], "groups": 1} | QUANT,
        constants=(1, 2, 3),
    )


def test_weights_must_be_constant() -> None:
    x, w = Layout((1, 4, 4, 8), "uint8"), Layout((8, 3, 3, 8), "uint8")
    op = OpCall("qc.conv2d", [x, w, np.zeros(8, np.int32), np.zeros(8, np.float32)], {}, x)
    row = next(r for r in KERNELS["qc.conv2d"] if r.isa == "any")
    reason = row.refuse(op, TARGETS[0])
    assert reason is not None and "must be constants" in reason


def test_every_operator_has_a_portable_row() -> None:
    movement = ["concat", "reshape", "transpose", "slice", "pad", "copy", "fill_halo"]
    compute = [
        "conv2d",
        "conv2d_transpose",
        "dense",
        "matmul",
        "add",
        "mul",
        "lut",
        "prelu",
        "max_pool2d",
        "avg_pool2d",
        "mean",
        "resize2d",
        "f32.conv2d",
        "f32.conv2d_transpose",
        "f32.dense",
        "f32.dense_weight_only",
    ]
    for name in ["quantize", "dequantize", *movement, *compute]:
        assert any(row.isa == "any" for row in KERNELS[f"qc.{name}"]), name


ORDERED_TYPES = ["float32", "int64"]


@pytest.mark.parametrize("dtype", ORDERED_TYPES)
@pytest.mark.parametrize(("shape", "axis"), [((37,), 0), ((5, 9, 3), 1), ((4, 6), 1), ((300, 7, 16), 0), ((1, 1, 1), 2)])
def test_running_sums_and_products(target: Target, dtype: str, shape: tuple[int, ...], axis: int) -> None:
    x = np.random.default_rng(1).integers(1, 4, shape).astype(dtype)
    for reduction, exclusive, reverse in [("add", False, False), ("add", True, True), ("mul", False, True), ("mul", True, False)]:
        check(target, "qc.cumulative", [x], {"axis": axis, "reduction": reduction, "exclusive": exclusive, "reverse": reverse})


@pytest.mark.parametrize("dtype", ORDERED_TYPES)
@pytest.mark.parametrize(("shape", "axis", "k"), [((50,), 0, 50), ((3, 40, 5), 1, 7), ((6, 33), 1, 1), ((2000, 9), 1, 4)])
@pytest.mark.parametrize("largest", [True, False])
def test_top_k(target: Target, dtype: str, shape: tuple[int, ...], axis: int, k: int, largest: bool) -> None:
    """Few distinct values, so that equal ones are told apart by their place; NaN is the largest."""
    x = np.random.default_rng(2).integers(0, 9, shape).astype(dtype)
    if dtype == "float32":
        x.reshape(-1)[::11] = np.nan
    check(target, "qc.top_k", [x], {"axis": axis, "k": k, "largest": largest})


@pytest.mark.parametrize("dtype", ORDERED_TYPES)
@pytest.mark.parametrize("reduction", ["none", "add", "mul", "max", "min"])
def test_scatter(target: Target, dtype: str, reduction: str) -> None:
    """Repeated rows are updated in order; rows that don't exist are left out."""
    rng = np.random.default_rng(3)
    for rows, width, count in [(9, 1, 30), (5, 33, 7), (1, 4, 1)]:
        data, updates = (rng.integers(0, 50, (n, width)).astype(dtype) for n in (rows, count))
        check(target, "qc.scatter", [data, rng.integers(-2, rows + 2, count), updates], {"reduction": reduction})
