"""Operators that are a group alone and have constants of their own: what they state, by the names of `Group`'s fields, and why some have no integer form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from tvm import relax

from qcompiler.numerics.constants import MAX_KEYS, MAX_LOGIT, MAX_NORMALIZED
from qcompiler.numerics.recurrence import BOUNDED, MAX_HIDDEN
from qcompiler.passes.graph import const_value, dtype_of, is_const, match_op, plain, relax_op, shape_of
from qcompiler.passes.kinds import KINDS

_KIND = {op: kind.name for kind in KINDS.values() if kind.alone for op in kind.relax}


def attention_scale(call: Any) -> float:
    """What a `relax.nn.attention` multiplies its logits with; Relax's default is the inverse root of the queries' width."""
    scale = call.attrs.scale
    return shape_of(call.args[0])[-1] ** -0.5 if scale is None else float(scale.value)


def counted_from_the_end(values: Mapping[str, Any], index: Any, size: int) -> tuple[Any, tuple[str, ...]] | None:
    """(i, the bindings between) for an index that is where(i < 0, i + size, i), as imports spell ONNX's negative indices; `qc.gather` reads i itself."""
    names = (str(index.name),) if isinstance(index, relax.Var) else ()
    chosen: Any = values.get(names[0]) if names else None
    if relax_op(chosen) != "relax.where" or any(not isinstance(a, relax.Var) for a in chosen.args):
        return None
    i, spelled = chosen.args[2], (("relax.less", 0), ("relax.add", size))
    for variable, (op, constant) in zip(chosen.args[:2], spelled, strict=True):
        inner: Any = values.get(str(variable.name))
        if relax_op(inner) != op or not inner.args[0].same_as(i) or not is_const(inner.args[1]) or (const_value(inner.args[1]) != constant).any():
            return None
    return i, (str(chosen.args[0].name), str(chosen.args[1].name), *names)


def describe_alone(expr: Any) -> dict[str, Any] | None:
    """kind, attrs, weight, bias and reason of a call; None for other operators, and where what should be constant isn't (or the other way round)."""
    if (own := match_op(expr)) is not None:
        return _recurrence(own[1], own[2]) if own[0] == "qc.f32.recurrence" else None
    kind = _KIND.get(str(relax_op(expr)))
    if kind is None or dtype_of(expr) != "float32":
        return None
    a, rank = expr.attrs, len(shape_of(expr))
    constants = [const_value(v) if is_const(v) else None for v in expr.args]
    match kind:
        case "attention":
            fits = all(c is None for c in constants[:3]) and a.causal_mask is None and a.window_size is None
            found: dict[str, Any] = {"attrs": {"scale": attention_scale(expr)}, "weight": constants[3] if len(constants) > 3 else None}
            keys, size = shape_of(expr.args[1])[1], shape_of(expr.args[0])[3]
            if keys > MAX_KEYS or 255 * 255 * size > MAX_LOGIT // 2:
                most = f"up to {MAX_KEYS} keys of {MAX_LOGIT // 2 // 255**2}"
                found["reason"] = f"attention over {keys} keys of {size} channels has no integer form; supported: {most}"
        case "softmax":
            fits, found = constants[0] is None, {"attrs": {"axis": int(a.axis) % rank}}
            if found["attrs"]["axis"] != rank - 1:
                found["reason"] = "softmax has an integer form over the last axis only"
        case "take":
            table, axis = constants[0], int(a.axis or 0)
            fits = table is not None and constants[1] is None and a.axis is not None
            found = {"weight": table, "attrs": {"axis": axis, "mode": str(a.mode)}}
            if table is not None and (table.ndim != 2 or axis != 0 or dtype_of(expr.args[1]) not in ("int32", "int64")):
                found["reason"] = "a look-up has an integer form for rows of a table [entries, channels] by int32 or int64 only"
        case _:
            axes = [axis % rank for axis in plain(a.axes)]
            fits = constants[0] is None and all(c is not None for c in constants[1:]) and len(axes) == 1
            beta = None if len(constants) < 3 or constants[2] is None else constants[2].astype(np.float64)
            found = {"weight": constants[1], "bias": beta, "attrs": {"axis": axes[0], "epsilon": float(a.epsilon)}}
            if axes[0] != rank - 1 or shape_of(expr)[-1] > MAX_NORMALIZED:
                found["reason"] = f"a normalization has an integer form over the last axis only, of up to {MAX_NORMALIZED} channels"
    return {"kind": kind, "reason": None, **found} if fits else None


def _recurrence(operands: list[Any], attrs: dict[str, Any]) -> dict[str, Any] | None:
    projection, weight, bias = operands[:3]
    if is_const(projection):
        return None
    unbounded = [f for f in attrs["activations"] if f not in BOUNDED]
    reason = None
    if unbounded:
        reason = f"activation '{unbounded[0]}' of a recurrent layer has no integer form, as nothing bounds its state; supported: {', '.join(BOUNDED)}"
    elif const_value(weight).shape[1] > MAX_HIDDEN:
        reason = f"a recurrent layer has an integer form of up to {MAX_HIDDEN} hidden elements"
    return {
        "kind": "recurrence",
        "weight": const_value(weight),
        "bias": const_value(bias).astype(np.float64),
        "attrs": {**attrs, "rest": [const_value(v) if is_const(v) else v for v in operands[3:]]},
        "reason": reason,
    }
