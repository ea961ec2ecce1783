"""Quantization parameters, and the integer constants that compiled operators use (numpy only).

`real = scale * (q - zero_point)` with int8 `q`. docs/numerics.md is normative; the constants made here and the arithmetic of `qcompiler.numerics.operators`
are all of it. Everything is computed in float64 or integers and is a pure function of its arguments, so every machine makes the same constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

LOW, HIGH = -128, 127  # int8 activations
LIMITS = {"int8": (LOW, HIGH), "int16": (-32768, 32767)}  # what a stored value of each type may be
WEIGHT_HIGH = 127  # weights are symmetric: [-127, 127]
INT32_MAX = 2**31 - 1
MAX_RESIDUAL_SHIFT = {("int8", "int8"): 16, ("int16", "int8"): 20, ("int8", "int16"): 14, ("int16", "int16"): 14}  # by types of residual and output
MIN_SCALE, MAX_SCALE = 2.0**-125, 2.0**126
FLOAT32_MAX = float(np.finfo(np.float32).max)
RESIDUAL_LIMIT = 2**30  # the convolution's share of a residual sum is clipped to this
RESIZE_BITS = 10  # fixed-point bits of one linear weight


@dataclass(frozen=True)
class QParams:
    """Per-tensor quantization: `scale` a float32 value in [2^-125, 2^126]; `zero_point` in [-128, 127] for dtype "int8", 0 for "int16".

    Within these bounds no step of the arithmetic depends on subnormal float32 numbers, which some machines replace by 0 (docs/numerics.md).
    Raises ValueError otherwise.
    """

    scale: float
    zero_point: int
    dtype: str = "int8"

    def __post_init__(self) -> None:
        if not MIN_SCALE <= self.scale <= MAX_SCALE:
            raise ValueError(f"scale is {self.scale}; it must lie in [2^-125, 2^126], about [2.4e-38, 8.5e37]")
        if int(self.zero_point) != self.zero_point:
            raise ValueError(f"zero point is {self.zero_point}; it must be an integer")
        if self.dtype not in LIMITS:
            raise ValueError(f"dtype is '{self.dtype}'; it must be one of {', '.join(LIMITS)}")
        if not LOW <= self.zero_point <= HIGH:
            raise ValueError(f"zero point is {self.zero_point}; it must lie in [{LOW}, {HIGH}]")
        if self.dtype == "int16" and self.zero_point:
            raise ValueError(f"zero point is {self.zero_point}; that of 16-bit numbers must be 0")
        object.__setattr__(self, "scale", float(np.float32(self.scale)))
        object.__setattr__(self, "zero_point", int(self.zero_point))

    @staticmethod
    def from_range(low: float, high: float, symmetric: bool = False, dtype: str = "int8") -> QParams:
        """Parameters whose representable range covers [low, high] and contains 0 exactly; 16 bits are symmetric.

        (gemmlowp doc/quantization.md: nudge the zero point to an integer, so that real 0, which padding uses, has no error.)
        An empty range (0, 0) gives scale 1. Raises ValueError for NaN, infinity or low > high.
        """
        if not (math.isfinite(low) and math.isfinite(high)) or low > high:
            raise ValueError(f"range [{low}, {high}] must be finite and ordered")
        low, high = min(low, 0.0), max(high, 0.0)
        symmetric = symmetric or dtype == "int16"
        if symmetric:
            low, high = -max(-low, high), max(-low, high)
        if high - low <= 0:
            return QParams(1.0, 0, dtype)
        least, most = LIMITS[dtype]
        scale = float(np.float32(max((high - low) / (most - least), MIN_SCALE)))
        if symmetric:
            return QParams(scale, 0, dtype)
        zero_point = min(max(round(LOW - low / scale), LOW), HIGH)
        return QParams(scale, zero_point)

    def quantize(self, real: np.ndarray) -> np.ndarray:
        """Of `dtype`: `clip(rint(real / scale) + zero_point)`, ties to even, in float64 (compile-time constants; kernels follow `operators.quantize`)."""
        exact = np.array(real, np.float64)  # worked on in place: tables of embeddings are large
        exact /= self.scale
        exact = np.rint(exact, out=exact)
        exact += self.zero_point
        return np.clip(exact, *LIMITS[self.dtype], out=exact).astype(self.dtype)

    def dequantize(self, q: np.ndarray) -> np.ndarray:
        """float64 real values of integers `q`."""
        return (np.asarray(q, np.float64) - self.zero_point) * self.scale

    def rounded(self, real: np.ndarray) -> np.ndarray:
        """float32: `dequantize` of `quantize`, both in float32 as ONNX defines QuantizeLinear and DequantizeLinear: what a file that states them computes."""
        scale, (low, high) = np.float32(self.scale), LIMITS[self.dtype]
        with np.errstate(over="ignore"):
            steps = np.rint(np.asarray(real, np.float32) / scale)
        return np.asarray(np.clip(steps, low - self.zero_point, high - self.zero_point) * scale, np.float32)

    @property
    def range(self) -> tuple[float, float]:
        """The least and the greatest representable real value."""
        low, high = LIMITS[self.dtype]
        return (low - self.zero_point) * self.scale, (high - self.zero_point) * self.scale


def conv_multiplier(
    x_scale: float, w_scale: np.ndarray, y_scale: float | None, residual_shift: int | None = None, slopes: np.ndarray | None = None, bends_sum: bool = False
) -> np.ndarray:
    """float32 [O]: `x_scale * w_scale / y_scale` (Jacob et al. 2018, arXiv:1712.05877, eq. 5), times `2^residual_shift` in front of a residual sum.

    `y_scale` None: the output is the real value, `x_scale * w_scale`. Saturates at the greatest float32, so that 0 times it stays 0.
    slopes [O]: the result is [2, O], with the multipliers of negative accumulators, or (bends_sum) those of negative sums with the residual.
    """
    exact = np.float64(x_scale) * np.asarray(w_scale, np.float64)
    if y_scale is not None:
        exact = exact / np.float64(y_scale)
    exact = exact * 2.0 ** (residual_shift or 0)
    if slopes is not None:
        exact = np.stack([exact, slopes * (2.0 ** -(residual_shift or 0) if bends_sum else exact)])
    return np.clip(exact, -FLOAT32_MAX, FLOAT32_MAX).astype(np.float32)


def magnitude(dtype: str) -> int:
    """The greatest |q - z| of a value that is stored as "int8", with any zero point, or as "int16"."""
    return 255 if dtype == "int8" else 2**15


def residual_parameters(r_scale: float, y_scale: float, r_dtype: str = "int8", y_dtype: str = "int8") -> tuple[int, int]:
    """(multiplier, shift) of a residual: `r_scale / y_scale ~ multiplier * 2^-shift`.

    shift is at most 16 (20 where a 16-bit residual meets an 8-bit output, 14 for 16-bit outputs: the convolution's share reaches across 2^(30 - shift)
    steps), and such that the residual's share stays below 2^30: with the convolution's clipped to 2^30 the int32 sum can't overflow.
    """
    ratio = float(r_scale) / float(y_scale)
    for shift in range(MAX_RESIDUAL_SHIFT[r_dtype, y_dtype], -1, -1):
        multiplier = round(ratio * 2**shift)
        if magnitude(r_dtype) * multiplier < RESIDUAL_LIMIT:
            return multiplier, shift
    raise ValueError(f"residual scale {r_scale} is too large beside the output scale {y_scale}")


def add_parameters(a_scale: float, b_scale: float, y_scale: float, a_dtype: str = "int8", b_dtype: str = "int8") -> tuple[int, int, int]:
    """(A, B, shift) of a sum: `a_scale / y_scale ~ A * 2^-shift`, likewise B.

    The largest shift in [0, 30] with |a| * A + |b| * B < 2^31 for all operands, so that int32 can't overflow and each ratio has the most bits.
    """
    a_ratio, b_ratio = float(a_scale) / float(y_scale), float(b_scale) / float(y_scale)
    for shift in range(30, -1, -1):
        a, b = round(a_ratio * 2**shift), round(b_ratio * 2**shift)
        if magnitude(a_dtype) * a + magnitude(b_dtype) * b <= INT32_MAX:
            return a, b, shift
    raise ValueError(f"operand scales {a_scale} and {b_scale} are too large beside the output scale {y_scale}")


def conv_accumulator_bound(w: np.ndarray, bias: np.ndarray | None, x_zero_point: int) -> int:
    """The largest |partial sum| that any int8 input can cause, in any order of the terms, in each of the three forms kernels use.

    w: int8 [O, ...] integers; bias: int32 [O]. With z = x_zero_point and S = sum(w), an accumulator is the sum of a start and one term per weight:
    `bias` and `(x - z) * w`; int8 storage: `bias - z * S` and `x * w`; uint8 storage: `bias - (z + 128) * S` and `(x + 128) * w`. Every term can be 0, so
    the extremes are the sum of what can be positive and the sum of what can be negative, the start being one term of them. Terms left out
    (padding) stay within. Code generators take int32 addition as one that never wraps; below 2^31 that is true at every step.
    """
    flat = np.asarray(w, np.int64).reshape(len(w), -1)
    positive, negative = np.maximum(flat, 0).sum(axis=1), np.minimum(flat, 0).sum(axis=1)
    bound = 0
    for shift in (x_zero_point, 0, LOW):  # what is subtracted from x before the product; the rest of the zero point is in the start
        start = -(x_zero_point - shift) * (positive + negative) + (0 if bias is None else np.asarray(bias, np.int64))
        low, high = LOW - shift, HIGH - shift  # low <= 0 <= high
        most = np.maximum(start, 0) + positive * high + negative * low
        least = np.minimum(start, 0) + positive * low + negative * high
        bound = max(bound, int(most.max(initial=0)), -int(least.min(initial=0)))
    return bound


def lut(function: Callable[[np.ndarray], np.ndarray], x: QParams, y: QParams) -> np.ndarray:
    """[256] of the type of `y`: entry `q + 128` is `quantize(function(dequantize(q)))`, in float64. NaN gives the zero point; infinities saturate."""
    with np.errstate(all="ignore"):
        real = np.asarray(function(x.dequantize(np.arange(LOW, HIGH + 1))), np.float64)
    real = np.where(np.isnan(real), 0.0, real)
    limit = 8 * (LIMITS[y.dtype][1] + 1) * y.scale  # beyond saturation; keeps infinities out of the division
    return y.quantize(np.clip(real, -limit, limit))


def resize_indices(
    old: int, new: int, method: str, transformation: str, rounding: str = "round_prefer_floor", scale: float | None = None
) -> tuple[list[int], list[int], list[int]]:
    """Where each of `new` output positions reads from `old` input positions along one axis: (first index, second index, weight of the second).

    The weight is in units of 2^-10; it is 0 for method "nearest". `transformation` and `rounding` are ONNX Resize's coordinate_transformation_mode and
    nearest_mode (ONNX operator specification, Resize). `scale`: new / old as the model states it, when it is not that quotient.
    Raises ValueError for a mode that is not supported.
    """
    ratio = Fraction(new, old) if scale is None else Fraction(float(scale))  # exact: a tie or a whole number must not move by one rounding
    half = Fraction(1, 2)
    if transformation == "half_pixel" or (transformation == "pytorch_half_pixel" and new > 1):
        source = [(j + half) / ratio - half for j in range(new)]
    elif transformation == "asymmetric":
        source = [j / ratio for j in range(new)]
    elif transformation == "align_corners" and new > 1:
        source = [Fraction(j * (old - 1), new - 1) for j in range(new)]
    elif transformation in ("pytorch_half_pixel", "align_corners"):
        source = [Fraction(0)]
    else:
        raise ValueError(f"coordinate transformation '{transformation}' is not supported; supported: half_pixel, pytorch_half_pixel, asymmetric, align_corners")
    if method == "nearest":
        if rounding in ("round_prefer_floor", ""):
            index = [math.ceil(s - half) for s in source]
        elif rounding in ("round_prefer_ceil", "round"):
            index = [math.floor(s + half) for s in source]
        elif rounding == "floor":
            index = [math.floor(s) for s in source]
        elif rounding == "ceil":
            index = [math.ceil(s) for s in source]
        else:
            raise ValueError(f"rounding '{rounding}' is not supported; supported: round_prefer_floor, round_prefer_ceil, floor, ceil")
        first = [min(max(i, 0), old - 1) for i in index]
        return first, first, [0] * new
    if method != "linear":
        raise ValueError(f"resize method '{method}' is not supported; supported: nearest, linear")
    source = [min(max(s, Fraction(0)), Fraction(old - 1)) for s in source]
    base = [math.floor(s) for s in source]
    weight = [round((s - f) * 2**RESIZE_BITS) for s, f in zip(source, base, strict=True)]
    return base, [min(f + 1, old - 1) for f in base], weight
