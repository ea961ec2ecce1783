"""Computes, once, what depends on constants only.

    y = add(reshape(const), const)  -->  readers of y read a constant

The importer leaves few of these (interiors of operators that Relax's importer decomposes). Runs first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import relax

from qcompiler.passes.graph import GraphBuilder, const, const_value, is_const, plain, relax_op, shape_of
from qcompiler.passes.legalize import legalize
from qcompiler.passes.rewrite import Rewrite

_NUMPY: dict[str, Callable[..., np.ndarray]] = {
    "relax.add": np.add,
    "relax.subtract": np.subtract,
    "relax.multiply": np.multiply,
    "relax.maximum": np.maximum,
    "relax.minimum": np.minimum,
    "relax.sqrt": np.sqrt,
    "relax.negative": np.negative,
}
_LARGEST = 1 << 26  # elements; a larger constant is left to be computed when run


def fold_constants(module: tvm.IRModule) -> tvm.IRModule:
    """Replace each tensor-valued binding whose operands are all constants by its value."""
    rewrite = Rewrite(module)
    for name, expr in rewrite:
        if is_const(expr) and "<output>" not in rewrite.uses[name]:
            rewrite.replace(name, expr)
        elif relax_op(expr) == "relax.shape_to_tensor" and relax_op(rewrite.value(expr.args[0])) == "relax.shape_of":
            rewrite.replace(name, const(np.asarray(shape_of(rewrite.value(expr.args[0]).args[0]), np.int64)))
        elif _foldable(expr):
            rewrite.replace(name, const(_evaluate(expr)))
        else:
            rewrite.keep(name, expr)
    return rewrite.done()


_MAKERS = ("relax.zeros", "relax.ones", "relax.full", "relax.arange")  # need no operand


def _foldable(expr: Any) -> bool:
    if relax_op(expr) is None:
        return False
    operands = [f for a in expr.args for f in (a.fields if isinstance(a, relax.Tuple) else [a])]
    if any(isinstance(o, relax.Var) for o in operands) or not (any(is_const(o) for o in operands) or relax_op(expr) in _MAKERS):
        return False
    typed = relax.BlockBuilder().normalize(expr)
    return isinstance(typed.ty, relax.TensorType) and 0 < int(np.prod(shape_of(typed), dtype=np.int64)) <= _LARGEST


def _evaluate(expr: Any) -> np.ndarray:
    op, shape = str(relax_op(expr)), shape_of(relax.BlockBuilder().normalize(expr))
    arrays = [const_value(a) for a in expr.args if is_const(a)]
    if op == "relax.reshape":
        return arrays[0].reshape(shape)
    if op == "relax.permute_dims":
        axes = plain(expr.attrs.axes)
        return arrays[0].transpose(axes)
    if op in _NUMPY and len(arrays) == len(expr.args):
        return np.asarray(_NUMPY[op](*arrays))
    builder = GraphBuilder()
    module = builder.finish([("y", builder.emit("y", expr))])
    built = relax.build(legalize(module), "llvm")
    return np.asarray(relax.VirtualMachine(built, tvm.cpu())["main"]()[0].numpy())
