"""Walks a module with the reference arithmetic: the oracle for whole networks.

`qc.*` operators are computed by `qcompiler.numerics.operators`. Relax operators that stayed float (and the quantize/dequantize of a QDQ module) run as TVM
legalizes them, one operator at a time, on this machine; transposed convolutions in NHWC, which it can't legalize, are computed here in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import tvm
from tvm import relax

from qcompiler.base.errors import DataError
from qcompiler.numerics.operators import OPERATORS
from qcompiler.numerics.products import scatter
from qcompiler.passes.graph import Graph, arguments, const_value, dtype_of, is_const, match_op, plain, relax_op, shape_of
from qcompiler.passes.legalize import legalize


def run(module: tvm.IRModule, inputs: Mapping[str, np.ndarray], keep: str = "outputs") -> dict[str, np.ndarray]:
    """Execute `module` on {input name: array}.

    keep "outputs": {output name: array}. keep "all": {value id: array} for inputs and every binding that is a tensor.
    Raises DataError for an input that is missing or of another shape or dtype, ValueError for another `keep`.
    """
    if keep not in ("outputs", "all"):
        raise ValueError(f"keep is '{keep}'; it must be 'outputs' or 'all'")
    graph = Graph.of(module)
    values: dict[str, Any] = {str(p.name): _checked(p, inputs) for p in graph.inputs}

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
        elif relax_op(expr) == "relax.nn.conv2d_transpose" and str(expr.attrs.data_layout) == "NHWC":
            values[name] = _transposed(expr.attrs, *map(value, expr.args))
        else:
            values[name] = _legalized(expr, [value(a) for a in arguments(expr)])
    if keep == "all":
        return {name: v for name, v in values.items() if isinstance(v, np.ndarray)}
    return {name: values[str(v.name)] for name, v in graph.outputs}


def _checked(parameter: Any, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    name, wanted = str(parameter.name), (shape_of(parameter), dtype_of(parameter))
    if name not in inputs:
        raise DataError(f"input '{name}' is missing; given: {', '.join(map(repr, inputs)) or 'none'}")
    array = np.asarray(inputs[name])
    if (array.shape, str(array.dtype)) != wanted:
        raise DataError(f"input '{name}' is {array.dtype} {list(array.shape)}; wanted: {wanted[1]} {list(wanted[0])}")
    return array


def _transposed(attrs: Any, x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """`relax.nn.conv2d_transpose` of x [N,H,W,I], w [I,KH,KW,O/groups]."""
    strides, padding, extra, dilation = (plain(getattr(attrs, k)) for k in ("strides", "padding", "output_padding", "dilation"))
    groups = int(attrs.groups)
    parts = [part.transpose(3, 1, 2, 0) for part in np.split(w.astype(np.float64), groups)]
    return scatter(x.astype(np.float64), np.concatenate(parts), strides, padding, extra, dilation, groups).astype(np.float32)


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
        executable = relax.build(legalize(module), tvm.target.Target("llvm"))
        _CACHE[key] = relax.VirtualMachine(executable, tvm.cpu())
    result = _CACHE[key]["main"](*[tvm.runtime.tensor(np.ascontiguousarray(a).reshape(a.shape)) for a in operands])
    return [r.numpy() for r in result] if isinstance(expr.ty, relax.TupleType) else result.numpy()
