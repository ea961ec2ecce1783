"""Gives layer normalizations that exporters spell out (operator sets below 17 have none) the name Relax has for them.

    d = x - mean(x);  d / sqrt(mean(d^2) + epsilon) * gamma + beta      -->      layer_norm(x, gamma, beta)

Spelled out, the mean square would be made of 8-bit numbers, where one loud channel drowns the others. d^2 may be a power or a product, the quotient a
product with a reciprocal; gamma and beta are constants along the normalized axis, or missing. Follows simplify; before fold_batch_norm, which would
take gamma away.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax

from qcompiler.passes.graph import const, const_value, dtype_of, is_const, plain, relax_op, shape_of
from qcompiler.passes.rewrite import Rewrite, channel_vector


def recognise_layer_norms(module: tvm.IRModule) -> tvm.IRModule:
    rewrite = Rewrite(module)
    for name, expr in rewrite:  # what only gamma or beta read is recognized too, and dropped again with them
        found = _layer_norm(rewrite, rewrite.old[name])
        rewrite.keep(name, expr if found is None else found)
    return rewrite.done()


def _layer_norm(rewrite: Rewrite, end: Any) -> Any:
    """The call that `end`, an expression of the old module, stands for; None when it is no normalization."""
    if not hasattr(end.ty, "shape") or dtype_of(end) != "float32":
        return None
    beta, product = _with_constant(rewrite, end, "relax.add")
    gamma, quotient = _with_constant(rewrite, product, "relax.multiply")
    found = _normalized(rewrite, quotient)
    if found is None:
        return None
    x, axis, epsilon = found
    channels = shape_of(x)[axis]
    vectors = []
    for constant, default in ((gamma, 1.0), (beta, 0.0)):
        vector = np.full(1, default) if constant is None else channel_vector(constant, axis, shape_of(x))
        if vector is None:
            return None
        vectors.append(const(np.broadcast_to(vector, (channels,)).astype(np.float32)))
    return relax.op.nn.layer_norm(rewrite.env[str(x.name)], *vectors, [axis], epsilon)


def _with_constant(rewrite: Rewrite, expr: Any, op: str) -> tuple[Any, Any]:
    """(constant, what it is added to or multiplied with), or (None, `expr`)."""
    if relax_op(expr) == op and is_const(expr.args[1]) and (inner := _behind(rewrite, expr.args[0])) is not None:
        return expr.args[1], inner
    return None, expr


def _behind(rewrite: Rewrite, variable: Any) -> Any:
    """The old expression of a variable that the model file doesn't round to 8 bits; None for everything else."""
    known = isinstance(variable, relax.Var) and str(variable.name) not in rewrite.trained
    return rewrite.old.get(str(variable.name)) if known else None


def _normalized(rewrite: Rewrite, expr: Any) -> tuple[Any, int, float] | None:
    """(x, axis, epsilon) of d / sqrt(mean(d^2) + epsilon) with d = x - mean(x) along one axis."""
    if relax_op(expr) not in ("relax.divide", "relax.multiply"):
        return None
    a, b = expr.args
    for d, spread in ((a, b),) if relax_op(expr) == "relax.divide" else ((a, b), (b, a)):
        root = _behind(rewrite, spread)
        if relax_op(expr) == "relax.multiply":  # by a reciprocal
            if relax_op(root) == "relax.divide" and is_const(root.args[0]) and (const_value(root.args[0]) == 1).all():
                root = _behind(rewrite, root.args[1])
            elif relax_op(root) != "relax.rsqrt":
                continue
        variance: Any = _behind(rewrite, root.args[0]) if relax_op(root) in ("relax.sqrt", "relax.rsqrt") else None
        if relax_op(variance) != "relax.add" or not is_const(variance.args[1]) or const_value(variance.args[1]).size != 1:
            continue
        square, centered = _mean(rewrite, variance.args[0]), _behind(rewrite, d)
        if square is None or relax_op(centered) != "relax.subtract" or not _is_square(_behind(rewrite, square[0]), d):
            continue
        mean = _mean(rewrite, centered.args[1])
        if mean is not None and mean[0].same_as(centered.args[0]) and mean[1] == square[1]:
            return mean[0], mean[1], float(const_value(variance.args[1]).reshape(-1)[0])
    return None


def _mean(rewrite: Rewrite, variable: Any) -> tuple[Any, int] | None:
    """(operand, axis) of a mean along one axis that it keeps."""
    expr = _behind(rewrite, variable)
    if relax_op(expr) != "relax.mean" or not expr.attrs.keepdims or not isinstance(expr.args[0], relax.Var) or expr.attrs.axis is None:
        return None
    axes = plain(expr.attrs.axis)
    return (expr.args[0], axes[0] % len(shape_of(expr.args[0]))) if len(axes) == 1 else None


def _is_square(expr: Any, of: Any) -> bool:
    if relax_op(expr) == "relax.multiply":
        return all(isinstance(a, relax.Var) and a.same_as(of) for a in expr.args)
    power = relax_op(expr) == "relax.power" and is_const(expr.args[1]) and (const_value(expr.args[1]) == 2).all()
    return bool(power or relax_op(expr) == "relax.square") and expr.args[0].same_as(of)
