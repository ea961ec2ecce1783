"""Float operators that stay Relax become calls of our kernels, where there is one.

    nn.softmax(x)  -->  qc.f32.softmax(x)        add(x, y)  -->  qc.f32.pointwise(x, y) {function: add}        permute_dims(x)  -->  qc.transpose(x)

What has none stays Relax, for `legalize`. For CPUs, inside of lowering: the oracle and the passes before see Relax operators.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tvm
from tvm import relax

from qcompiler.passes.alone import describe_alone
from qcompiler.passes.graph import Graph, GraphBuilder, arguments, const_value, dtype_of, is_const, make_op, plain, relax_op, shape_of, substitute
from qcompiler.passes.kinds import KINDS
from qcompiler.passes.single_ops import Described, describe

Found = tuple[str, list[Any], dict[str, Any]]  # operator, operands, attributes

_POINTWISE = "add subtract multiply divide maximum minimum sqrt rsqrt square abs negative exp sigmoid tanh erf nn.relu nn.silu nn.gelu nn.gelu_tanh".split()
_LARGEST = 2**31 - 1  # elements: indices are int32


def select_kernels(module: tvm.IRModule) -> tvm.IRModule:
    graph = Graph.of(module)
    builder = GraphBuilder(graph.attrs)
    env = {str(p.name): builder.input(str(p.name), shape_of(p), dtype_of(p)) for p in graph.inputs}
    for name, expr in graph.bindings:
        new = substitute(expr, lambda v: env[str(v.name)])
        op = str(relax_op(expr))
        if op in _RULES and dtype_of(expr) == "float32" and (found := _RULES[op](expr)) is not None and _fits(expr, found):
            operands = [env[str(a.name)] if isinstance(a, relax.Var) else a for a in found[1]]
            new = make_op(found[0], operands, found[2], shape_of(expr), "float32")
        env[name] = builder.emit(name, new)
    return builder.finish([(name, env[str(v.name)]) for name, v in graph.outputs])


def _fits(expr: Any, found: Found) -> bool:
    """Something is computed at run time, from float32 tensors (or looked up)."""
    tensors = [a for a in found[1] if isinstance(a, relax.Var)]
    floats = found[0] == "qc.f32.take" or all(dtype_of(a) == "float32" for a in found[1])
    return bool(tensors) and floats and all(0 < math.prod(shape_of(a)) <= _LARGEST for a in [expr, *tensors])


def _pointwise(function: str) -> Callable[[Any], Found]:
    return lambda expr: ("qc.f32.pointwise", list(expr.args), {"function": function})


def _clip(expr: Any) -> Found:
    low, high = (float(plain(a)) for a in expr.args[1:])
    return "qc.f32.pointwise", [expr.args[0]], {"function": "clip", "low": low, "high": high}


def _leaky(expr: Any) -> Found:
    return "qc.f32.pointwise", [expr.args[0]], {"function": "leakyrelu", "alpha": float(expr.attrs.alpha)}


def _power(expr: Any) -> Found | None:
    """Of constant exponents, those that are a product."""
    exponent = const_value(expr.args[1]) if is_const(expr.args[1]) else None
    function = None if exponent is None or exponent.size != 1 else {2.0: "square", 3.0: "cube"}.get(float(exponent.reshape(())))
    return ("qc.f32.pointwise", [expr.args[0]], {"function": function}) if function and shape_of(expr.args[0]) == shape_of(expr) else None


def _copy(expr: Any) -> Found:
    return "qc.f32.pointwise", [expr.args[0]], {"function": "copy"}


def _reduce(function: str) -> Callable[[Any], Found | None]:
    """Adjacent axes only."""

    def rule(expr: Any) -> Found | None:
        rank = len(shape_of(expr.args[0]))
        axes = list(range(rank)) if expr.attrs.axis is None else sorted(a % rank for a in plain(expr.attrs.axis))
        if not axes or axes != list(range(axes[0], axes[-1] + 1)):
            return None
        return "qc.f32.reduce", [expr.args[0]], {"function": function, "first": axes[0], "last": axes[-1] + 1}

    return rule


def _alone(expr: Any) -> Found | None:
    found = describe_alone(expr)
    if found is None:
        return None
    kind, attrs = found["kind"], found["attrs"]
    if kind == "take":
        if attrs["axis"] != 0 or attrs["mode"] != "clip" or dtype_of(expr.args[1]) not in ("int32", "int64"):
            return None
    elif "axis" in attrs and attrs["axis"] != len(shape_of(expr)) - 1:
        return None
    return f"qc.f32.{kind}", list(expr.args), {k: v for k, v in attrs.items() if k not in ("axis", "mode")}


def _group_norm(expr: Any) -> Found | None:
    """Of groups of the innermost channels, over all axes but the outermost."""
    a, shape = expr.attrs, shape_of(expr)
    rank, axes = len(shape), {axis % len(shape) for axis in plain(expr.attrs.axes)}
    pixels = all(axis in axes or shape[axis] == 1 for axis in range(1, rank - 1))  # an image of height 1 may be a signal, whose height nobody names
    fits = rank > 2 and pixels and axes <= set(range(1, rank - 1)) and int(a.channel_axis) % rank == rank - 1 and all(map(is_const, expr.args[1:]))
    return ("qc.f32.group_norm", list(expr.args), {"groups": int(a.num_groups), "epsilon": float(a.epsilon)}) if fits else None


def _concat(expr: Any) -> Found:
    return "qc.concat", arguments(expr), {"axis": int(expr.attrs.axis or 0) % len(shape_of(expr))}


def _product(expr: Any) -> Found | None:
    """Vectors have a form of their own."""
    return ("qc.f32.matmul", list(expr.args), {}) if min(len(shape_of(a)) for a in expr.args) > 1 and not any(0 in shape_of(a) for a in expr.args) else None


def _moved(expr: Any) -> Found | None:
    found = describe(expr)
    if not isinstance(found, Described) or any(is_const(o) for o in found.operands):
        return None
    return f"qc.{found.kind}", found.operands, found.attrs


_RULES: dict[str, Callable[[Any], Found | None]] = {
    **{f"relax.{op}": _pointwise(op.removeprefix("nn.")) for op in _POINTWISE},
    "relax.clip": _clip,
    "relax.nn.leakyrelu": _leaky,
    "relax.power": _power,
    "relax.broadcast_to": _copy,
    **{f"relax.{function}": _reduce(function) for function in ("mean", "variance", "sum", "max", "min")},
    **{op: _alone for kind in KINDS.values() if kind.alone for op in kind.relax},
    **dict.fromkeys(("relax.permute_dims", "relax.strided_slice", "relax.nn.pad"), _moved),
    "relax.nn.group_norm": _group_norm,
    "relax.concat": _concat,
    "relax.matmul": _product,
}
