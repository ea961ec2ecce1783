"""Products with constant matrices in a row are one, where that takes fewer multiplications; columns of a product that nobody reads are not computed.

    slice(reshape(x @ A))              -->  reshape(x @ A[:, read])
    reshape(slice(x @ A)) @ B          -->  reshape(x @ (A[:, read] @ B))

So a Fourier transform of which the real parts alone are read takes half the work, and with a filter bank behind it almost none; layers without an activation
between them, and factors of a matrix that is small, are one layer. Constants are multiplied in float64 and rounded once. Networks that state roundings are
left as they are. Follows recognise.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tvm
from tvm import relax

from qcompiler.passes.graph import const, const_value, is_const, relax_op, shape_of, slice_ranges
from qcompiler.passes.rewrite import Rewrite


def products(module: tvm.IRModule) -> tvm.IRModule:
    rewrite = Rewrite(module)
    if rewrite.trained:
        return module
    made = set[str]()  # products that a slice left, which one view reads
    for name, expr in rewrite:
        found = None
        if relax_op(expr) == "relax.strided_slice":
            found = _columns(rewrite, made, expr)
        elif _by_matrix(expr):
            found = _product(rewrite, made, expr)
        if found is not None:
            x, matrix = found
            product = rewrite.interior(name, "product", relax.op.matmul(x, const(matrix)))
            made.add(str(product.name))
            expr = relax.op.reshape(product, shape_of(rewrite.old[name]))
        rewrite.keep(name, expr)
    return rewrite.done()


def _by_matrix(expr: Any) -> bool:
    """A product of computed rows with a constant matrix?"""
    if relax_op(expr) != "relax.matmul" or is_const(expr.args[0]) or not is_const(expr.args[1]):
        return False
    return len(shape_of(expr.args[1])) == 2 and len(shape_of(expr.args[0])) > 1


def _product(rewrite: Rewrite, made: set[str], expr: Any) -> tuple[Any, np.ndarray] | None:
    """x and A @ B, where `expr` is a product of all of x @ A with B."""
    found, second = _traced(rewrite, made, expr.args[0]), const_value(expr.args[1])
    if found is None or found[2].size != len(second) or found[2].shape[-1] != len(second):
        return None
    x, first, read = found
    if first.shape[0] * second.shape[1] > first.size + second.size:
        return None
    return x, (first[:, read.reshape(-1)].astype(np.float64) @ second.astype(np.float64)).astype(np.float32)


def _columns(rewrite: Rewrite, made: set[str], expr: Any) -> tuple[Any, np.ndarray] | None:
    """x and the columns of A that a slice of x @ A reads."""
    found = _traced(rewrite, made, expr.args[0])
    read = None if found is None else _sliced(found[2], expr)
    if found is None or read is None or read.size == found[1].shape[1]:
        return None
    return found[0], np.ascontiguousarray(found[1][:, read.reshape(-1)])


def _traced(rewrite: Rewrite, made: set[str], value: Any) -> tuple[Any, np.ndarray, np.ndarray] | None:
    """(x, A, columns) where `value`, which has one reader, holds of every row of x @ A the columns listed, in the shape that they have there."""
    steps: list[tuple[Any, tuple[int, ...]]] = []
    while (expr := rewrite.values.get(str(value.name)) if isinstance(value, relax.Var) else None) is not None:
        if not (rewrite.single_use(value) or str(value.name) in made):
            return None
        if _by_matrix(expr):
            read: np.ndarray = np.arange(shape_of(value)[-1])
            for step, shape in reversed(steps):
                found = _sliced(read, step) if relax_op(step) == "relax.strided_slice" else _within(read, shape)
                if found is None:
                    return None
                read = found
            return expr.args[0], const_value(expr.args[1]), read
        if relax_op(expr) not in ("relax.reshape", "relax.strided_slice"):
            return None
        steps.append((expr, shape_of(value)))
        value = expr.args[0]
    return None


def _within(read: np.ndarray, shape: tuple[int, ...]) -> np.ndarray | None:
    """What is read of a row, in the axes of `shape` that lie within rows; None where none of its axes ends with them."""
    ends = [k for k in range(len(shape)) if math.prod(shape[k:]) == read.size]
    return read.reshape(shape[ends[0] :]) if ends else None


def _sliced(read: np.ndarray, expr: Any) -> np.ndarray | None:
    """What a slice leaves of a row; None where it leaves out rows."""
    ranges, shape = slice_ranges(expr), shape_of(expr.args[0])
    inside = _within(read, shape)
    if ranges is None or inside is None:
        return None
    rows = len(shape) - inside.ndim
    if any(len(r) != d or r.step != 1 for r, d in zip(ranges[:rows], shape[:rows], strict=True)):
        return None
    return inside[np.ix_(*ranges[rows:])]
