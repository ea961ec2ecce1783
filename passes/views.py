"""Reshapes of float tensors become the operator that lowering turns into a shared buffer instead of a copy.

    relax.reshape(x) and its kin  -->  qc.reshape(x)

Follows whatever else rewrites Relax operators; `legalize` follows.
"""

from __future__ import annotations

import tvm

from qcompiler.passes.graph import Graph, GraphBuilder, dtype_of, is_const, make_op, relax_op, shape_of, substitute
from qcompiler.passes.kinds import KINDS

VIEWS = {op for kind in KINDS.values() if kind.views for op in kind.relax}


def views_to_reshape(module: tvm.IRModule) -> tvm.IRModule:
    graph = Graph.of(module)
    builder = GraphBuilder(graph.attrs)
    env = {str(p.name): builder.input(str(p.name), shape_of(p), dtype_of(p)) for p in graph.inputs}
    for name, expr in graph.bindings:
        new = substitute(expr, lambda v: env[str(v.name)])
        if relax_op(expr) in VIEWS and not is_const(expr.args[0]):
            new = make_op("qc.reshape", [new.args[0]], {"shape": list(shape_of(expr))}, shape_of(expr), dtype_of(expr))
        env[name] = builder.emit(name, new)
    return builder.finish([(name, env[str(v.name)]) for name, v in graph.outputs])
