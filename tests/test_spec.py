"""Parameters and constants: bounds that must hold at the extremes, in exact arithmetic."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from exact import fixed, float32, reference
from hypothesis import given
from hypothesis import strategies as st

from qcompiler.numerics import operators as numerics
from qcompiler.numerics.spec import (
    INT32_MAX,
    MAX_SCALE,
    MIN_SCALE,
    QParams,
    add_parameters,
    conv_accumulator_bound,
    conv_multiplier,
    lut,
    residual_parameters,
    resize_indices,
)

REAL = st.floats(-1e30, 1e30)
SCALE = st.floats(2.0**-20, 2.0**10, width=32)
EVERY = np.arange(-128, 128).astype(np.int8)

# -- QParams ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf, -math.inf, 1e-39, 2.0**-126, 1e38, 1e300])
def test_a_scale_keeps_clear_of_subnormal_numbers(scale: float) -> None:
    with pytest.raises(ValueError, match=r"scale is .*; it must lie in \[2\^-125, 2\^126\]"):
        QParams(scale, 0)


@pytest.mark.parametrize("zero_point, words", [(-129, "must lie in"), (128, "must lie in"), (0.5, "must be an integer")])
def test_a_zero_point_must_be_an_int8(zero_point: Any, words: str) -> None:
    with pytest.raises(ValueError, match=f"zero point is {zero_point}; it {words}"):
        QParams(1.0, zero_point)


@pytest.mark.parametrize("low, high", [(math.nan, 1), (0, math.inf), (-math.inf, 0), (1, math.nan), (2, 1)])
def test_a_range_must_be_finite_and_ordered(low: float, high: float) -> None:
    with pytest.raises(ValueError, match="must be finite and ordered"):
        QParams.from_range(low, high)


def test_the_scale_is_a_float32_value() -> None:
    params = QParams(0.1, np.int64(3))  # type: ignore[arg-type]
    assert params.scale == float(np.float32(0.1)) != 0.1 and type(params.zero_point) is int
    assert params == QParams(params.scale, 3) and hash(params) == hash(QParams(0.1, 3))
    assert QParams(MIN_SCALE, -128).scale == MIN_SCALE and QParams(MAX_SCALE, 127).scale == MAX_SCALE


@given(REAL, REAL, st.booleans())
@fixed(200)
def test_a_range_is_covered_and_contains_zero_exactly(first: float, second: float, symmetric: bool) -> None:
    """Rounding the zero point (or, if symmetric, leaving out half a step) moves each end by at most half a step, rounding the scale by 2^-24 of it."""
    low, high = min(first, second), max(first, second)
    params = QParams.from_range(low, high, symmetric)
    least, most = params.range
    slack = Fraction(params.scale) * (Fraction(1, 2) + Fraction(1, 2**14))
    assert Fraction(least) - slack <= min(low, 0) and Fraction(most) + slack >= max(high, 0)
    assert params.dequantize(np.array(params.zero_point)) == 0 and least <= 0 <= most
    assert params.quantize(np.zeros(1)).tolist() == [params.zero_point]
    assert params.zero_point == 0 or not symmetric
    if not symmetric and low < high:  # no step is wasted: the range itself takes 255 of them, up to rounding
        assert params.scale <= max((max(high, 0) - min(low, 0)) / 255 * (1 + 2**-23), MIN_SCALE)


@pytest.mark.parametrize("low, high, scale, zero_point", [(0, 0, 1, 0), (0, 255, 1, -128), (-255, 0, 1, 127), (3, 51, 0.2, -128), (-1, 1.55, 0.01, -28)])
def test_from_range_by_example(low: float, high: float, scale: float, zero_point: int) -> None:
    assert QParams.from_range(low, high) == QParams(scale, zero_point)


def test_ranges_at_the_ends_of_float32() -> None:
    assert QParams.from_range(0, 1e-42) == QParams(MIN_SCALE, -128)
    wide = QParams.from_range(-3.4e38, 3.4e38)
    assert wide.zero_point == 0 and wide.range[1] == pytest.approx(3.4e38, rel=0.01)


@given(st.floats(-500, 500), SCALE, st.integers(-128, 127))
@fixed(100)
def test_constants_are_quantized_by_division(real: float, scale: float, zero_point: int) -> None:
    exact = min(max(round(Fraction(real / scale)) + zero_point, -128), 127)
    assert QParams(scale, zero_point).quantize(np.array([real])).tolist() == [exact]


def test_quantize_undoes_dequantize() -> None:
    for scale, zero_point in itertools.product((1.0, 0.1, MIN_SCALE, MAX_SCALE), (-128, 0, 127)):
        params = QParams(scale, zero_point)
        assert (params.quantize(params.dequantize(EVERY)) == EVERY).all()
        assert params.range == (params.dequantize(EVERY)[0], params.dequantize(EVERY)[-1])


# -- multipliers ------------------------------------------------------------------------------------------------------------------------


@given(SCALE, SCALE, SCALE, st.integers(0, 16))
@fixed(100)
def test_conv_multiplier(x: float, w: float, y: float, shift: int) -> None:
    """Within one float32 rounding (and a double's before it) of the exact ratio."""
    exact = Fraction(x) * Fraction(w) / Fraction(y) * 2**shift
    (got,) = conv_multiplier(x, np.array([w]), y, shift)
    assert got.dtype == np.float32 and abs(Fraction(float(got)) - exact) <= exact * Fraction(2**-24 + 2**-50)
    (real,) = conv_multiplier(x, np.array([w]), None)
    assert Fraction(float(real)) == float32(Fraction(x) * Fraction(w))  # the product of two float32 numbers is exact in float64


def test_conv_multiplier_saturates() -> None:
    multiplier = conv_multiplier(1e30, np.array([1e30, 1.0]), 1e-30)
    assert np.isfinite(multiplier).all()
    with np.errstate(over="ignore"):
        assert numerics.requantize(np.array([[0, 0], [1, -1]]), multiplier, 5).tolist() == [[5, 5], [127, -128]]


@given(st.floats(2.0**-30, 2.0**21), st.floats(2.0**-20, 1))
@fixed(200)
def test_residual_parameters(ratio: float, y: float) -> None:
    """int32 holds the sum of a convolution's share and any residual; the residual is precise to half a unit of the largest possible shift."""
    r = ratio * y
    multiplier, shift = residual_parameters(r, y)
    exact = Fraction(r / y)
    assert 0 <= shift <= 16 and multiplier >= 0
    assert 2**30 + 255 * multiplier < 2**31
    assert abs(Fraction(multiplier, 2**shift) - exact) <= Fraction(1, 2 ** (shift + 1))
    assert shift == 16 or 255 * round(exact * 2 ** (shift + 1)) >= 2**30, "a larger shift would have fit"
    if shift < 16:
        assert abs(Fraction(multiplier, 2**shift) / exact - 1) < Fraction(1, 2**21)


@pytest.mark.parametrize("y", [2.0**-23, 1e-30])
def test_a_residual_that_is_too_coarse_is_refused(y: float) -> None:
    with pytest.raises(ValueError, match="residual scale 1.0 is too large beside the output scale"):
        residual_parameters(1.0, y)


@given(st.floats(2.0**-30, 2.0**22), st.floats(2.0**-30, 2.0**22), st.floats(2.0**-20, 1), st.sampled_from([1, -1]))
@fixed(200)
def test_add_parameters(a_ratio: float, b_ratio: float, y: float, sign: int) -> None:
    """No operands overflow int32, and a larger shift would let some overflow; each ratio is precise to half a unit of 2^-shift."""
    a, b, shift = add_parameters(a_ratio * y, b_ratio * y, y)
    ratios = Fraction(a_ratio * y / y), Fraction(b_ratio * y / y)
    assert 0 <= shift <= 30 and a >= 0 and b >= 0
    for p, q in itertools.product((-255, 255), repeat=2):  # q - zero_point is at most 255 either way
        assert abs(p * a + q * sign * b) <= INT32_MAX
    assert shift == 30 or 255 * sum(round(r * 2 ** (shift + 1)) for r in ratios) > INT32_MAX
    for factor, exact in zip((a, b), ratios, strict=True):
        assert abs(Fraction(factor, 2**shift) - exact) <= Fraction(1, 2 ** (shift + 1))


def test_sums_at_the_extremes_agree_with_exact_integers() -> None:
    for a_scale, b_scale in [(1.0, 1.0), (1.0, 1e-6), (30.0, 7.0), (2.0**20, 2.0**20)]:
        a, b, shift = add_parameters(a_scale, b_scale, 1.0)
        for p, q, z in itertools.product((-128, 127), (-128, 127), (-128, 127)):
            total = (p - z) * a + (q - z) * b
            wanted = min(max(round(float32(float32(total) / 2**shift)), -128), 127)
            operands = np.array([p], np.int8), np.array([q], np.int8)
            factors = {"a_multiplier": a, "b_multiplier": b, "shift": shift}
            assert numerics.add(*operands, a_zero_point=z, b_zero_point=z, zero_point=0, **factors).tolist() == [wanted]


def test_operands_that_are_too_coarse_are_refused() -> None:
    with pytest.raises(ValueError, match="operand scales 1.0 and 0.5 are too large beside the output scale"):
        add_parameters(1.0, 0.5, 2.0**-23)


# -- accumulators -----------------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 9999), st.integers(-128, 127), st.booleans())
@fixed(60)
def test_the_accumulator_bound_is_attained_and_never_exceeded(seed: int, zero_point: int, biased: bool) -> None:
    """In every form, every order: the greedy order (all that raise the sum first) reaches the extremes, random ones stay between."""
    rng = np.random.default_rng(seed)
    w = rng.integers(-127, 128, (3, 2, 2, 2)).astype(np.int8)
    bias = rng.integers(-(2**15), 2**15, 3).astype(np.int32) if biased else None
    bound = conv_accumulator_bound(w, bias, zero_point)
    seen = 0
    for o in range(3):
        weights, first = w[o].reshape(-1).tolist(), 0 if bias is None else int(bias[o])
        for shift in (zero_point, 0, -128):  # the direct form, int8 storage, uint8 storage
            start = first - (zero_point - shift) * sum(weights)
            for x in ([127 if k > 0 else -128 for k in weights], [-128 if k > 0 else 127 for k in weights], rng.integers(-128, 128, 8).tolist()):
                terms = [start, *(k * (v - shift) for k, v in zip(weights, x, strict=True))]
                assert sum(terms) == first + sum(k * (v - zero_point) for k, v in zip(weights, x, strict=True)), "all forms have one total"
                for order in (sorted(terms), sorted(terms, reverse=True), rng.permutation(terms).tolist()):
                    partial = np.cumsum(order)
                    assert np.abs(partial).max() <= bound
                    seen = max(seen, int(np.abs(partial).max()))
    assert seen == bound


def test_the_bound_counts_the_bias_alone() -> None:
    """Where padding covers the window, or the weights are 0, the accumulator is the bias."""
    assert conv_accumulator_bound(np.zeros((2, 1, 1, 1), np.int8), np.array([-7, 3], np.int32), 0) == 7
    assert conv_accumulator_bound(np.ones((1, 1), np.int8), np.array([-(2**31)], np.int32), 127) == 2**31 + 255


def test_the_bound_counts_partial_sums_beyond_the_total() -> None:
    """The total lies in [-128000, 127000]; as uint8 the products alone reach 255000 before the start takes 128000 back."""
    assert conv_accumulator_bound(np.ones((1, 1000), np.int8), None, 0) == 255_000
    big = np.full((1, 2**17), 127, np.int8)  # 2^17 * 127 * 255 > 2^31, though no input brings the total to more than half of that
    assert 2**17 * 127 * 128 < 2**31 < conv_accumulator_bound(big, None, 0)


# -- tables -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [np.tanh, np.square, lambda v: 1 / (1 + np.exp(-v)), lambda v: np.maximum(v, 0.1 * v)])
def test_lut_is_the_function_of_the_real_value(function: Any) -> None:
    x, y = QParams(0.05, -17), QParams(0.02, 5)
    table = lut(function, x, y)
    assert table.dtype == np.int8 and table.shape == (256,)
    for q in range(-128, 128):
        real = float(function(np.array((q + 17) * x.scale)))
        assert table[q + 128] == min(max(round(real / y.scale) + 5, -128), 127)


def test_lut_of_the_identity_with_equal_parameters_is_the_identity() -> None:
    assert lut(lambda v: v, QParams(0.3, 9), QParams(0.3, 9)).tolist() == EVERY.tolist()


def test_lut_of_what_is_not_a_number() -> None:
    x, y = QParams(1.0, 0), QParams(0.5, 3)
    table = lut(lambda v: np.where(v > 0, np.log(v), np.sqrt(v)), x, y)  # NaN below 0, 0 at 0
    assert (table[:129] == 3).all()
    infinite = lut(lambda v: 1 / v, x, y)
    assert infinite[128] == 127 and infinite[129] == 5 and infinite[127] == 1
    assert lut(lambda v: -np.exp(v * 1e6), x, QParams(MIN_SCALE, 0))[255] == -128


# -- resize -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "old, new, method, transformation, rounding, table",
    [
        (2, 4, "nearest", "asymmetric", "floor", ([0, 0, 1, 1], [0, 0, 1, 1], [0] * 4)),
        (2, 4, "nearest", "half_pixel", "round_prefer_floor", ([0, 0, 1, 1], [0, 0, 1, 1], [0] * 4)),
        (4, 2, "nearest", "half_pixel", "round_prefer_floor", ([0, 2], [0, 2], [0, 0])),  # from 0.5 and 2.5
        (8, 2, "nearest", "half_pixel", "round_prefer_floor", ([1, 5], [1, 5], [0, 0])),  # from 1.5 and 5.5
        (4, 2, "nearest", "half_pixel", "round_prefer_ceil", ([1, 3], [1, 3], [0, 0])),
        (4, 2, "nearest", "half_pixel", "ceil", ([1, 3], [1, 3], [0, 0])),
        (5, 3, "nearest", "align_corners", "floor", ([0, 2, 4], [0, 2, 4], [0] * 3)),
        (2, 4, "linear", "half_pixel", "", ([0, 0, 0, 1], [1, 1, 1, 1], [0, 256, 768, 0])),  # from -0.25, 0.25, 0.75, 1.25
        (2, 4, "linear", "asymmetric", "", ([0, 0, 1, 1], [1, 1, 1, 1], [0, 512, 0, 0])),
        (2, 3, "linear", "align_corners", "", ([0, 0, 1], [1, 1, 1], [0, 512, 0])),
        (5, 1, "linear", "half_pixel", "", ([2], [3], [0])),
        (5, 1, "linear", "pytorch_half_pixel", "", ([0], [1], [0])),
        (5, 1, "linear", "align_corners", "", ([0], [1], [0])),
        (1, 3, "linear", "half_pixel", "", ([0] * 3, [0] * 3, [0] * 3)),
    ],
)
def test_resize_tables(old: int, new: int, method: str, transformation: str, rounding: str, table: tuple[list[int], ...]) -> None:
    assert resize_indices(old, new, method, transformation, rounding) == table


@pytest.mark.parametrize("transformation", ["half_pixel", "asymmetric"])
def test_a_stated_scale_replaces_the_quotient(transformation: str) -> None:
    """10 pixels by 0.55 are 5; positions go by 0.55, not by 5 / 10."""
    scales = np.array([1, 1, 1, 0.55], np.float32)
    row = np.arange(10, dtype=np.float32)[None, None, None]
    modes = {"mode": "nearest", "coordinate_transformation_mode": transformation, "nearest_mode": "floor"}
    wanted = reference("Resize", [row, None, scales], **modes).reshape(-1).tolist()
    assert resize_indices(10, 5, "nearest", transformation, "floor", scale=0.55)[0] == wanted
    assert resize_indices(10, 5, "nearest", transformation, "floor")[0] != wanted


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("nearest", "tf_crop_and_resize"), "coordinate transformation 'tf_crop_and_resize' is not supported; supported: half_pixel"),
        (("nearest", "asymmetric", "up"), "rounding 'up' is not supported; supported: round_prefer_floor"),
        (("cubic", "half_pixel"), "resize method 'cubic' is not supported; supported: nearest, linear"),
    ],
)
def test_modes_that_are_not_supported(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        resize_indices(4, 8, *arguments)
