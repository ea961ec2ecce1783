"""Removes operators that do nothing, and spells the rest one way.

    x * 1, x + 0, reshape to the same shape, identity permutation, no-op cast     -->  x
    reshape(reshape(x)), permute_dims(permute_dims(x))                           -->  one
    reshape(permute_dims(reshape(x))) that moves axes of x as they are           -->  permute_dims(x)
    take and gather_nd of every element, in order                                -->  reshape
    strided_slice(concat(x, y)) that lies within x                               -->  strided_slice(x)
    strided_slice of everything                                                  -->  x
    where(a constant that is true, or false, everywhere, x, y)                   -->  x, or y
    x / c                                                                        -->  x * (1 / c)
    x - c                                                                        -->  x + (-c)
    c + x, c * x                                                                 -->  x + c, x * c
    maximum(x, c), minimum(x, c), clip(relu(x))                                  -->  one relu or clip
    average pooling over the whole image                                         -->  mean

Follows fold_constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import relax

from qcompiler.passes.graph import const, const_value, dtype_of, is_const, plain, relax_op, shape_of, slice_ranges
from qcompiler.passes.rewrite import Rewrite
from qcompiler.passes.unary import clamp, clamped, join_clamps

_COMMUTE = {"relax.add": relax.op.add, "relax.multiply": relax.op.multiply, "relax.maximum": relax.op.maximum, "relax.minimum": relax.op.minimum}


def simplify(module: tvm.IRModule) -> tvm.IRModule:
    rewrite = Rewrite(module)
    for name, expr in rewrite:
        if name in rewrite.trained.exact:  # to the bit: x / s is not x * (1 / s)
            rewrite.keep(name, expr)
            continue
        for _ in range(4):  # a rule's result may be another rule's operand
            typed = expr if isinstance(expr, relax.Var) else relax.BlockBuilder().normalize(expr)
            rule = _RULES.get(str(relax_op(typed)))
            changed = rule(rewrite, typed) if rule else None
            if changed is None:
                break
            expr = changed
        if isinstance(expr, relax.Var) or is_const(expr):
            rewrite.replace(name, expr)
        else:
            rewrite.keep(name, expr)
    return rewrite.done()


def _all(constant: Any, value: float) -> bool:
    return is_const(constant) and bool((const_value(constant) == value).all())


def _binary(rewrite: Rewrite, expr: Any) -> Any:
    op, (a, b) = str(relax_op(expr)), expr.args
    if is_const(a) and not is_const(b) and op in _COMMUTE:
        return _COMMUTE[op](b, a)
    if not is_const(b) or dtype_of(expr) != "float32":
        return None
    same = not is_const(a) and shape_of(a) == shape_of(expr)
    if same and _all(b, 1.0 if op in ("relax.multiply", "relax.divide", "relax.power") else 0.0) and op not in ("relax.maximum", "relax.minimum"):
        return a
    if op == "relax.divide" and const_value(b).all():
        with np.errstate(over="ignore"):
            inverse = np.float32(1) / const_value(b)
        return relax.op.multiply(a, const(inverse)) if np.isfinite(inverse).all() else None
    if op == "relax.subtract":
        return relax.op.add(a, const(-const_value(b)))
    return _clamp(rewrite, expr) if op in ("relax.maximum", "relax.minimum") else None


def _clamp(rewrite: Rewrite, expr: Any) -> Any:
    """A clamp, joined with the one before it when nobody else reads that."""
    if dtype_of(expr) != "float32" or (found := clamp(expr)) is None or shape_of(found[0]) != shape_of(expr):
        return None
    x, low, high = _bounded(found)
    inner_expr = rewrite.value(x)
    inner = clamp(inner_expr) if inner_expr is not None and rewrite.single_use(x) else None
    if inner is not None and shape_of(inner[0]) == shape_of(expr):
        x, (low, high) = inner[0], join_clamps(_bounded(inner)[1:], (low, high))
    elif (relax_op(expr) in ("relax.clip", "relax.nn.relu") and (low, high) != (0.0, None)) or relax_op(expr) == "relax.nn.relu":
        return None
    return clamped(x, low, high)


def _bounded(found: tuple[Any, float | None, float | None]) -> tuple[Any, float | None, float | None]:
    """Bounds at the ends of float32 are no bounds."""
    x, low, high = found
    largest = float(np.finfo(np.float32).max)
    return x, None if low is None or low <= -largest else low, None if high is None or high >= largest else high


def _reshape(rewrite: Rewrite, expr: Any) -> Any:
    x = expr.args[0]
    if not is_const(x) and shape_of(x) == shape_of(expr):
        return x
    inner = rewrite.value(x)
    if relax_op(inner) == "relax.permute_dims":
        return _permuted_axes(rewrite, inner, shape_of(expr))
    return relax.op.reshape(inner.args[0], shape_of(expr)) if relax_op(inner) == "relax.reshape" else None


def _permuted_axes(rewrite: Rewrite, permuted: Any, shape: tuple[int, ...]) -> Any:
    """permute_dims(x) where a reshape of x joined axes, a permutation moved them, and a reshape to `shape` splits them again; else None."""
    joined = rewrite.value(permuted.args[0])
    if relax_op(joined) != "relax.reshape" or is_const(joined.args[0]):
        return None
    old, rest, parts = shape_of(joined.args[0]), list(range(len(shape_of(joined.args[0])))), []
    for extent in shape_of(joined):
        part = [rest.pop(0)] if rest else []
        while rest and math.prod(old[a] for a in part) < extent:
            part.append(rest.pop(0))
        if math.prod(old[a] for a in part) != extent:
            return None
        parts.append(part)
    axes = [a for moved in _axes(permuted) for a in parts[moved]]
    return relax.op.permute_dims(joined.args[0], axes) if not rest and tuple(old[a] for a in axes) == shape else None


def _gather(rewrite: Rewrite, expr: Any) -> Any:
    """Exporters of masks write a broadcast index for each element; where that is the element's own, nothing is gathered."""
    x, indices = expr.args
    if is_const(x) or not is_const(indices) or math.prod(shape_of(x)) != math.prod(shape_of(expr)):
        return None
    index, shape = const_value(indices), shape_of(x)
    if relax_op(expr) == "relax.gather_nd":
        if int(expr.attrs.batch_dims) or index.shape[-1] != len(shape) or (index < 0).any() or (index >= np.asarray(shape)).any():
            return None
        index = np.ravel_multi_index(tuple(np.moveaxis(index, -1, 0)), shape)
    elif expr.attrs.axis is None or int(expr.attrs.axis) % len(shape) or shape[0] != index.size:
        return None
    return relax.op.reshape(x, shape_of(expr)) if (index.reshape(-1) == np.arange(index.size)).all() else None


def _where(rewrite: Rewrite, expr: Any) -> Any:
    condition, x, y = expr.args
    if not is_const(condition) or len(found := np.unique(const_value(condition))) != 1:
        return None
    chosen = x if found[0] else y
    return chosen if not is_const(chosen) and shape_of(chosen) == shape_of(expr) else None


def _permute(rewrite: Rewrite, expr: Any) -> Any:
    axes = _axes(expr)
    if axes == sorted(axes):
        return expr.args[0]
    inner = rewrite.value(expr.args[0])
    if relax_op(inner) != "relax.permute_dims":
        return None
    before = _axes(inner)
    return relax.op.permute_dims(inner.args[0], [before[a] for a in axes])


def _axes(expr: Any) -> list[int]:
    rank = len(expr.args[0].ty.shape)
    return [a % rank for a in plain(expr.attrs.axes)] if expr.attrs.axes is not None else list(range(rank - 1, -1, -1))


def _slice(rewrite: Rewrite, expr: Any) -> Any:
    """Exporters stack what belongs together (last states of recurrent layers), and take some of it out again."""
    x, taken = expr.args[0], slice_ranges(expr)
    if is_const(x) or taken is None:
        return None
    if taken == [range(d) for d in shape_of(x)]:
        return x
    joined = rewrite.value(x)
    if relax_op(joined) != "relax.concat" or 0 in shape_of(expr):
        return None
    axis, before = int(joined.attrs.axis) % len(taken), 0
    rows = taken[axis]
    for part in joined.args[0].fields:
        behind = before + shape_of(part)[axis]
        if rows.step > 0 and before <= rows[0] and rows[-1] < behind:
            taken[axis] = range(rows[0] - before, rows[-1] + 1 - before, rows.step)
            begin, end, strides = ([getattr(t, bound) for t in taken] for bound in ("start", "stop", "step"))
            forwards = all(t.step > 0 for t in taken) and not is_const(part)
            return relax.op.strided_slice(part, list(range(len(taken))), begin, end, strides) if forwards else None
        before = behind
    return None


def _astype(rewrite: Rewrite, expr: Any) -> Any:
    return expr.args[0] if not is_const(expr.args[0]) and dtype_of(expr.args[0]) == dtype_of(expr) else None


def _avg_pool(rewrite: Rewrite, expr: Any) -> Any:
    a, x = expr.attrs, expr.args[0]
    shape = shape_of(x)
    rank = len(shape) - 2
    whole = plain(a.pool_size) == list(shape[2:]) and not any(plain(a.padding)) and all(d == 1 for d in shape_of(expr)[2:])
    return relax.op.mean(x, list(range(2, rank + 2)), True) if whole else None


def _pad(rewrite: Rewrite, expr: Any) -> Any:
    return None if any(plain(expr.attrs.pad_width)) else expr.args[0]


_RULES: dict[str, Callable[[Rewrite, Any], Any]] = {
    **dict.fromkeys(["relax.add", "relax.subtract", "relax.multiply", "relax.divide", "relax.power", "relax.maximum", "relax.minimum"], _binary),
    **dict.fromkeys(["relax.clip", "relax.nn.relu"], _clamp),
    **dict.fromkeys(["relax.nn.avg_pool1d", "relax.nn.avg_pool2d", "relax.nn.avg_pool3d"], _avg_pool),
    "relax.reshape": _reshape,
    "relax.permute_dims": _permute,
    "relax.strided_slice": _slice,
    "relax.astype": _astype,
    "relax.where": _where,
    **dict.fromkeys(["relax.take", "relax.gather_nd"], _gather),
    "relax.nn.pad": _pad,
}
