"""Operators that are a group alone and have constants of their own: what they state, by the names of `Group`'s fields."""

from __future__ import annotations

from typing import Any

import numpy as np

from qcompiler.passes.graph import const_value, dtype_of, is_const, plain, relax_op, shape_of
from qcompiler.passes.kinds import KINDS

_KIND = {op: kind.name for kind in KINDS.values() if kind.alone for op in kind.relax}


def attention_scale(call: Any) -> float:
    """What a `relax.nn.attention` multiplies its logits with; Relax's default is the inverse root of the queries' width."""
    scale = call.attrs.scale
    return shape_of(call.args[0])[-1] ** -0.5 if scale is None else float(scale.value)


def describe_alone(expr: Any) -> dict[str, Any] | None:
    """kind, attrs, weight and bias of a call; None for other operators, and where what should be constant isn't (or the other way round)."""
    kind = _KIND.get(str(relax_op(expr)))
    if kind is None or dtype_of(expr) != "float32":
        return None
    a, rank = expr.attrs, len(shape_of(expr))
    constants = [const_value(v) if is_const(v) else None for v in expr.args]
    match kind:
        case "attention":
            fits = all(c is None for c in constants[:3]) and a.causal_mask is None and a.window_size is None
            found: dict[str, Any] = {"attrs": {"scale": attention_scale(expr)}, "weight": constants[3] if len(constants) > 3 else None}
        case "softmax":
            fits, found = constants[0] is None, {"attrs": {"axis": int(a.axis) % rank}}
        case "take":
            fits = constants[0] is not None and constants[1] is None and a.axis is not None
            found = {"weight": constants[0], "attrs": {"axis": int(a.axis or 0), "mode": str(a.mode)}}
        case _:
            axes = [axis % rank for axis in plain(a.axes)]
            fits = constants[0] is None and all(c is not None for c in constants[1:]) and len(axes) == 1
            beta = None if len(constants) < 3 or constants[2] is None else constants[2].astype(np.float64)
            found = {"weight": constants[1], "bias": beta, "attrs": {"axis": axes[0], "epsilon": float(a.epsilon)}}
    return {"kind": kind, **found} if fits else None
