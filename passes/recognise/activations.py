"""Activations that exporters spell out.

    x * sigmoid(x)                                     -->  silu(x)
    0.5 * x * (1 + erf(x / sqrt(2))), in any order      -->  gelu(x)
    prelu(x, one slope)                                -->  leakyrelu(x, slope)
    x * (clip(x + 3, 0, 6) / 6), in any order           -->  x * clip(x * (1/6) + 0.5, 0, 1)

An expression is recognized by its values (`unary.Unary`), not by its spelling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax

from qcompiler.passes.graph import const, const_value, is_const, relax_op, shape_of
from qcompiler.passes.rewrite import Rewrite
from qcompiler.passes.unary import Unary, elementwise, expression_of

_DEPTH = 12  # operators from the end of a spelled-out activation back to its operand


def constant_slope(rewrite: Rewrite, name: str, expr: Any) -> Any:
    """The leaky rectifier that a prelu with one slope for all channels is."""
    if relax_op(expr) != "relax.nn.prelu" or not is_const(expr.args[1]) or len(slopes := np.unique(const_value(expr.args[1]))) != 1:
        return None
    return relax.op.nn.leakyrelu(expr.args[0], float(slopes[0]))


def spelled_out(rewrite: Rewrite, name: str, expr: Any) -> Any:
    """The named form of the smallest expression ending in the product `expr` that has one."""
    if relax_op(expr) != "relax.multiply":
        return None
    values, inside = rewrite.old, {name}
    source = values[name]
    for _ in range(_DEPTH):
        frontier = {str(o.name) for n in inside for o in _operands(values[n]) if str(o.name) not in inside}
        if len(frontier) == 1:
            (x,) = frontier
            operand = rewrite.env.get(x)
            if isinstance(operand, relax.Var) and all(shape_of(o) == shape_of(source) for n in inside for o in _operands(values[n])):
                make = _NAMED.get(Unary(expression_of(values, name, inside)).name)
                if make is not None:
                    return make(rewrite, name, operand)
        grow = [n for n in frontier if n in values and elementwise(values[n]) is not None and all(u in inside for u in rewrite.uses[n])]
        if not grow:
            return None
        inside.add(max(grow, key=lambda n: rewrite.order[n]))
    return None


def _operands(expr: Any) -> list[Any]:
    found = elementwise(expr)
    return [o for o in found[1] if isinstance(o, relax.Var)] if found else []


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
