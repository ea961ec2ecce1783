"""Activations that exporters spell out.

    x * sigmoid(x)                                     -->  silu(x)
    0.5 * x * (1 + erf(x / sqrt(2))), in any order      -->  gelu(x)
    prelu(x, one slope)                                -->  leakyrelu(x, slope)
    max(x, slope * x); relu(x) - slope * relu(-x); where(x > 0, x, slope * x); ...  -->  leakyrelu(x, slope), prelu(x, slopes)
    x * (clip(x + 3, 0, 6) / 6), in any order           -->  x * clip(x * (1/6) + 0.5, 0, 1)

An expression is recognized by its values (`unary.Unary`), not by its spelling.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from tvm import relax

from qcompiler.passes.graph import const, const_value, dtype_of, is_const, relax_op, shape_of
from qcompiler.passes.rewrite import Rewrite
from qcompiler.passes.unary import Expression, Unary, elementwise, expression_of

_DEPTH = 12  # operators from the end of a spelled-out activation back to its operand
_BENT = ("relax.maximum", "relax.minimum", "relax.add", "relax.subtract", "relax.where")  # what a spelled-out rectifier ends in
_GRID = np.array([-30.0, -6.0, -1.0, -0.375, -0.001, 0.0, 0.001, 0.375, 1.0, 6.0, 30.0])


def constant_slope(rewrite: Rewrite, name: str, expr: Any) -> Any:
    """The leaky rectifier that a prelu with one slope for all channels is."""
    if relax_op(expr) != "relax.nn.prelu" or not is_const(expr.args[1]) or len(slopes := np.unique(const_value(expr.args[1]))) != 1:
        return None
    return relax.op.nn.leakyrelu(expr.args[0], float(slopes[0]))


def spelled_out(rewrite: Rewrite, name: str, expr: Any) -> Any:
    """The named form of the smallest expression ending in the product `expr` that has one."""
    if relax_op(expr) != "relax.multiply":
        return None

    def named(expression: Expression, operand: Any) -> Any:
        make = _NAMED.get(Unary(expression).name)
        return None if make is None else make(rewrite, name, operand)

    return _smallest(rewrite, name, named, arrays=False)


def bent(rewrite: Rewrite, name: str, expr: Any) -> Any:
    """The rectifier that an expression of maxima, sums or choices is: x where x is positive, else x times a slope, which may be one per channel."""
    if relax_op(expr) not in _BENT or dtype_of(expr) != "float32":
        return None

    def rectifier(expression: Expression, operand: Any) -> Any:
        shape = shape_of(operand)
        constants = np.broadcast_shapes((1,) * len(shape), *_shapes(expression))
        axis, count = int(np.argmax(constants)) if constants else 0, math.prod(constants)
        if count > 1 and (constants[axis] != count or shape[axis] != count or axis not in (1, len(shape) - 1)):  # not one per channel
            return None
        slopes = _slopes(Unary(expression), constants)
        if slopes is None or (slopes == 1).all():
            return None
        if (slopes == 0).all():
            return relax.op.nn.relu(operand)
        return relax.op.nn.leakyrelu(operand, float(slopes[0])) if len(np.unique(slopes)) == 1 else relax.op.nn.prelu(operand, const(slopes), axis)

    return _smallest(rewrite, name, rectifier, arrays=True)


def _slopes(function: Unary, shape: tuple[int, ...]) -> np.ndarray | None:
    """float32, one for each element of its constants' shape: what a rectifier multiplies negative numbers with; None for any other function, one
    that is not quite 0 at 0 among them."""
    grid = np.broadcast_to(_GRID.reshape(-1, *(1 for _ in shape)), (len(_GRID), *shape))
    values = function(grid)
    slopes = values[0] / grid[0]
    with np.errstate(all="ignore"):  # of a function that is not finite
        expected = np.where(grid > 0, grid, slopes * grid)
    return slopes.astype(np.float32).reshape(-1) if np.isfinite(slopes).all() and np.allclose(values, expected, rtol=1e-6, atol=0) else None


def _smallest(rewrite: Rewrite, name: str, accept: Callable[[Expression, Any], Any], arrays: bool) -> Any:
    """What `accept(expression, operand)` finds first, of the expressions of one tensor that end in `name`, the smallest first.
    `arrays`: as that of `elementwise`."""
    values, inside = rewrite.old, {name}
    source = values[name]

    def operands(n: str) -> list[Any]:
        found = elementwise(values[n], arrays)
        return [o for o in found[1] if isinstance(o, relax.Var)] if found else []

    for _ in range(_DEPTH):
        frontier = {str(o.name) for n in inside for o in operands(n) if str(o.name) not in inside}
        if len(frontier) == 1:
            (x,) = frontier
            operand = rewrite.env.get(x)
            if isinstance(operand, relax.Var) and all(shape_of(o) == shape_of(source) for n in inside for o in operands(n)):
                found = accept(expression_of(values, name, inside, arrays), operand)
                if found is not None:
                    return found
        grow = [n for n in frontier if n in values and operands(n) and not rewrite.is_stated(n) and all(u in inside for u in rewrite.uses[n])]
        if not grow:
            return None
        inside.add(max(grow, key=lambda n: rewrite.order[n]))
    return None


def _shapes(expression: Expression) -> Iterator[tuple[int, ...]]:
    """The shapes of its constants of several elements."""
    if isinstance(expression, tuple):
        for operand in expression[1:]:
            yield from _shapes(operand)
    elif isinstance(expression, np.ndarray):
        yield expression.shape


def _hard_swish(rewrite: Rewrite, name: str, x: Any) -> Any:
    if any(relax_op(rewrite.value(a)) == "relax.clip" and rewrite.value(a).args[2].value == 1.0 for a in rewrite.old[name].args):
        return rewrite.current(name)  # spelled so already
    scaled = rewrite.interior(name, "scaled", relax.op.multiply(x, const(np.float32(1 / 6))))
    shifted = rewrite.interior(name, "shifted", relax.op.add(scaled, const(np.float32(0.5))))
    return relax.op.multiply(x, rewrite.interior(name, "gate", relax.op.clip(shifted, 0.0, 1.0)))


_NAMED: dict[str, Callable[[Rewrite, str, Any], Any]] = {
    "silu": lambda rewrite, name, x: relax.op.nn.silu(x),
    "gelu": lambda rewrite, name, x: relax.op.nn.gelu(x),
    "gelu_tanh": lambda rewrite, name, x: relax.op.nn.gelu_tanh(x),
    "hard_swish": _hard_swish,
}
