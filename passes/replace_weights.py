"""Convolutions, dense layers and layer normalizations with other constants: how channel equalization (`qcompiler/refine/equalization.py`) changes a network.

    conv2d(x, w) + b -> clip      -->      conv2d(x, w') + b' -> clip
    conv2d(x, w) -> clip          -->      conv2d(x, w') + b' -> clip
    layer_norm(x, gamma, beta)    -->      layer_norm(x, gamma', beta')
    multiply(x, factors)          -->      multiply(x, factors')          (a rescale group)

Works on the canonical float module, whose groups keep their ids, members but for the new bias, and shapes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tvm
from tvm import relax

from qcompiler.passes.constants import constant_of
from qcompiler.passes.graph import Graph, GraphBuilder, const, dtype_of, relax_op, shape_of, substitute
from qcompiler.passes.groups import Group, find_groups
from qcompiler.passes.layer_norms import LAYER_NORM


def replace_weights(module: tvm.IRModule, layers: Mapping[str, tuple[np.ndarray, ...]]) -> tvm.IRModule:
    """layers: group id -> (float32 weight like `Group.weight`, bias [O]) of conv2d and dense groups; (gamma, beta) of `layer_norms`; (factors,) of rescale."""
    graph = Graph.of(module)
    values = graph.values()
    owner = {m: g for g in find_groups(module) if g.id in layers for m in g.members}
    builder = GraphBuilder(graph.attrs)
    builder.reserve(values)
    env: dict[str, Any] = {str(p.name): builder.input(str(p.name), shape_of(p), dtype_of(p)) for p in graph.inputs}
    last = {owner[n].id: n for n, e in graph.bindings if n in owner and _beside_constant(e, values) is not None}  # where the whole bias is added
    for name, expr in graph.bindings:
        group = owner.get(name)
        if group is None:
            env[name] = builder.emit(name, substitute(expr, lambda v: env[str(v.name)]))
            continue
        if group.traits.restates:
            (data,) = (a for a in expr.args if isinstance(a, relax.Var))
            env[name] = builder.emit(name, relax.op.multiply(env[str(data.name)], const(layers[group.id][0])))
            continue
        weight, bias = layers[group.id]
        offset = const(bias.astype(np.float32))
        if relax_op(expr) == LAYER_NORM:
            env[name] = builder.emit(name, tvm.ir.Call(expr.op, [env[str(expr.args[0].name)], const(weight), offset], expr.attrs, expr.ty_args))
        elif relax_op(expr) in group.traits.relax:
            product = tvm.ir.Call(expr.op, [env[str(expr.args[0].name)], _in_relax_form(weight, group, expr.args[1])], expr.attrs, expr.ty_args)
            if group.bias is not None:
                env[name] = builder.emit(name, product)
                continue
            variable = builder.emit(builder.made(name, "unbiased"), product)
            env[name] = builder.emit(name, relax.op.add(variable, offset))
        elif (data := _beside_constant(expr, values)) is not None:
            env[name] = builder.emit(name, relax.op.add(env[str(data.name)], offset)) if name == last[group.id] else env[str(data.name)]
        else:
            env[name] = builder.emit(name, substitute(expr, lambda v: env[str(v.name)]))
    return builder.finish([(name, env[str(v.name)]) for name, v in graph.outputs])


def _in_relax_form(weight: np.ndarray, group: Group, like: Any) -> Any:
    shape = shape_of(like)
    return const(np.ascontiguousarray(weight.T.reshape(shape) if group.kind == "dense" else weight.reshape(shape), np.float32))


def _beside_constant(expr: Any, values: Mapping[str, Any]) -> Any:
    """The tensor to which `expr` adds a constant, or from which it subtracts one; None for anything else."""
    if relax_op(expr) not in ("relax.add", "relax.subtract"):
        return None
    left, right = expr.args
    for data, other in ((left, right), (right, left)):
        if isinstance(data, relax.Var) and constant_of(other, values, evaluate=False) is not None and constant_of(data, values, evaluate=False) is None:
            return data
    return None
