"""Layout changes at the network's edges cost nothing extra: quantize and dequantize walk the tensor anyway.

    transpose(quantize(x))       -->   qc.quantize(x, axes)             likewise quantize(permute_dims(x))
    dequantize(transpose(q))     -->   qc.dequantize(q, axes)           likewise permute_dims(dequantize(q))

Follows `realize`. The inner value must have no other reader.
"""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax

from qcompiler.passes.graph import Graph, GraphBuilder, dtype_of, make_op, match_op, plain, relax_op, shape_of, substitute


def fuse_edges(module: tvm.IRModule) -> tvm.IRModule:
    graph = Graph.of(module)
    exprs, uses = graph.values(), graph.consumers()
    builder = GraphBuilder(graph.attrs)
    env = {str(p.name): builder.input(str(p.name), shape_of(p), dtype_of(p)) for p in graph.inputs}
    for name, expr in graph.bindings:
        fused = _fuse(expr, exprs, uses)
        env[name] = builder.emit(name, substitute(expr if fused is None else fused, lambda v: env[str(v.name)]))
    return builder.finish([(name, env[str(v.name)]) for name, v in graph.outputs])


def _fuse(expr: Any, exprs: dict[str, Any], uses: dict[str, list[str]]) -> Any | None:
    outer = _step(expr)
    if outer is None or not isinstance(outer[1], relax.Var):
        return None
    inner_name = str(outer[1].name)
    inner = _step(exprs.get(inner_name))
    if inner is None or len(uses[inner_name]) != 1:
        return None
    kinds = (outer[0], inner[0])
    if kinds in (("transpose", "qc.quantize"), ("qc.dequantize", "transpose")) or (kinds in (("qc.quantize", "transpose"), ("transpose", "qc.dequantize"))):
        edge, transpose = (inner, outer) if outer[0] == "transpose" else (outer, inner)
        if "axes" in edge[2]:
            return None
        return make_op(edge[0], [inner[1]], {**edge[2], "axes": transpose[2]["axes"]}, shape_of(expr), dtype_of(expr))
    return None


def _step(expr: Any) -> tuple[str, Any, dict[str, Any]] | None:
    """("transpose" | "qc.quantize" | "qc.dequantize", operand, attributes), or None."""
    if relax_op(expr) == "relax.permute_dims":
        axes = plain(expr.attrs.axes)
        return "transpose", expr.args[0], {"axes": list(range(len(expr.ty.shape)))[::-1] if axes is None else axes}
    op = match_op(expr)
    if op is None or op[0] not in ("qc.transpose", "qc.quantize", "qc.dequantize"):
        return None
    return op[0].replace("qc.transpose", "transpose"), op[1][0], op[2]
