"""Convolutions and dense layers of a float network become calls of our scheduled kernels, epilogue included.

    relu(conv2d(x, w) + b + r)      -->     qc.f32.conv2d(x, w, b, r) {low: 0}
    relu(matmul(x, w) + b)          -->     qc.f32.dense(x, w.T, b) {low: 0}
    prelu(conv2d(x, w) + b) + r     -->     prelu(qc.f32.conv2d(x, w, b)) + r
    matmul(x, w) + b, weights in 4 or 8 bits   -->   qc.f32.dense_weight_only(x, q, zero points, scales, b)
    split(x).1                      -->     strided_slice(x)            (a value per kernel)

Works on the canonical float module, in place of `insert_qdq` and `realize`; lowering must follow. The groups are those of the quantized
network, so the float twin and the integer network compute values of the same ids. Everything else stays Relax; `legal_layouts` follows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import tvm
from tvm import relax

from qcompiler.numerics.weight_only import WeightScheme, quantize_weight, weight_account, weight_row
from qcompiler.passes.graph import Graph, GraphBuilder, const, const_value, dtype_of, make_op, match_op, relax_op, shape_of, substitute
from qcompiler.passes.groups import Group, find_groups
from qcompiler.passes.trained import ATTRIBUTE

NO_LIMIT = float(np.finfo(np.float32).max)


def select_float(module: tvm.IRModule, weights: WeightScheme | None = None, keep: Collection[str] = ()) -> tvm.IRModule:
    """The float module with `qc.f32.*` calls.

    weights: dense layers, except for the groups in `keep`, get weights of this scheme, and the result's attribute `qc.weights` describes them.
    """
    graph, rows = Graph.of(module), list[dict[str, Any]]()
    owner = {m: g for g in find_groups(module) for m in g.members}
    kernels = {m: g for g in owner.values() if g.traits.float_kernel for m in g.front.members}
    builder = GraphBuilder({k: v for k, v in graph.attrs.items() if k != ATTRIBUTE})
    env = {str(p.name): builder.input(str(p.name), shape_of(p), dtype_of(p)) for p in graph.inputs}
    for name, expr in graph.bindings:
        group = owner[name]
        if (whole := kernels.get(name)) is not None:
            if name != whole.front.id:
                continue
            call = scheduled(whole.front, env.__getitem__)
            if weights is not None and whole.kind == "dense" and whole.id not in keep:
                call, row = weight_only(whole.id, call, weights)
                rows.append(row)
            env[name] = builder.emit(name, call)
            continue
        if relax_op(expr) == "relax.split" and group.kind == "slice":
            continue
        if isinstance(expr, relax.TupleGetItem) and group.kind == "slice":
            env[name] = builder.emit(name, sliced(group, env[group.inputs[0]]))
            continue
        env[name] = builder.emit(name, substitute(expr, lambda v: env[str(v.name)]))
    result = builder.finish([(name, env[str(v.name)]) for name, v in graph.outputs])
    return result if weights is None else tvm.IRModule({"main": result["main"].with_attr("qc.weights", weight_account(weights, rows))})


def sliced(group: Group, x: Any) -> Any:
    """The output of a split as a slice of `x`: a value of its own, with no tuple in between."""
    a = group.attrs
    return relax.op.strided_slice(x, list(range(len(a["begin"]))), a["begin"], a["end"], a["strides"])


def weight_only(name: str, plainly: Any, scheme: WeightScheme) -> tuple[Any, dict[str, Any]]:
    """(the `qc.f32.dense_weight_only` call in place of the `qc.f32.dense` of layer `name`, what the manifest says of its weights)."""
    _, (x, weight, bias, *residual), attrs = match_op(plainly) or ("", [], {})
    grouped = quantize_weight(const_value(weight), scheme, name)
    tensors = [x, const(grouped.q), const(grouped.zero_point), const(grouped.scale), bias, *residual]
    attrs = {**attrs, "bits": scheme.bits, "group_size": scheme.group_size}
    return make_op("qc.f32.dense_weight_only", tensors, attrs, shape_of(plainly), "float32"), weight_row(name, const_value(weight), grouped)


def scheduled(group: Group, value: Callable[[str], Any]) -> Any:
    """The `qc.f32.*` call of a conv2d or dense group without slopes (`Group.front`); `value` gives the float32 variable of a value id."""
    assert group.weight is not None and group.slopes is None
    weight = group.weight if group.weight_scale is None else group.weight * group.weight_scale.reshape(-1, *[1] * (group.weight.ndim - 1))
    bias = np.zeros(weight.shape[0]) if group.bias is None else group.bias
    tensors = [
        value(group.inputs[0]),
        const(weight.astype(np.float32, copy=False)),
        const(bias.astype(np.float32)),
        *([value(group.residual)] if group.residual else []),
    ]
    attrs = {**group.attrs, "low": -NO_LIMIT if group.low is None else group.low, "high": NO_LIMIT if group.high is None else group.high}
    return make_op(f"qc.f32.{group.kind}", tensors, attrs, group.shape, "float32")
