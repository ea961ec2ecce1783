"""Attention, however exporters spell it out.

    softmax(scale * q @ permute(k) + bias) @ v, over [batch, head, row, channel]
        -->     permute_dims(attention(permute_dims(q), permute_dims(k), permute_dims(v), bias, scale), [0, 2, 1, 3])

`relax.nn.attention` has q[B, S, H, D], k[B, T, H, D], v[B, T, H, Dv] and a bias that broadcasts to [B, H, S, T]: the layout in which a projection leaves its
heads, so that the permutations cancel those of the file. Where the file permutes the result, the attention takes that value's id.

The scale may multiply q, k, both, or the logits; a factor per head moves to q. Masks are added or filled in (`masks.py`), several of them, in any view of the
logits that keeps rows and columns. Batches and heads may be one axis, or three. A row whose logits are all -inf yields 0, as the guards
`where(isnan(p), 0, p)` of exporters have it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import relax

from qcompiler.passes.graph import const, const_value, dtype_of, is_const, plain, relax_op, shape_of
from qcompiler.passes.kinds import KINDS
from qcompiler.passes.recognise.masks import Mask, filled, joined
from qcompiler.passes.recognise.miss import Miss
from qcompiler.passes.rewrite import Rewrite

_IN_ROWS = [0, 2, 1, 3]
_DEPTH = 12  # operators between a softmax and the product that makes its logits


@dataclass(frozen=True)
class _Logits:
    """softmax's operand as scale * q @ k + masks, all of them variables or constants of the old module. q [..., S, D], k [..., D, T].

    leads: leading axes (before rows and columns) of the views that the logits go through, the product's own first. factor: constant per head, or None.
    """

    q: Any
    k: Any
    scale: float
    masks: tuple[Mask, ...]
    leads: tuple[tuple[int, ...], ...]
    factor: np.ndarray | None = None


def attention(rewrite: Rewrite, name: str, expr: Any) -> Any:
    """The attention that ends in the product `name`; a `Miss` at its softmax when the file computes something else between two products."""
    product = rewrite.old[name]
    if relax_op(product) != "relax.matmul" or dtype_of(product) != "float32" or (found := _softmax(rewrite, product.args[0])) is None:
        return None
    at, softmax, between, guard = found
    if between is not None:
        return Miss(at, f"no attention: {between} stands between its softmax and the product with the values")
    rank = len(shape_of(softmax))
    if int(softmax.attrs.axis) % rank != rank - 1:
        return Miss(at, f"no attention: its softmax is over axis {int(softmax.attrs.axis) % rank} of {rank}, not over the last one")
    logits = _logits(rewrite, softmax.args[0], _DEPTH)
    if isinstance(logits, str):
        return Miss(at, f"no attention: {logits}")
    if guard is not None and not any(isinstance(m.value, relax.Var) and m.value.same_as(guard) for m in logits.masks):
        return Miss(at, "no attention: what sets its probabilities to 0 is not what is added to its logits")
    v = product.args[1]
    if len(shape_of(v)) < 2 or min(len(shape_of(logits.q)), len(shape_of(logits.k))) < 2:
        return Miss(at, "no attention: an operand is a vector")
    return _emit(rewrite, name, at, replace(logits, leads=(*logits.leads, shape_of(product)[:-2])), v)


def attention_in_rows(rewrite: Rewrite, name: str, expr: Any) -> Any:
    """permute_dims(permute_dims(attention)) --> attention, under the name of a value of the file."""
    if relax_op(expr) != "relax.permute_dims" or not rewrite.single_use(rewrite.old[name].args[0]):
        return None
    inner: Any = rewrite.value(expr.args[0])
    if relax_op(inner) != "relax.permute_dims" or plain(inner.attrs.axes) != _IN_ROWS or plain(expr.attrs.axes) != _IN_ROWS:
        return None
    found = rewrite.value(inner.args[0])
    return found if relax_op(found) in KINDS["attention"].relax else None


# -- reading -----------------------------------------------------------------------------------------------------------------------------


def _behind(rewrite: Rewrite, variable: Any) -> Any:
    """The old expression of a variable that the model file doesn't round to 8 bits; None for everything else."""
    known = isinstance(variable, relax.Var) and not rewrite.is_stated(str(variable.name))
    return rewrite.old.get(str(variable.name)) if known else None


def _keeps_rows(expr: Any) -> bool:
    """A reshape that keeps the last two axes."""
    return (
        relax_op(expr) == "relax.reshape"
        and shape_of(expr)[-2:] == shape_of(expr.args[0])[-2:]
        and min(map(len, (shape_of(expr), shape_of(expr.args[0])))) >= 2
    )


def _softmax(rewrite: Rewrite, variable: Any) -> tuple[str, Any, str | None, Any] | None:
    """(value id, call, what else stands behind it, what a guard against fully masked rows looks at) of the softmax that the left operand of a product comes
    from; None when there is none."""
    between = guard = None
    for _ in range(4):
        if not isinstance(variable, relax.Var):
            return None
        expr: Any = rewrite.old.get(str(variable.name))
        between = "a rounding to 8 bits, which the file asks for," if rewrite.is_stated(str(variable.name)) else between
        if relax_op(expr) == "relax.nn.softmax":
            return str(variable.name), expr, between, guard
        if expr is None or relax_op(expr) is None:
            return None
        if relax_op(expr) == "relax.where" and (found := _guard(rewrite, expr)) is not None:
            guard = None if found.same_as(expr.args[2]) else found
            variable = expr.args[2]
        elif _keeps_rows(expr):
            variable = expr.args[0]
        elif relax_op(expr) in ("relax.multiply", "relax.add", "relax.where", "relax.divide", "relax.subtract"):
            between = f"'{str(relax_op(expr)).removeprefix('relax.')}'"
            tensors = [a for a in expr.args if isinstance(a, relax.Var) and shape_of(a) == shape_of(expr)]
            if len(tensors) != 1:
                return None
            (variable,) = tensors
        else:
            return None
    return None


def _guard(rewrite: Rewrite, expr: Any) -> Any:
    """p of where(isnan(p), 0, p), m of where(max(m) == -inf, 0, p); None for another selection."""
    condition = _behind(rewrite, expr.args[0])
    if not is_const(expr.args[1]) or const_value(expr.args[1]).any() or not isinstance(expr.args[2], relax.Var):
        return None
    if relax_op(condition) == "relax.isnan" and condition.args[0].same_as(expr.args[2]):
        return expr.args[2]
    if relax_op(condition) == "relax.equal" and is_const(condition.args[1]) and (const_value(condition.args[1]) == -math.inf).all():
        largest = _behind(rewrite, condition.args[0])
        return largest.args[0] if relax_op(largest) == "relax.max" and isinstance(largest.args[0], relax.Var) else None
    return None


def _logits(rewrite: Rewrite, variable: Any, depth: int) -> _Logits | str:
    """What a softmax's operand is; else why it is no attention's."""
    expr, op = _behind(rewrite, variable), relax_op(_behind(rewrite, variable))
    if depth == 0 or expr is None or op is None:
        return "its logits are not computed from a product of queries and keys"
    shape = shape_of(expr)
    if op == "relax.matmul":
        q, k = expr.args
        if is_const(q) and is_const(k):
            return "its queries and keys are constants"
        if len(shape_of(q)) < 2 or len(shape_of(k)) < 2:
            return "its logits are a product with a vector"
        return _Logits(q, k, 1.0, (), (shape[:-2],))
    if op in ("relax.add", "relax.subtract"):
        return _plus(rewrite, expr, depth)
    if op == "relax.multiply" and is_const(expr.args[1]) and shape_of(expr.args[0]) == shape:
        found = _logits(rewrite, expr.args[0], depth - 1)
        factor = const_value(expr.args[1])
        if isinstance(found, str):
            return found
        if factor.size == 1:
            by = float(factor.reshape(-1)[0])
            return replace(found, scale=found.scale * by, masks=tuple(m.times(by) for m in found.masks), factor=found.factor)
        padded = factor.reshape((1,) * (len(shape) - factor.ndim) + factor.shape)
        if padded.shape[-2:] != (1, 1) or found.masks or found.factor is not None or found.leads != (shape[:-2],):
            return "its logits are multiplied by a constant that differs between rows or columns"
        return replace(found, factor=padded)
    if op == "relax.where":
        for fill, x, inverted in ((expr.args[1], expr.args[2], False), (expr.args[2], expr.args[1], True)):
            if is_const(fill) and isinstance(x, relax.Var):
                mask = filled(expr.args[0], const_value(fill), inverted, shape)
                found = _logits(rewrite, x, depth - 1)
                return found if isinstance(found, str) else mask if isinstance(mask, str) else replace(found, masks=(*found.masks, mask))
    if _keeps_rows(expr):
        found = _logits(rewrite, expr.args[0], depth - 1)
        return found if isinstance(found, str) else replace(found, leads=(*found.leads, shape[:-2]))
    return f"operator '{op.removeprefix('relax.').removeprefix('nn.')}' stands between its softmax and the product of queries and keys"


def _plus(rewrite: Rewrite, expr: Any, depth: int) -> _Logits | str:
    """Logits plus or minus something that broadcasts to them."""
    reasons = []
    left, right = expr.args
    minus = relax_op(expr) == "relax.subtract"
    for x, other in ((left, right),) if minus else ((left, right), (right, left)):
        if is_const(x) or shape_of(x) != shape_of(expr):
            continue
        found = _logits(rewrite, x, depth - 1)
        if isinstance(found, _Logits):
            return replace(found, masks=(*found.masks, Mask(other, shape_of(expr), factor=-1.0 if minus else 1.0)))
        reasons.append(found)
    return reasons[0] if reasons else "its logits are not computed from a product of queries and keys"


def _unscaled(rewrite: Rewrite, variable: Any, depth: int = 6) -> tuple[Any, float, list[Any]]:
    """(x, factor, views) with `variable` = views(factor * x): x of the old module, and reshapes and permutations, innermost first. Views without a factor
    behind them stay as they are."""
    expr: Any = _behind(rewrite, variable) if depth else None
    if relax_op(expr) == "relax.multiply" and is_const(expr.args[1]) and const_value(expr.args[1]).size == 1 and shape_of(expr.args[0]) == shape_of(expr):
        x, factor, views = _unscaled(rewrite, expr.args[0], depth - 1)
        return x, factor * float(const_value(expr.args[1]).reshape(-1)[0]), views
    if relax_op(expr) in ("relax.permute_dims", "relax.reshape") and isinstance(expr.args[0], relax.Var):
        x, factor, views = _unscaled(rewrite, expr.args[0], depth - 1)
        if factor != 1.0:
            return x, factor, [*views, expr]
    return variable, 1.0, []


# -- writing -----------------------------------------------------------------------------------------------------------------------------


def _heads(rewrite: Rewrite, found: _Logits, v: Any) -> tuple[int, int]:
    """(batch, heads) for leading axes of any number: as a view of the logits or the operands has them; a lone axis is heads where a permutation made it."""
    leads = list(found.leads)
    for operand in (found.q, found.k, v):
        expr = _behind(rewrite, operand)
        for _ in range(3):
            if relax_op(expr) not in ("relax.reshape", "relax.permute_dims"):
                break
            if _keeps_rows(expr):
                leads.append(shape_of(expr.args[0])[:-2])
            expr = _behind(rewrite, expr.args[0])
    total = math.prod(found.leads[0])
    pairs = [lead for lead in leads if len(lead) == 2 and math.prod(lead) == total]
    if pairs:
        return pairs[0]
    if len(found.leads[0]) > 1:
        return math.prod(found.leads[0][:-1]), found.leads[0][-1]
    made = relax_op(_behind(rewrite, found.q)) == "relax.permute_dims" or relax_op(_behind(rewrite, v)) == "relax.permute_dims"
    return (1, total) if made else (total, 1)


def _emit(rewrite: Rewrite, name: str, at: str, found: _Logits, v: Any) -> Any:
    lead = found.leads[0]
    batch, heads = _heads(rewrite, found, v)
    rows, columns, out = shape_of(found.q)[-2], shape_of(found.k)[-1], shape_of(v)[-1]
    if any(math.prod(view) != batch * heads for view in found.leads) or shape_of(v)[-2] != columns:
        return Miss(at, "no attention: the logits are not as many as pairs of queries and keys")
    scale, operands = found.scale, []
    for operand, what, order in ((found.q, "q", _IN_ROWS), (found.k, "k", [0, 3, 1, 2]), (v, "v", _IN_ROWS)):
        x, factor, views = (operand, 1.0, []) if what == "v" else _unscaled(rewrite, operand)
        scale *= factor
        value = rewrite.env.get(str(x.name), x) if isinstance(x, relax.Var) else x
        for view in views:
            moved = relax.op.reshape(value, shape_of(view)) if relax_op(view) == "relax.reshape" else relax.op.permute_dims(value, plain(view.attrs.axes))
            value = rewrite.interior(name, what, moved)
        operands.append(_in_order(rewrite, (name, what), value, lead, (batch, heads), order))
    if found.factor is not None:
        if math.prod(found.factor.shape[:-2]) != heads or found.factor.shape[-3] != heads:
            return Miss(at, "no attention: its logits are multiplied by a constant that differs between batches")
        operands[0] = rewrite.interior(name, "scaled", relax.op.multiply(operands[0], const(found.factor.reshape(1, 1, heads, 1).astype(np.float32))))
    bias = joined(rewrite, name, found.masks, (batch, heads, rows, columns))
    if isinstance(bias, str):
        return Miss(at, f"no attention: {bias}")
    call = rewrite.interior(name, "rows", relax.op.nn.attention(*operands, bias, scale=scale))
    swapped = relax.op.permute_dims(call, _IN_ROWS)
    shape = (*found.leads[-1], rows, out)
    return swapped if shape == (batch, heads, rows, out) else relax.op.reshape(rewrite.interior(name, "heads", swapped), shape)


def _in_order(rewrite: Rewrite, name: tuple[str, str], x: Any, lead: tuple[int, ...], heads: tuple[int, int], order: list[int]) -> Any:
    """[..., R, C], whose leading axes broadcast to `lead`, as [batch, head, R, C] with its axes in `order`. name: as of `interior`."""
    shape = shape_of(x)
    full = (*lead, *shape[-2:])
    if is_const(x):
        return const(np.ascontiguousarray(np.broadcast_to(const_value(x), full).reshape(*heads, *shape[-2:]).transpose(order)))
    if math.prod(shape) != math.prod(full):
        x = rewrite.interior(*name, relax.op.broadcast_to(x, full))
    if shape_of(x) != (*heads, *shape[-2:]):
        x = rewrite.interior(*name, relax.op.reshape(x, (*heads, *shape[-2:])))
    return rewrite.interior(*name, relax.op.permute_dims(x, order))
