"""Exponentials and what is made of them, in float32 vectors: each operation rounded once, products and sums fused by name (`llvm.fmuladd`).

Errors are relative to the result unless stated; measured over all magnitudes in tests/test_kernels_floats.py. The two polynomials were fitted for this file
(weighted least squares on Chebyshev nodes, weights moved to where the error is largest).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.schedules.builder import splat, vector
from qcompiler.schedules.isa import call

_LOG2_E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 0.693145751953125, 1.428606765330187e-06  # their sum is ln 2; the first has 16 bits, so that its product with an exponent is exact
_ROUND = 12582912.0  # 1.5 * 2^23: adding it rounds to an integer, which then lies in the low bits
_EXP = (1.0, 1.0, 0.4999999403953552, 0.1666652113199234, 0.04166838899254799, 0.008368710987269878, 0.0013814608100801706)
_TAIL = (
    -1.1987699508608785e-05, 0.15990418195724487, 0.15578657388687134, 0.15841680765151978, -0.012386564165353775, 0.2509749233722687, -0.3736848533153534,
    0.20060209929943085, -0.0396011658012867,
)  # fmt: skip
_ERF = tuple(2 / math.sqrt(math.pi) * c for c in (1.0, -1 / 3, 1 / 10, -1 / 42, 1 / 216))  # Maclaurin's series in x^2
_TANH = (1.0, -1 / 3, 2 / 15, -17 / 315)


def f32(value: float, n: int) -> Any:
    return splat(tirx.const(value, "float32"), n)


def fma(a: Any, b: Any, c: Any, n: int) -> Any:
    """`a * b + c`, rounded once where the machine can."""
    return call(vector("float32", n), "llvm.fmuladd", a, b, c)


def _polynomial(coefficients: Sequence[float], x: Any, n: int) -> Any:
    """`coefficients[i] * x^i`, summed by Horner's rule."""
    value = f32(coefficients[-1], n)
    for c in reversed(coefficients[:-1]):
        value = fma(value, x, f32(c, n), n)
    return T.bind(value)


def root(x: Any, n: int) -> Any:
    return call(vector("float32", n), "llvm.sqrt", x)


def exp(x: Any, n: int) -> Any:
    """e^x to 2^-22; 0 below -87, e^88 above 88, NaN for NaN."""
    x = T.bind(T.min(f32(88.0, n), x))
    rounded = T.bind(fma(x, f32(_LOG2_E, n), f32(_ROUND, n), n))
    whole = T.bind(rounded - f32(_ROUND, n))
    rest = T.bind(fma(whole, f32(-_LN2_LOW, n), fma(whole, f32(-_LN2_HIGH, n), x, n), n))
    power = T.shift_left(T.reinterpret(vector("int32", n), rounded), splat(T.int32(23), n))
    bits = T.reinterpret(vector("int32", n), _polynomial(_EXP, rest, n)) + power
    return T.bind(T.Select(x < f32(-87.0, n), f32(0.0, n), T.Select(x == x, T.reinterpret(vector("float32", n), bits), x)))


def _negative(x: Any, n: int) -> Any:
    return f32(0.0, n) - x


def _absolute(x: Any, n: int) -> Any:
    return T.max(x, _negative(x, n))


def sigmoid(x: Any, n: int) -> Any:
    return T.bind(f32(1.0, n) / (f32(1.0, n) + exp(_negative(x, n), n)))


def tanh(x: Any, n: int) -> Any:
    a = T.bind(_absolute(x, n))
    e = exp(a * f32(-2.0, n), n)
    large = T.bind((f32(1.0, n) - e) / (f32(1.0, n) + e))
    small = T.bind(a * _polynomial(_TANH, T.bind(a * a), n))
    value = T.bind(T.Select(a < f32(0.1, n), small, large))
    return T.bind(T.Select(x < f32(0.0, n), _negative(value, n), value))


def _normal_tail(a: Any, n: int) -> Any:
    """The probability that a normal variable exceeds a >= 0: erfc(a / sqrt(2)) / 2, as e^(-a^2 / 2) times a polynomial of 1 / (1 + 0.4 a)."""
    t = T.bind(f32(1.0, n) / fma(a, f32(0.4, n), f32(1.0, n), n))
    return T.bind(exp(a * a * f32(-0.5, n), n) * _polynomial(_TAIL, t, n))


def erf(x: Any, n: int) -> Any:
    a = T.bind(_absolute(x, n))
    large = T.bind(fma(_normal_tail(T.bind(a * f32(math.sqrt(2), n)), n), f32(-2.0, n), f32(1.0, n), n))
    value = T.bind(T.Select(a < f32(0.3, n), a * _polynomial(_ERF, T.bind(a * a), n), large))
    return T.bind(T.Select(x < f32(0.0, n), _negative(value, n), value))


def gelu(x: Any, n: int) -> Any:
    """x times the probability that a normal variable is below x; 0 at -inf."""
    a = T.bind(T.min(f32(40.0, n), _absolute(x, n)))
    return fma(_negative(a, n), _normal_tail(a, n), T.max(f32(0.0, n), x), n)


def gelu_tanh(x: Any, n: int) -> Any:
    """`0.5 x (1 + tanh(u)) = x sigmoid(2 u)` with u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    twice = 2 * math.sqrt(2 / math.pi)
    return x * sigmoid(T.bind(x * fma(x * x, f32(twice * 0.044715, n), f32(twice, n), n)), n)


def silu(x: Any, n: int) -> Any:
    return x * sigmoid(x, n)


# -- sums of vectors ------------------------------------------------------------------------------------------------------------------------


def horizontal(value: Any, n: int, combine: Callable[[Any, Any], Any]) -> Any:
    """The elements of a vector combined: halves first, to one scalar."""
    while n > 1:
        n //= 2
        value = T.bind(value)
        value = combine(T.Shuffle([value], list(range(n))), T.Shuffle([value], list(range(n, 2 * n))))
    return T.bind(value)


def runs(extent: int, lanes: int) -> list[tuple[int, int, int]]:
    """(first, count, lanes): disjoint vectors that cover `extent` elements, the widest first."""
    found, first = [], 0
    while first < extent:
        while lanes > extent - first:
            lanes //= 2
        count = (extent - first) // lanes
        found.append((first, count, lanes))
        first += count * lanes
    return found
