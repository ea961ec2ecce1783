"""An integer module with other constants in some of its calls: how corrected biases and weights rounded anew get into it.

qc.conv2d(x, w, bias, multiplier)    -->    qc.conv2d(x, w', bias', multiplier)
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tvm

from qcompiler.passes.graph import Graph, GraphBuilder, const, dtype_of, make_op, match_op, shape_of, substitute

WEIGHT, BIAS = 1, 2  # operands of every `qc.*` call that has weights


def replace_operands(module: tvm.IRModule, operands: Mapping[int, Mapping[str, np.ndarray]]) -> tvm.IRModule:
    """operands: {operand index: {value id of a `qc.*` call: array like the one it replaces}}."""
    graph = Graph.of(module)
    builder = GraphBuilder(graph.attrs)
    env = {str(p.name): builder.input(str(p.name), shape_of(p), dtype_of(p)) for p in graph.inputs}
    for name, expr in graph.bindings:
        changed = {i: arrays[name] for i, arrays in operands.items() if name in arrays}
        op = match_op(expr) if changed else None
        if op is not None:
            tensors = [const(changed[i]) if i in changed else t for i, t in enumerate(op[1])]
            expr = make_op(op[0], tensors, op[2], shape_of(expr), dtype_of(expr))
        env[name] = builder.emit(name, substitute(expr, lambda v: env[str(v.name)]))
    return builder.finish([(name, env[str(v.name)]) for name, v in graph.outputs])
