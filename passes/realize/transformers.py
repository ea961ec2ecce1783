"""Normalizations, attention, softmax, look-ups and products per channel: docs/numerics.md, sections 8 to 11.

q(layer_norm(dq(x), gamma, beta))   -->   qc.layer_norm(x, gain, shift)
q(attention(dq(q), dq(k), dq(v), bias))   -->   qc.attention(q, k, v, multipliers, bias or mask), heads packed side by side
q(softmax(dq(x)))   -->   qc.softmax(x)
q(take(table, ids))   -->   qc.gather(int8 table, ids, multiplier per row)
q(multiply(dq(x), factors))   -->   qc.requantize(x, multiplier per channel)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tvm import relax

from qcompiler.numerics.constants import (
    ATTENTION,
    MAX_BIAS,
    attention_bias,
    attention_multipliers,
    layer_norm_parameters,
    requantize_multiplier,
    rms_norm_parameters,
    softmax_parameters,
)
from qcompiler.numerics.spec import WEIGHT_HIGH
from qcompiler.passes.graph import const, const_value, dtype_of, is_const, make_op, relax_op, shape_of
from qcompiler.passes.realize.site import Site, typed

MASKED = -1e4  # what a bias adds at most to a key that does not count: exporters write -10^4, the least float of some type, or -inf
_ROWS = 1024  # of a table at a time


def rescale(site: Site) -> Any:
    x, y = site.inputs[0].params, site.quantized
    assert site.group.weight is not None
    multiplier = (site.group.weight.astype(np.float64) * float(requantize_multiplier(x.scale, y.scale)[0])).astype(np.float32)
    if (multiplier == multiplier[0]).all():
        multiplier = multiplier[:1]
    return site.call("qc.requantize", [site.inputs[0].expr, const(multiplier)], {"x_zero_point": x.zero_point, "zero_point": y.zero_point, **typed(y)})


def normalization(site: Site) -> Any:
    group, x, y = site.group, site.inputs[0].params, site.quantized
    assert group.weight is not None
    parameters = layer_norm_parameters if group.kind == "layer_norm" else rms_norm_parameters
    gain, shift, epsilon = parameters(group.weight, group.bias, group.attrs["epsilon"], x.scale, y.scale)
    attrs = {"epsilon": epsilon, "zero_point": y.zero_point, **typed(y), **({} if group.kind == "layer_norm" else {"x_zero_point": x.zero_point})}
    return site.call(f"qc.{group.kind}", [site.inputs[0].expr, const(gain), const(shift)], attrs)


def softmax(site: Site) -> Any:
    attrs = softmax_parameters(site.inputs[0].params.scale, site.quantized)
    return site.call("qc.softmax", [site.inputs[0].expr], attrs)


def gather(site: Site) -> Any:
    """A table of 8 bits with a scale per row: rows are as large as they are, and a whole table of one scale would lose the small ones."""
    group, y = site.group, site.quantized
    assert group.weight is not None
    peak = np.maximum(group.weight.max(axis=1), -group.weight.min(axis=1))
    scale = np.maximum(peak.astype(np.float64), 2.0**-100) / WEIGHT_HIGH
    table = np.empty(group.weight.shape, np.int8)
    for start in range(0, len(table), _ROWS):  # float64 in between: the whole table would take eight times what comes of it
        rows = slice(start, start + _ROWS)
        table[rows] = np.rint(group.weight[rows] / scale[rows, None])
    attrs = {"table_zero_point": 0, "zero_point": y.zero_point, **typed(y)}
    return site.call("qc.gather", [const(table), site.plain[0], const(requantize_multiplier(scale, y.scale))], attrs)


def attention(site: Site) -> Any:
    group, y = site.group, site.quantized
    q, k, v = site.inputs
    batch, rows, heads, size = shape_of(q.expr)
    keys, width = shape_of(k.expr)[1], shape_of(v.expr)[3]
    multiplier, out = attention_multipliers(group.attrs["scale"], q.params.scale, k.params.scale, v.params.scale, y.scale, heads)
    extras = _computed(site, multiplier, keys) if site.plain else {} if group.weight is None else _constant(group.weight, multiplier, keys)
    attrs: dict[str, Any] = {
        "heads": heads,
        "kv_heads": heads,
        "size": size,
        "value_size": width,
        "columns": [0, 0, 0],
        "zero_points": [q.params.zero_point, k.params.zero_point, v.params.zero_point],
        "zero_point": y.zero_point,
        **typed(y),
    }
    if extras:
        attrs["extra"] = list(extras)
    if "bias" in extras:
        attrs["bias_multipliers"] = [1]
    tensors = [site.packed(q, (batch, rows, heads * size)), site.packed(k, (batch, keys, heads * size)), site.packed(v, (batch, keys, heads * width))]
    call = make_op("qc.attention", [*tensors, const(multiplier), const(out), *extras.values()], attrs, (batch, rows, heads * width), y.dtype)
    return site.call("qc.reshape", [site.interior(group, "heads", call)], {"shape": list(group.shape)})


def _full(shape: Sequence[int], keys: int) -> tuple[int, int, int, int]:
    """[B', 1 or H, 1 or S, T] of a bias that broadcasts to that."""
    batch, heads, rows = (1,) * (4 - len(shape)) + tuple(shape[:-1])
    return batch, heads, rows, keys


def _constant(bias: np.ndarray, multiplier: np.ndarray, keys: int) -> dict[str, Any]:
    """The operands "mask" and "bias" of a bias that is known, as far as they say anything."""
    full = np.broadcast_to(bias.reshape((1,) * (4 - bias.ndim) + bias.shape), _full(bias.shape, keys))
    counts = full > MASKED
    extras = {} if counts.all() else {"mask": const(counts.astype(np.int8))}
    if full[counts].any():
        extras["bias"] = const(attention_bias(np.where(counts, full, 0), multiplier))
    return extras


def _computed(site: Site, multiplier: np.ndarray, keys: int) -> dict[str, Any]:
    """The same of a bias that is computed, by float operators: what is above -10^4, and rint(clip(bias / unit)) unless that is 0 wherever it counts."""

    def step(what: str, call: Any) -> Any:
        return site.once(site.group, what, call)

    (bias,) = site.plain
    full = _full(shape_of(bias), keys)
    if shape_of(bias) != full:
        ranked = step("bias", relax.op.reshape(bias, (1,) * (4 - len(shape_of(bias))) + shape_of(bias)))
        bias = ranked if shape_of(ranked) == full else step("bias", relax.op.broadcast_to(ranked, full))
    mask = step("mask", relax.op.astype(step("counts", relax.op.greater(bias, const(np.float32(MASKED)))), "int8"))
    if _hides_only(site.behind, site.group.plain[0]):
        return {"mask": mask}
    units = step("bias", relax.op.multiply(bias, const(np.float32(ATTENTION.steps / float(multiplier[0])))))
    whole = step("bias", relax.op.round(step("bias", relax.op.clip(units, -MAX_BIAS, MAX_BIAS))))
    return {"mask": mask, "bias": step("bias", relax.op.astype(whole, "int32"))}


def _hides_only(exprs: Mapping[str, Any], bias: Any) -> bool:
    """Is a value 0 or at most -10^4 everywhere, whatever the network's inputs are?"""
    if is_const(bias):
        return bool(((const_value(bias) == 0) | (const_value(bias) <= MASKED)).all())
    expr: Any = exprs.get(str(getattr(bias, "name", bias)))
    match relax_op(expr):
        case "relax.where":
            return all(_hides_only(exprs, a) for a in expr.args[1:])
        case "relax.add" | "relax.minimum":
            return all(_hides_only(exprs, a) for a in expr.args)
        case "relax.multiply":
            return is_const(expr.args[1]) and bool((const_value(expr.args[1]) <= MASKED).all()) and _is_bit(exprs, expr.args[0])
        case "relax.reshape" | "relax.broadcast_to" | "relax.permute_dims" | "relax.expand_dims":
            return _hides_only(exprs, expr.args[0])
    return False


def _is_bit(exprs: Mapping[str, Any], value: Any) -> bool:
    """Is a value 0 or 1 everywhere?"""
    if is_const(value):
        return bool(np.isin(const_value(value), (0, 1)).all())
    if not isinstance(value, relax.Var) or dtype_of(value) == "bool":
        return isinstance(value, relax.Var)
    expr: Any = exprs.get(str(value.name))
    match relax_op(expr):
        case "relax.subtract":
            return is_const(expr.args[0]) and bool((const_value(expr.args[0]) == 1).all()) and _is_bit(exprs, expr.args[1])
        case "relax.astype" | "relax.reshape" | "relax.broadcast_to" | "relax.permute_dims" | "relax.expand_dims":
            return _is_bit(exprs, expr.args[0])
    return False
