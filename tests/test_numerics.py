"""numerics.py against the exact definition in exact.py, and against ONNX's reference implementation where ONNX defines the operator."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from exact import clip, conv_accumulators, each, fixed, float32, reference, requantize, scaled, windows, with_residual, wrap
from hypothesis import example, given
from hypothesis import strategies as st

from qcompiler.numerics import operators as numerics
from qcompiler.numerics.spec import QParams, lut, resize_indices

INT32 = st.integers(-(2**31), 2**31 - 1)
BYTE = st.integers(-128, 127)
MULTIPLIER = st.floats(2.0**-40, 16, width=32)
TIES = [(1, 0.5), (3, 0.5), (5, 0.5), (-1, 0.5), (-3, 0.5), (7, 0.25), (2**24 + 1, 2.0**-20), (2**25 + 6, 2.0**-22), (-(2**31), 2.0**-25)]
Draw = Callable[[Any], Any]


def bytes_of(seed: int, *shape: int) -> np.ndarray:
    """Random int8, one number in four an extreme."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < 0.25, rng.choice([-128, 127], shape), rng.integers(-128, 128, shape)).astype(np.int8)


def bounds(draw: Draw) -> dict[str, int]:
    low, high = sorted(draw(st.tuples(BYTE, BYTE)))
    return {"zero_point": draw(BYTE), "low": low, "high": high}


def residual_attributes(draw: Draw) -> dict[str, int]:
    """A shortcut of up to twice the output's unit."""
    shift = draw(st.integers(0, 16))
    return {"residual_zero_point": draw(BYTE), "residual_multiplier": draw(st.integers(0, 2 ** (shift + 1))), "residual_shift": shift}


def multipliers(seed: int, count: int, bits: int) -> np.ndarray:
    """float32 factors that bring sums of about 2^bits to the size of an int8."""
    return np.random.default_rng(seed).uniform(2.0 ** (4 - bits), 2.0 ** (8 - bits), count).astype(np.float32)


# -- requantize, quantize, dequantize ---------------------------------------------------------------------------------------------------


@given(st.integers(-(2**200), 2**200), st.integers(1, 2**180))
@fixed(200)
def test_the_exact_rounding_is_that_of_the_machine(numerator: int, denominator: int) -> None:
    value = Fraction(numerator, denominator)
    if abs(value) < 2**127 and Fraction(float(value)) == value:  # one rounding only: numpy rounds a double
        assert float32(value) == Fraction(float(np.float32(float(value))))


@given(INT32, MULTIPLIER, BYTE, BYTE, BYTE)
@fixed(400)
def test_requantize(acc: int, multiplier: float, zero_point: int, low: int, high: int) -> None:
    low, high = min(low, high), max(low, high)
    assert numerics.requantize(np.array(acc), multiplier, zero_point, low, high) == requantize(acc, multiplier, zero_point, low, high)


@pytest.mark.parametrize("acc, multiplier", [*TIES, (2**31 - 1, 3.4e38), (-(2**31), 3.4e38), (2**31 - 1, 1e-45), (0, 3.4e38)])
@pytest.mark.parametrize("zero_point", [-128, -1, 0, 127])
def test_requantize_at_ties_and_extremes(acc: int, multiplier: float, zero_point: int) -> None:
    factor = float(np.float32(multiplier))
    with np.errstate(over="ignore"):
        got = numerics.requantize(np.array([acc]), np.float32(factor), zero_point)
    assert got.tolist() == [requantize(acc, factor, zero_point)]


def test_requantize_rounds_ties_to_even_before_the_zero_point() -> None:
    halves = np.arange(-7, 8, 2)
    assert numerics.requantize(halves, 0.5, 0).tolist() == [-4, -2, -2, 0, 0, 2, 2, 4]
    assert numerics.requantize(halves, 0.5, 1).tolist() == [-3, -1, -1, 1, 1, 3, 3, 5]


def test_requantize_converts_the_accumulator_with_one_rounding() -> None:
    """2^24 + 1 has no float32: it becomes 2^24, so that 2^24 + 1 times 2^-25 is a tie, which goes to 0."""
    assert numerics.requantize(np.array([2**24 + 1, 2**24 + 2]), 2.0**-25, 0).tolist() == [0, 1]


def test_an_accumulator_is_a_number_modulo_2_to_the_32() -> None:
    assert numerics.requantize(np.array([2**32 + 5, 2**31]), 1.0, 0).tolist() == [5, -128]
    w, x = np.full((1, 4), 127, np.int8), np.array([[127] * 4], np.int8)
    bias = np.array([2**31 - 10], np.int32)
    got = numerics.dense(x, w, bias, np.ones(1, np.float32), x_zero_point=0, out_dtype="float32")
    assert got[0, 0] == np.float32(wrap(2**31 - 10 + 4 * 127 * 127)) < 0


@given(st.floats(width=32, allow_nan=False), st.floats(2.0**-120, 2.0**100, width=32), st.data())
@example(0.5, 1.0, None).via("ties")
@fixed(200)
def test_quantize(x: float, scale: float, data: Any) -> None:
    attrs = bounds(data.draw) if data is not None else {"zero_point": 0, "low": -128, "high": 127}
    with np.errstate(over="ignore"):
        got = numerics.quantize(np.array([x], np.float32), scale=scale, **attrs)
    low, high = attrs["low"] - attrs["zero_point"], attrs["high"] - attrs["zero_point"]
    finite = Fraction(clip(x, -3.4e38, 3.4e38))  # an infinity saturates like a large number
    wanted = round(clip(float32(finite * float32(1 / Fraction(scale))), low, high))
    assert got.tolist() == [wanted + attrs["zero_point"]]


def test_quantize_nan_infinity_and_axes() -> None:
    x = np.array([[np.nan, np.inf, -np.inf], [-0.0, 0.25, -0.75]], np.float32)
    assert numerics.quantize(x, scale=0.5, zero_point=-3, low=-100, high=90).tolist() == [[90, 90, -100], [-3, -3, -5]]
    assert numerics.quantize(x, scale=0.5, zero_point=-3, axes=[1, 0]).tolist() == [[127, -3], [127, -3], [-128, -5]]


@given(BYTE, BYTE, st.floats(2.0**-100, 2.0**100, width=32))
@fixed()
def test_dequantize(q: int, zero_point: int, scale: float) -> None:
    got = numerics.dequantize(np.array([[q]], np.int8), scale=scale, zero_point=zero_point, axes=[1, 0])
    assert got.dtype == np.float32 and Fraction(float(got[0, 0])) == float32((q - zero_point) * Fraction(scale))


@pytest.mark.parametrize("zero_point", [-128, -5, 127])
def test_quantize_undoes_dequantize(zero_point: int) -> None:
    every = np.arange(-128, 128).astype(np.int8)
    for scale in (1.0, 0.1, 2.0**-125, 2.0**119, 3e-5):
        real = numerics.dequantize(every, scale=scale, zero_point=zero_point)
        assert (numerics.quantize(real, scale=scale, zero_point=zero_point) == every).all()


# -- products ---------------------------------------------------------------------------------------------------------------------------


@st.composite
def geometries(draw: Draw) -> dict[str, Any]:
    pair = st.tuples(st.integers(1, 2), st.integers(1, 3))
    groups, inputs, outputs = draw(st.sampled_from([(1, 3, 2), (2, 2, 3), (4, 1, 1), (3, 1, 2)]))
    kernel, dilation = draw(st.tuples(st.integers(1, 3), st.integers(1, 2))), draw(pair)
    padding = draw(st.tuples(*[st.integers(0, 2)] * 4))
    need = [(k - 1) * d + 1 - padding[a] - padding[a + 2] for a, (k, d) in enumerate(zip(kernel, dilation, strict=True))]
    size = [max(n, 1) + draw(st.integers(0, 3)) for n in need]
    geometry = {"strides": draw(pair), "padding": padding, "dilation": dilation, "groups": groups}
    return {"x": (1, *size, groups * inputs), "w": (groups * outputs, *kernel, inputs), "geometry": geometry}


@given(geometries(), st.integers(0, 9999), st.sampled_from(["plain", "residual", "float", "clamped"]), st.sampled_from(["", "acc", "sum"]), st.data())
@fixed(80)
def test_conv2d(shapes: dict[str, Any], seed: int, form: str, bends: str, data: Any) -> None:
    """bends: what has another multiplier where it is negative, the accumulator or the sum with the residual."""
    x, w, geometry = bytes_of(seed, *shapes["x"]), bytes_of(seed + 1, *shapes["w"]), shapes["geometry"]
    bias = np.random.default_rng(seed).integers(-(2**16), 2**16, len(w)).astype(np.int32)
    zero_point = data.draw(BYTE)
    acc = conv_accumulators(x, w, bias, zero_point, geometry)
    attrs: dict[str, Any] = {**geometry, "x_zero_point": zero_point}
    slopes = np.random.default_rng(seed + 3).uniform(-2, 2, len(w))

    def chosen(m: np.ndarray) -> tuple[np.ndarray, list[tuple[int, float]]]:
        """The operand, and every accumulator with its multiplier."""
        rows = np.stack([m, m * slopes]).astype(np.float32) if bends == "acc" else m[None]
        return rows if bends == "acc" else m, [(a, float(f[-1] if a < 0 else f[0])) for row in acc for a, f in zip(row, rows.T, strict=True)]

    if form in ("float", "clamped"):
        m, pairs = chosen(multipliers(seed, len(w), 7))
        limits = {"float_low": -1.5, "float_high": 6.0} if form == "clamped" else {}
        got = numerics.conv2d(x, w, bias, m, **attrs, out_dtype="float32", **limits)
        wanted = [clip(scaled(a, f), -1.5, 6) if limits else scaled(a, f) for a, f in pairs]
        assert got.dtype == np.float32 and [Fraction(v) for v in got.reshape(-1).tolist()] == wanted
        return
    attrs |= bounds(data.draw)
    ends = attrs["zero_point"], attrs["low"], attrs["high"]
    if form == "plain":
        m, pairs = chosen(multipliers(seed, len(w), 18))
        got = numerics.conv2d(x, w, bias, m, **attrs)
        want = [requantize(a, f, *ends) for a, f in pairs]
    else:
        extra = residual_attributes(data.draw)
        m, pairs = chosen(multipliers(seed, len(w), 18) * np.float32(2.0 ** extra["residual_shift"]))
        residual = bytes_of(seed + 2, *numerics.conv2d(x, w, bias, m, **attrs).shape)
        behind = (slopes * 2.0 ** -extra["residual_shift"]).astype(np.float32)
        m, bending = (np.stack([m, behind]), {"bends_sum": True}) if bends == "sum" else (m, {})
        got = numerics.conv2d(x, w, bias, m, residual, **attrs, **extra, **bending)
        negative = [float(v) for v in behind] * (len(pairs) // len(w)) if bends == "sum" else [None] * len(pairs)
        want = [with_residual(a, f, r, *ends, extra, n) for (a, f), r, n in zip(pairs, residual.reshape(-1).tolist(), negative, strict=True)]
    assert got.dtype == np.int8 and got.reshape(-1).tolist() == want


@pytest.mark.parametrize(
    "extra, words",
    [({}, "needs its residual_multiplier"), ({"residual_multiplier": 1, "out_dtype": "float32"}, "float32 output"), ({"bends_sum": True}, "it needs both")],
)
def test_a_residual_is_never_ignored(extra: dict[str, Any], words: str) -> None:
    x, m = np.ones((1, 1), np.int8), np.ones(1, np.float32)
    with pytest.raises(ValueError, match=words):
        numerics.dense(x, x, np.zeros(1, np.int32), m, x, x_zero_point=0, **extra)


@pytest.mark.parametrize("residual", [-128, 127])
@pytest.mark.parametrize("bias", [-(2**31) + 1, 2**31 - 1])
def test_the_residual_sum_stays_in_int32(residual: int, bias: int) -> None:
    """The convolution's share at its limit and the greatest residual together: 2^30 + 255 * floor((2^30 - 1) / 255) < 2^31."""
    extra = {"residual_zero_point": -1 - residual, "residual_multiplier": (2**30 - 1) // 255, "residual_shift": 0}
    x, w, r = np.zeros((1, 1), np.int8), np.ones((1, 1), np.int8), np.array([[residual]], np.int8)
    got = numerics.dense(x, w, np.array([bias], np.int32), np.full(1, 2.0, np.float32), r, x_zero_point=0, **extra)
    assert got.tolist() == [[with_residual(bias, 2.0, residual, 0, -128, 127, extra)]]


@pytest.mark.parametrize("share, wanted", [(0.5, 0), (0.75, 1), (1.5, 2), (2.5, 2), (-1.5, 0), (-1.75, 0), (-2.75, -1)])
def test_the_residual_form_rounds_twice(share: float, wanted: int) -> None:
    """The share to an integer, then it plus 1, halved: 0.75 becomes 1, and (1 + 1) / 2 is 1; 0.5 becomes 0, and 1 / 2 becomes 0."""
    extra = {"residual_zero_point": 0, "residual_multiplier": 1, "residual_shift": 1}
    one = np.ones((1, 1), np.int8)
    got = numerics.dense(one, one, np.zeros(1, np.int32), np.full(1, share, np.float32), one, x_zero_point=0, **extra)
    assert got.tolist() == [[wanted]] == [[with_residual(1, share, 1, 0, -128, 127, extra)]]


@given(geometries(), st.integers(0, 9999), st.data())
@fixed(40)
def test_conv2d_transpose_is_onnx_conv_transpose(shapes: dict[str, Any], seed: int, data: Any) -> None:
    """On integers in float32, group by group (the reference does not split groups); every accumulator is below 2^24, so float is exact."""
    geometry = shapes["geometry"]
    strides, dilation, groups = geometry["strides"], geometry["dilation"], geometry["groups"]
    extra = [data.draw(st.integers(0, s - 1)) for s in strides]
    x, w = bytes_of(seed, *shapes["x"]), bytes_of(seed + 1, *shapes["w"])
    spans = [(x.shape[1 + a] - 1) * strides[a] + (w.shape[1 + a] - 1) * dilation[a] + 1 + extra[a] for a in (0, 1)]
    top, left = (data.draw(st.integers(0, min(2, s - 1))) for s in spans)
    bottom, right = (data.draw(st.integers(0, min(2, s - 1 - p))) for s, p in zip(spans, (top, left), strict=True))
    zero_point, padding = data.draw(BYTE), [top, left, bottom, right]
    bias = np.random.default_rng(seed).integers(-999, 999, len(w)).astype(np.int32)
    geometry = {"strides": strides, "padding": padding, "output_padding": extra, "dilation": dilation, "groups": groups}
    one = np.ones(len(w), np.float32)
    got = numerics.conv2d_transpose(x, w, bias, one, **geometry, x_zero_point=zero_point, out_dtype="float32")
    parts = []
    real = (x.astype(np.float32) - zero_point).transpose(0, 3, 1, 2)
    for image, kernel in zip(np.split(real, groups, 1), np.split(w.astype(np.float32), groups), strict=True):
        kernel = kernel.transpose(3, 0, 1, 2)  # [I/g, O/g, KH, KW]
        options = {"strides": strides, "pads": padding, "dilations": dilation, "output_padding": extra}
        parts.append(reference("ConvTranspose", [image, kernel], **options))
    wanted = np.concatenate(parts, 1).transpose(0, 2, 3, 1) + bias
    np.testing.assert_array_equal(got, wanted)
    attrs, m = bounds(data.draw), multipliers(seed, len(w), 18)
    small = numerics.conv2d_transpose(x, w, bias, m, **geometry, x_zero_point=zero_point, **attrs)
    ends = attrs["zero_point"], attrs["low"], attrs["high"]
    assert small.reshape(-1).tolist() == [requantize(int(a), f, *ends) for a, f in each(wanted, m)]


@given(st.integers(0, 9999), st.data())
@fixed(30)
def test_dense_is_a_convolution_over_one_pixel(seed: int, data: Any) -> None:
    x, w = bytes_of(seed, 2, 3, 7), bytes_of(seed + 1, 5, 7)
    bias = np.random.default_rng(seed).integers(-(2**16), 2**16, 5).astype(np.int32)
    residual, m = bytes_of(seed + 2, 2, 3, 5), multipliers(seed, 5, 12)
    attrs = {"x_zero_point": data.draw(BYTE), **bounds(data.draw), **residual_attributes(data.draw)}
    got = numerics.dense(x, w, bias, m, residual, **attrs)
    geometry = {"strides": (1, 1), "padding": (0, 0, 0, 0)}
    wanted = numerics.conv2d(x.reshape(6, 1, 1, 7), w.reshape(5, 1, 1, 7), bias, m, residual.reshape(6, 1, 1, 5), **geometry, **attrs)
    assert got.shape == (2, 3, 5) and (got.reshape(-1) == wanted.reshape(-1)).all()


@given(st.integers(0, 9999), st.data())
@fixed(30)
def test_matmul(seed: int, data: Any) -> None:
    a, b = bytes_of(seed, 2, 1, 3, 5), bytes_of(seed + 1, 4, 5, 2)
    za, zb, m, attrs = data.draw(BYTE), data.draw(BYTE), float(multipliers(seed, 1, 16)[0]), bounds(data.draw)
    got = numerics.matmul(a, b, a_zero_point=za, b_zero_point=zb, multiplier=m, **attrs)
    assert got.shape == (2, 4, 3, 2)
    for n, g, i, j in np.ndindex(got.shape):
        acc = sum((p - za) * (q - zb) for p, q in zip(a[n, 0, i].tolist(), b[g, :, j].tolist(), strict=True))
        assert got[n, g, i, j] == requantize(acc, m, attrs["zero_point"], attrs["low"], attrs["high"])


# -- elementwise ------------------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 9999), st.data())
@fixed()
def test_add_and_mul(seed: int, data: Any) -> None:
    a, b = bytes_of(seed, 3, 1, 4), bytes_of(seed + 1, 2, 1)
    za, zb, attrs, shift = data.draw(BYTE), data.draw(BYTE), bounds(data.draw), data.draw(st.integers(0, 30))
    limit = (2**31 - 1) // 255
    first = data.draw(st.integers(0, min(limit, 2 ** (shift + 3))))
    second = data.draw(st.integers(0, min(limit - first, 2 ** (shift + 3)))) * data.draw(st.sampled_from([1, -1]))
    ends = attrs["zero_point"], attrs["low"], attrs["high"]
    total = numerics.add(a, b, a_zero_point=za, a_multiplier=first, b_zero_point=zb, b_multiplier=second, shift=shift, **attrs)
    assert total.shape == (3, 2, 4)
    assert total.reshape(-1).tolist() == [requantize((p - za) * first + (q - zb) * second, 2.0**-shift, *ends) for p, q in each(a, b)]
    m = float(multipliers(seed, 1, 14)[0])
    product = numerics.mul(a, b, a_zero_point=za, b_zero_point=zb, multiplier=m, **attrs)
    assert product.reshape(-1).tolist() == [requantize((p - za) * (q - zb), m, *ends) for p, q in each(a, b)]


def test_lut_reads_entry_q_plus_128() -> None:
    table = np.random.default_rng(0).permutation(256).astype(np.int8)
    x = np.arange(-128, 128).astype(np.int8).reshape(2, 128)
    assert numerics.lut(x, table).reshape(-1).tolist() == table.tolist()


# -- pools and means --------------------------------------------------------------------------------------------------------------------


@given(geometries(), st.booleans(), st.integers(0, 9999), st.data())
@fixed(40)
def test_pools(shapes: dict[str, Any], include: bool, seed: int, data: Any) -> None:
    x, kernel = bytes_of(seed, *shapes["x"]), shapes["w"][1:3]
    geometry = {"kernel": kernel, **{k: shapes["geometry"][k] for k in ("strides", "padding", "dilation")}}
    places = list(windows(x.shape[1:3], *geometry.values()))
    most = numerics.max_pool2d(x, **geometry)
    zero_point, ratio, attrs = data.draw(BYTE), data.draw(st.floats(0.01, 4)), bounds(data.draw)
    average = numerics.avg_pool2d(x, **geometry, count_include_pad=include, x_zero_point=zero_point, ratio=ratio, **attrs)
    assert most.shape == average.shape == (1, places[-1][0] + 1, places[-1][1] + 1, x.shape[3])
    for y, column, inside in places:
        for c in range(x.shape[3]):
            values = [int(x[0, i, j, c]) for _, _, i, j in inside]
            assert most[0, y, column, c] == max(values, default=-128)
            count = kernel[0] * kernel[1] if include else max(len(values), 1)
            total = sum(v - zero_point for v in values)
            wanted = requantize(total, float(np.float32(ratio / count)), attrs["zero_point"], attrs["low"], attrs["high"])
            assert average[0, y, column, c] == wanted


@given(st.sampled_from([(0,), (1, 2), (-1,), (0, 1, 2, 3)]), st.booleans(), st.integers(0, 9999), st.data())
@fixed(40)
def test_mean(axes: tuple[int, ...], keepdims: bool, seed: int, data: Any) -> None:
    x = bytes_of(seed, 2, 3, 2, 5)
    zero_point, ratio, attrs = data.draw(BYTE), data.draw(st.floats(0.01, 4)), bounds(data.draw)
    got = numerics.mean(x, axes=axes, keepdims=keepdims, x_zero_point=zero_point, ratio=ratio, **attrs)
    kept = [a for a in range(4) if a not in {b % 4 for b in axes}]
    assert got.shape == tuple(n if a in kept else 1 for a, n in enumerate(x.shape) if keepdims or a in kept)
    sums: dict[tuple[int, ...], list[int]] = {}
    for place in itertools.product(*map(range, x.shape)):
        sums.setdefault(tuple(place[a] for a in kept), []).append(int(x[place]) - zero_point)
    multiplier = float(np.float32(ratio / len(next(iter(sums.values())))))
    wanted = [requantize(sum(v), multiplier, attrs["zero_point"], attrs["low"], attrs["high"]) for v in sums.values()]
    assert got.reshape(-1).tolist() == wanted


@pytest.mark.parametrize("total, ratio, wanted", [(15, 2.1, 4), (13, 2.423076923076923, 4), (17, 0.2647058823529412, 0), (23, 1.3695652173913044, 3)])
def test_an_average_divides_its_ratio_in_float64(total: int, ratio: float, wanted: int) -> None:
    """Ties: a ratio that was rounded to float32 before the division by 9 lands on the other side."""
    x = np.array([total] + [0] * 8, np.int8).reshape(1, 3, 3, 1)
    common = {"x_zero_point": 0, "ratio": ratio, "zero_point": 0}
    geometry = {"kernel": (3, 3), "strides": (1, 1), "padding": (0, 0, 0, 0)}
    for include in (False, True):
        assert numerics.avg_pool2d(x, **geometry, count_include_pad=include, **common).tolist() == [[[[wanted]]]]
    assert numerics.mean(x, axes=(1, 2), keepdims=False, **common).tolist() == [[wanted]]


# -- resize and data movement -----------------------------------------------------------------------------------------------------------


def resize(x: np.ndarray, size: tuple[int, int], method: str, transformation: str, rounding: str = "") -> np.ndarray:
    attrs: dict[str, Any] = {"size": size, "method": method}
    for axis, old, new in zip("yx", x.shape[1:3], size, strict=True):
        first, second, weight = resize_indices(old, new, method, transformation, rounding)
        attrs |= {f"i{axis}0": first, f"i{axis}1": second, f"w{axis}": weight}
    return numerics.resize2d(x, **attrs)


@given(st.tuples(*[st.integers(1, 5)] * 2), st.tuples(*[st.integers(1, 9)] * 2), st.integers(0, 9999))
@pytest.mark.parametrize("transformation", ["half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners"])
@fixed(25)
def test_linear_resize_is_within_a_quantum_of_onnx(transformation: str, old: tuple[int, int], new: tuple[int, int], seed: int) -> None:
    """A weight is off by at most 2^-11 and corners differ by at most 255: 255 * 2^-11 per axis, then half a quantum of rounding."""
    x = bytes_of(seed, 1, *old, 2)
    sizes = np.array([1, 2, *new])
    image = x.astype(np.float32).transpose(0, 3, 1, 2)
    wanted = reference("Resize", [image, None, None, sizes], mode="linear", coordinate_transformation_mode=transformation)
    assert np.abs(resize(x, new, "linear", transformation) - wanted.transpose(0, 2, 3, 1)).max() <= 0.5 + 2 * 255 * 2**-11 + 1e-4


def test_linear_resize_by_the_formula() -> None:
    x = bytes_of(5, 1, 2, 2, 3)
    attrs: dict[str, Any] = {"iy0": [0, 1], "iy1": [1, 1], "wy": [333, 0], "ix0": [0, 0, 1], "ix1": [1, 1, 1], "wx": [1, 1024, 7]}
    got = numerics.resize2d(x, size=(2, 3), method="linear", **attrs)
    for i, j, c in np.ndindex(2, 3, 3):
        v, h = attrs["wy"][i], attrs["wx"][j]
        corners = [int(x[0, r, s, c]) for r in (attrs["iy0"][i], attrs["iy1"][i]) for s in (attrs["ix0"][j], attrs["ix1"][j])]
        weights = [(1024 - v) * (1024 - h), (1024 - v) * h, v * (1024 - h), v * h]
        assert got[0, i, j, c] == requantize(sum(a * b for a, b in zip(corners, weights, strict=True)), 2.0**-20, 0)


@pytest.mark.parametrize("rounding", ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"])
@pytest.mark.parametrize("transformation", ["half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners"])
def test_nearest_resize_is_onnx_resize(transformation: str, rounding: str) -> None:
    for old, new in [*itertools.product((1, 2, 5), (1, 3, 4, 5, 11)), (8, 2)]:  # 8 to 2: from 1.5 and 5.5
        x = np.arange(old * old).astype(np.int8).reshape(1, old, old, 1)
        got = resize(x, (new, new), "nearest", transformation, rounding)
        image, sizes = x.astype(np.float32).transpose(0, 3, 1, 2), np.array([1, 1, new, new])
        modes = {"coordinate_transformation_mode": transformation, "nearest_mode": rounding}
        assert got[0, :, :, 0].tolist() == reference("Resize", [image, None, None, sizes], mode="nearest", **modes)[0, 0].tolist(), (old, new)


def test_data_movement_moves_bytes() -> None:
    x, y = bytes_of(1, 2, 3, 4), bytes_of(2, 2, 1, 4)
    assert (numerics.concat(x, y, axis=1) == np.stack([*x.swapaxes(0, 1), y[:, 0]], 1)).all()
    assert numerics.reshape(x, shape=[4, 6]).reshape(-1).tolist() == x.reshape(-1).tolist()
    moved = numerics.transpose(x, axes=[2, 0, 1])
    assert moved.flags.c_contiguous and all(moved[k, i, j] == x[i, j, k] for i, j, k in np.ndindex(2, 3, 4))
    part = numerics.slice_(x, begin=[0, 0, 1], end=[2, 3, 4], strides=[1, 2, 2])
    assert part.tolist() == [[[int(x[i, j, k]) for k in (1, 3)] for j in (0, 2)] for i in (0, 1)]
    padded = numerics.pad(x, pads=[[0, 0], [1, 2], [0, 1]], value=-7)
    assert padded.dtype == np.int8 and padded.shape == (2, 6, 5)
    assert (padded[:, 1:4, :4] == x).all() and set(padded[:, [0, 4, 5]].reshape(-1).tolist()) == {-7} == set(padded[..., 4].reshape(-1).tolist())


# -- float groups, calling conventions --------------------------------------------------------------------------------------------------


@given(geometries(), st.integers(0, 9999))
@fixed(30)
def test_float_convolution(shapes: dict[str, Any], seed: int) -> None:
    """On small integers, where float64 is exact, it is the integer convolution, clamped."""
    x, w = bytes_of(seed, *shapes["x"]), bytes_of(seed + 1, *shapes["w"])
    bias = np.arange(len(w), dtype=np.int32)
    acc = np.array(conv_accumulators(x, w, bias, 0, shapes["geometry"]))
    tensors = [a.astype(np.float32) for a in (x, w, bias)]
    got = numerics.f32_conv2d(*tensors, **shapes["geometry"], low=-1e4, high=2e4)
    assert got.reshape(-1).tolist() == np.clip(acc, -1e4, 2e4).reshape(-1).tolist()
    flat = numerics.f32_dense(tensors[0], np.ones((2, x.shape[3]), np.float32), np.zeros(2, np.float32), np.ones((), np.float32), low=-1e9, high=1e9)
    assert flat.dtype == np.float32 and (flat == x.astype(int).sum(-1, keepdims=True) + 1).all()


@pytest.mark.parametrize("name", sorted(numerics.OPERATORS))
def test_an_unknown_attribute_is_a_type_error(name: str) -> None:
    function = numerics.OPERATORS[name]
    parameters = inspect.signature(function).parameters.values()
    tensors = [np.zeros(1, np.int8) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    attributes = {p.name: 0 for p in parameters if p.kind is p.KEYWORD_ONLY}
    with pytest.raises(TypeError, match="unexpected keyword argument 'zero_pont'"):
        function(*tensors, **attributes, zero_pont=0)
    for missing in (p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty):
        with pytest.raises(TypeError, match=f"'{missing}'"):
            function(*tensors, **{k: v for k, v in attributes.items() if k != missing})


def test_a_table_into_16_bits_reaches_its_ends() -> None:
    made = lut(np.tanh, QParams(0.03, 0), QParams(2.0**-14, 0, "int16"))
    assert made.dtype == np.int16
    np.testing.assert_array_equal(made, np.rint(np.tanh(np.arange(-128, 128) * 0.03) * 2**14))
