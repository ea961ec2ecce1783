"""What an integer module says of its values, reduced to those that it still has. Follows every pass that may take one out.

    qc.params {value id: [scale, zero_point]}, qc.float_ops {value id: why it stayed float}

A layout change that became part of a qc.quantize or qc.dequantize is no operator that stayed float.
"""

from __future__ import annotations

from typing import Any

import tvm

from qcompiler.passes.graph import ANY_TYPE, Graph, match_op


def settle_account(module: tvm.IRModule) -> tvm.IRModule:
    graph = Graph.of(module)
    values = graph.values()
    floats = {k: v for k, v in graph.attrs.get("qc.float_ops", {}).items() if k in values and _is_float(values[k])}
    there = {*values, *(str(p.name) for p in graph.inputs)}
    params = {k: v for k, v in graph.attrs.get("qc.params", {}).items() if k in there}
    return tvm.IRModule({"main": module["main"].with_attr("qc.float_ops", floats).with_attr("qc.params", params)})


def _is_float(expr: Any) -> bool:
    op = match_op(expr)
    return op is None or op[0].startswith("qc.f32.") or op[0] in ANY_TYPE
