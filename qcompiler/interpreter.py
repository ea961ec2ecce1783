"""Walks a module with the reference arithmetic: the oracle for whole networks.

`qc.*` operators are computed by `qcompiler.numerics`. Relax operators that stayed float (and the quantize/dequantize of a QDQ module) run as TVM
legalizes them, one operator at a time, on this machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tvm
from tvm import relax

from qcompiler.numerics import OPERATORS
from qcompiler.passes.graph import Graph, arguments, const_value, is_const, match_op


def run(module: tvm.IRModule, inputs: Mapping[str, np.ndarray], keep: str = "outputs") -> dict[str, np.ndarray]:
    """Execute `module` on {input name: array}.

    keep "outputs": {output name: array}. keep "all": {value id: array} for inputs and every binding that is a tensor.
    """
    graph = Graph.of(module)
    values: dict[str, Any] = {str(p.name): np.asarray(inputs[str(p.name)]) for p in graph.inputs}

    def value(arg: Any) -> Any:
        return const_value(arg) if is_const(arg) else values[str(arg.name)]

    for name, expr in graph.bindings:
        op = match_op(expr)
        if op is not None:
            values[name] = OPERATORS[op[0]](*map(value, op[1]), **op[2])
        elif is_const(expr) or isinstance(expr, relax.Var):
            values[name] = value(expr)
        elif isinstance(expr, relax.TupleGetItem):
            values[name] = values[str(expr.tuple_value.name)][int(expr.index)]
        else:
            values[name] = _legalized(expr, [value(a) for a in arguments(expr)])
    if keep == "all":
        return {name: v for name, v in values.items() if isinstance(v, np.ndarray)}
    return {name: values[str(v.name)] for name, v in graph.outputs}


_CACHE: dict[str, Any] = {}


def _legalized(expr: Any, operands: list[np.ndarray]) -> Any:
    """One Relax operator, compiled alone. Constants become parameters, so that equal operators share code."""
    builder = relax.BlockBuilder()
    parameters = [relax.Var(f"p{i}", relax.TensorType(a.shape, str(a.dtype))) for i, a in enumerate(operands)]
    remaining = iter(parameters)

    def rebuilt(arg: Any) -> Any:
        if isinstance(arg, relax.Tuple):
            return relax.Tuple([rebuilt(f) for f in arg.fields])
        return next(remaining) if isinstance(arg, relax.Var) or is_const(arg) else arg

    with builder.function("main", parameters):
        call = tvm.ir.Call(expr.op, [rebuilt(a) for a in expr.args], expr.attrs, expr.ty_args)
        builder.emit_func_output(builder.emit(call))
    module = builder.get()
    key = str(module.script())
    if key not in _CACHE:
        executable = relax.build(relax.transform.LegalizeOps()(module), tvm.target.Target("llvm"))
        _CACHE[key] = relax.VirtualMachine(executable, tvm.cpu())
    result = _CACHE[key]["main"](*[tvm.runtime.tensor(np.ascontiguousarray(a).reshape(a.shape)) for a in operands])
    return [r.numpy() for r in result] if isinstance(expr.ty, relax.TupleType) else result.numpy()
