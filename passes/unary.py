"""Scalar functions of one tensor, as plain expressions: what a 256-entry table can hold.

An expression is `"x"`, a number, or `(operator, operand, ...)`; "hard-swish" is `("multiply", "x", ("clip", ("add", ...), 0.0, 1.0))`.
Two expressions of the same function are the same function: names come from comparing values, not from how the source spelled it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax

from qcompiler.passes.graph import const_value, is_const, plain, relax_op

LOWEST, HIGHEST = float(np.finfo(np.float32).min), float(np.finfo(np.float32).max)
Expression = Any  # "x" | float | array of constants | tuple[str, Expression, ...]

_erf = np.vectorize(math.erf, otypes=[np.float64])
_GELU_TANH = math.sqrt(2.0 / math.pi)
_SELU = (1.0507009873554805, 1.6732632423543772)  # (scale, alpha), Klambauer et al. 2017, arXiv:1706.02515


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * x))  # never overflows


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1.0 + np.tanh(_GELU_TANH * (x + 0.044715 * x**3)))


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": np.divide,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "power": np.power,
    "relu": lambda x: np.maximum(x, 0.0),
    "clip": np.clip,
    "leakyrelu": lambda x, alpha: np.where(x >= 0, x, alpha * x),
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
    "silu": lambda x: x * _sigmoid(x),
    "gelu": lambda x: 0.5 * x * (1.0 + _erf(x / math.sqrt(2.0))),
    "gelu_tanh": _gelu_tanh,
    "selu": lambda x: _SELU[0] * np.where(x > 0, x, _SELU[1] * np.expm1(np.minimum(x, 0.0))),
    "softplus": lambda x, beta, threshold: np.where(x * beta > threshold, x, np.logaddexp(0.0, x * beta) / beta),
    "erf": _erf,
    "exp": np.exp,
    "log": np.log,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "square": np.square,
    "abs": np.abs,
    "negative": np.negative,
    "sin": np.sin,
    "cos": np.cos,
    "atan": np.arctan,
    "asinh": np.arcsinh,
    "where": np.where,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "less": np.less,
    "less_equal": np.less_equal,
}
_BINARY = ("add", "subtract", "multiply", "divide", "maximum", "minimum", "power")
_PARAMETERS = {"leakyrelu": ("alpha",), "softplus": ("beta", "threshold")}  # attributes that join the operands

_NAMED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "identity": lambda x: x,
    "square": np.square,
    "relu": _FUNCTIONS["relu"],
    "relu6": lambda x: np.clip(x, 0.0, 6.0),
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
    "hard_sigmoid": lambda x: np.clip(x / 6.0 + 0.5, 0.0, 1.0),
    "hard_swish": lambda x: x * np.clip(x / 6.0 + 0.5, 0.0, 1.0),
    "silu": _FUNCTIONS["silu"],
    "gelu": _FUNCTIONS["gelu"],
    "gelu_tanh": _gelu_tanh,
    "mish": lambda x: x * np.tanh(np.logaddexp(0.0, x)),
    "softplus": lambda x: np.logaddexp(0.0, x),
}


@dataclass(frozen=True)
class Unary:
    """A scalar function of one real variable; calling it maps a float array elementwise, in float64."""

    expression: Expression

    def __call__(self, x: np.ndarray) -> np.ndarray:
        with np.errstate(all="ignore"):  # outside of its domain a function is NaN or infinite, which callers handle
            return np.asarray(np.broadcast_to(_evaluate(self.expression, np.asarray(x, np.float64), {}), np.shape(x)), np.float64)

    @functools.cached_property
    def name(self) -> str:
        """ "sigmoid", "hard_swish", ... when the values agree with that function to 1e-5; else the outermost operator."""
        grid = np.linspace(-12.0, 12.0, 193)
        values = self(grid)
        for name, function in _NAMED.items():
            if np.allclose(values, function(grid), rtol=1e-5, atol=1e-5):
                return name
        return str(self.expression[0]) if isinstance(self.expression, tuple) else "constant"

    @functools.cached_property
    def refusal(self) -> str | None:
        """Why 8 bits can't hold this function's values usefully, or None.

        The values must be finite everywhere, and the steepest slope within |x| <= 32 at most twice that within |x| <= 8: uniform steps of
        the output waste nearly all of its 256 levels on exp, log, x^2 and the like.
        """
        step = 1.0 / 16
        wide = np.arange(-32.0, 32.0 + step, step)
        values = self(wide)
        if not np.isfinite(values).all():
            return f"{self.name} is not finite for every input"
        slope = np.abs(np.diff(values)) / step
        if slope.max() > 2.0 * slope[np.abs(wide[:-1]) <= 8.0].max():
            return f"{self.name} is too steep for the uniform steps of 8 bits"
        return None


def _evaluate(expression: Expression, x: np.ndarray, known: dict[int, Any]) -> Any:
    if not isinstance(expression, tuple):
        return x if isinstance(expression, str) else expression
    if id(expression) not in known:
        known[id(expression)] = _FUNCTIONS[expression[0]](*[_evaluate(e, x, known) for e in expression[1:]])
    return known[id(expression)]


def expression_of(values: Mapping[str, Any], root: str, inside: Collection[str], arrays: bool = False) -> Expression:
    """What `root` computes of the one tensor that the elementwise values `inside` read from outside. A value that is read twice is one object.
    `arrays`: as that of `elementwise`."""
    made: dict[str, Expression] = {}

    def of(name: str) -> Expression:
        if name not in inside:
            return "x"
        if name not in made:
            found = elementwise(values[name], arrays)
            assert found is not None
            made[name] = (found[0], *[of(str(o.name)) if isinstance(o, relax.Var) else o for o in found[1]])
        return made[name]

    return of(root)


def elementwise(expr: Any, arrays: bool = False) -> tuple[str, list[Any]] | None:
    """(operator, operands) of an elementwise Relax call this file can evaluate; operands are Relax variables or floats. Else None.

    arrays: constants of several elements are operands too, arrays as they are.
    """
    op = relax_op(expr)
    name = op.rsplit(".", 1)[-1] if op else ""
    if op not in (f"relax.{name}", f"relax.nn.{name}") or name not in _FUNCTIONS:
        return None
    operands: list[Any] = []
    for arg in expr.args:
        if is_const(arg):
            value = const_value(arg)
            if value.ndim > len(expr.ty.shape) or (value.size != 1 and not arrays):
                return None
            operands.append(float(value.reshape(())) if value.size == 1 else value)
        elif hasattr(arg, "value"):  # clip bounds
            operands.append(float(plain(arg)))
        else:
            operands.append(arg)
    operands += [float(getattr(expr.attrs, field)) for field in _PARAMETERS.get(name, ())]
    return name, operands


def clamp(expr: Any) -> tuple[Any, float | None, float | None] | None:
    """(operand, low, high) of a relu, clip, or maximum / minimum with a scalar constant; None for any other expression."""
    found = elementwise(expr)
    if found is None:
        return None
    name, operands = found
    if name == "relu":
        return operands[0], 0.0, None
    if name == "clip":
        low, high = operands[1:]
        return operands[0], None if low == -math.inf else low, None if high == math.inf else high
    if name in ("maximum", "minimum") and sum(isinstance(o, float) for o in operands) == 1:
        bound, tensor = operands if isinstance(operands[0], float) else operands[::-1]
        return (tensor, bound, None) if name == "maximum" else (tensor, None, bound)
    return None


def clamped(x: Any, low: float | None, high: float | None) -> Any:
    """`min(max(x, low), high)` in its canonical form; None is no bound."""
    if low is None and high is None:
        return x
    dtype = str(x.ty.dtype)
    if dtype != "float32":
        limits = np.iinfo(dtype)
        return relax.op.clip(x, int(limits.min if low is None else low), int(limits.max if high is None else high))
    if low == 0 and high is None:
        return relax.op.nn.relu(x)
    return relax.op.clip(x, LOWEST if low is None else float(low), HIGHEST if high is None else float(high))


def join_clamps(first: tuple[float | None, float | None], second: tuple[float | None, float | None]) -> tuple[float | None, float | None]:
    """Bounds of the one clamp that equals `first` followed by `second`."""

    def bounded(value: float) -> float:
        return float(np.minimum(np.maximum(value, -math.inf if second[0] is None else second[0]), math.inf if second[1] is None else second[1]))

    low = second[0] if first[0] is None else bounded(first[0])
    high = second[1] if first[1] is None else bounded(first[1])
    return low, high
