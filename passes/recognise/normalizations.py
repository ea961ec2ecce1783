"""Normalizations that exporters spell out: layer normalization (operator sets below 17 have none), root mean square normalization (below 23).

    d = x - mean(x);  d / sqrt(mean(d^2) + epsilon) * gamma + beta           -->      layer_norm(x, gamma, beta)
    the same, the means over pixels                                          -->      group_norm(x, gamma, beta), a group for each channel
    x / sqrt(mean(x^2) + epsilon) * gamma                                    -->      rms_norm(x, gamma)
    reshape(group_norm(reshape(x, [N, G, ...]), G groups)) * gamma + beta    -->      group_norm(x, gamma, beta), G groups

Spelled out, the mean square would be made of 8-bit numbers, where one loud channel drowns the others. d^2 may be a power or a product, the quotient a
product with a reciprocal; gamma and beta are constants along the normalized axis (or that of the channels), or missing. The last form is how PyTorch
writes a group normalization: as an instance normalization whose channels are the groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import relax

from qcompiler.passes.graph import const, const_value, dtype_of, is_const, plain, relax_op, shape_of
from qcompiler.passes.recognise.miss import Miss
from qcompiler.passes.rewrite import Rewrite, channel_vector


def layer_norm(rewrite: Rewrite, name: str, expr: Any) -> Any:
    """The call that the old module's `name` stands for, along one axis or over the pixels of each channel; None when it is no normalization. What only gamma
    or beta read is recognized too, and dropped again with them."""
    end = _ends(rewrite, name)
    beta, product = _with_constant(rewrite, end, "relax.add")
    gamma, quotient = _with_constant(rewrite, product, "relax.multiply")
    found = _centered(rewrite, quotient)
    if found is None:
        return None
    x, rank = rewrite.env[str(found.x.name)], len(shape_of(found.x))
    axis = found.axis if len(found.axes) == 1 else {tuple(range(2, rank)): 1, tuple(range(1, rank - 1)): rank - 1}.get(found.axes)
    if axis is None:
        return Miss(name, f"no layer_norm: it is over axes {list(found.axes)}; supported: one axis, or all but the first and that of the channels")
    vectors = [_vector(found.x, axis, constant, default) for constant, default in ((gamma, 1.0), (beta, 0.0))]
    if any(v is None for v in vectors):
        return None
    if len(found.axes) == 1:
        return relax.op.nn.layer_norm(x, *vectors, [axis], found.epsilon)
    return relax.op.nn.group_norm(x, *vectors, shape_of(found.x)[axis], axis, list(found.axes), found.epsilon)


def rms_norm(rewrite: Rewrite, name: str, expr: Any) -> Any:
    """The same for root mean square normalizations, over the last axis."""
    gamma, quotient = _with_constant(rewrite, _ends(rewrite, name), "relax.multiply")
    found = _divided_by_norm(rewrite, quotient)
    if found is None or _centered(rewrite, quotient) is not None:
        return None
    if found.axes != (len(shape_of(found.x)) - 1,):
        return Miss(name, f"no rms_norm: it is over axes {list(found.axes)}; supported: the last axis")
    if (gamma := _vector(found.x, found.axis, gamma, 1.0)) is None:
        return None
    return relax.op.nn.rms_norm(rewrite.env[str(found.x.name)], gamma, [found.axis], found.epsilon)


def group_norm(rewrite: Rewrite, name: str, expr: Any) -> Any:
    """The same for a normalization of groups that were made channels, over channels and what lies behind them."""
    end = _ends(rewrite, name)
    beta, product = _with_constant(rewrite, end, "relax.add")
    gamma, whole = _with_constant(rewrite, product, "relax.multiply")
    inner: Any = _behind(rewrite, whole.args[0]) if relax_op(whole) == "relax.reshape" else None
    parted: Any = _behind(rewrite, inner.args[0]) if relax_op(inner) == "relax.nn.group_norm" and all(map(is_const, inner.args[1:])) else None
    if relax_op(parted) != "relax.reshape" or not isinstance(parted.args[0], relax.Var):
        return None
    shape, (rows, groups, *rest), a = shape_of(whole), shape_of(parted), inner.attrs
    axes = list(range(2, len(rest) + 2))
    if len(shape) < 3 or shape[0] != rows or shape[1] % groups or (int(a.num_groups), int(a.channel_axis), sorted(plain(a.axes))) != (groups, 1, axes):
        return None
    scale, shift = (np.repeat(const_value(v).astype(np.float64), shape[1] // groups) for v in inner.args[1:])
    factor, offset = (default if c is None else channel_vector(c, 1, shape) for c, default in ((gamma, np.ones(1)), (beta, np.zeros(1))))
    if factor is None or offset is None:
        return None
    x = rewrite.env[str(parted.args[0].name)]
    x = x if shape_of(x) == shape else rewrite.once(name, "channels", relax.op.reshape(x, shape))
    vectors = [const(v.astype(np.float32)) for v in (scale * factor, shift * factor + offset)]
    return relax.op.nn.group_norm(x, *vectors, groups, 1, list(range(2, len(shape))), float(a.epsilon))


def _ends(rewrite: Rewrite, name: str) -> Any:
    end = rewrite.old[name]
    return end if hasattr(end.ty, "shape") and dtype_of(end) == "float32" else None


def _vector(x: Any, axis: int, constant: Any, default: float) -> Any:
    """Gamma or beta along an axis of x; None for a constant of another shape."""
    vector = np.full(1, default) if constant is None else channel_vector(constant, axis, shape_of(x))
    return None if vector is None else const(np.broadcast_to(vector, (shape_of(x)[axis],)).astype(np.float32))


def _with_constant(rewrite: Rewrite, expr: Any, op: str) -> tuple[Any, Any]:
    """(constant, what it is added to or multiplied with), or (None, `expr`)."""
    if relax_op(expr) == op and is_const(expr.args[1]) and (inner := _behind(rewrite, expr.args[0])) is not None:
        return expr.args[1], inner
    return None, expr


def _behind(rewrite: Rewrite, variable: Any) -> Any:
    """The old expression of a variable that the model file doesn't round to 8 bits; None for everything else."""
    known = isinstance(variable, relax.Var) and not rewrite.is_stated(str(variable.name))
    return rewrite.old.get(str(variable.name)) if known else None


@dataclass(frozen=True)
class _Norm:
    """x / sqrt(mean(x^2) + epsilon), the mean over `axes`."""

    x: Any
    axes: tuple[int, ...]
    epsilon: float

    @property
    def axis(self) -> int:
        return self.axes[0]


def _divided_by_norm(rewrite: Rewrite, expr: Any) -> _Norm | None:
    """What `expr` is as x / sqrt(mean(x^2) + epsilon) over some axes."""
    if relax_op(expr) not in ("relax.divide", "relax.multiply"):
        return None
    a, b = expr.args
    for x, spread in ((a, b),) if relax_op(expr) == "relax.divide" else ((a, b), (b, a)):
        root = _behind(rewrite, spread)
        if relax_op(expr) == "relax.multiply":  # by a reciprocal
            if relax_op(root) == "relax.divide" and is_const(root.args[0]) and (const_value(root.args[0]) == 1).all():
                root = _behind(rewrite, root.args[1])
            elif relax_op(root) != "relax.rsqrt":
                continue
        variance: Any = _behind(rewrite, root.args[0]) if relax_op(root) in ("relax.sqrt", "relax.rsqrt") else None
        if relax_op(variance) != "relax.add" or not is_const(variance.args[1]) or const_value(variance.args[1]).size != 1:
            continue
        square = _mean(rewrite, variance.args[0])
        if square is not None and isinstance(x, relax.Var) and _is_square(_behind(rewrite, square[0]), x):
            return _Norm(x, square[1], float(const_value(variance.args[1]).reshape(-1)[0]))
    return None


def _centered(rewrite: Rewrite, expr: Any) -> _Norm | None:
    """The same of x - mean(x) over the same axes."""
    found = _divided_by_norm(rewrite, expr)
    centered: Any = _behind(rewrite, found.x) if found is not None else None
    if found is None or relax_op(centered) != "relax.subtract":
        return None
    mean = _mean(rewrite, centered.args[1])
    return replace(found, x=mean[0]) if mean is not None and mean[0].same_as(centered.args[0]) and mean[1] == found.axes else None


def _mean(rewrite: Rewrite, variable: Any) -> tuple[Any, tuple[int, ...]] | None:
    """(operand, axes) of a mean that keeps its axes."""
    expr = _behind(rewrite, variable)
    if relax_op(expr) != "relax.mean" or not expr.attrs.keepdims or not isinstance(expr.args[0], relax.Var) or expr.attrs.axis is None:
        return None
    return expr.args[0], tuple(sorted(axis % len(shape_of(expr.args[0])) for axis in plain(expr.attrs.axis)))


def _is_square(expr: Any, of: Any) -> bool:
    if relax_op(expr) == "relax.multiply":
        return all(isinstance(a, relax.Var) and a.same_as(of) for a in expr.args)
    power = relax_op(expr) == "relax.power" and is_const(expr.args[1]) and (const_value(expr.args[1]) == 2).all()
    return bool(power or relax_op(expr) == "relax.square") and expr.args[0].same_as(of)
