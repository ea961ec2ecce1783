"""ONNX Einsum: of two operands that share an axis to sum over, a matrix product, which then is quantized, scheduled and recognized like any other.

bqhd, bkhd -> bhqk    -->    matmul(permute(x) [b, h, q, d], permute(y) [b, h, d, k])
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from typing import Any

from tvm import relax

from qcompiler.importers.nodes import Node, Value


def einsum(node: Node) -> list[Value]:
    equation = node.text("equation", "").replace(" ", "")
    product = _product(node, equation)
    return [relax.op.einsum(node.tensors(), equation) if product is None else product]


def _product(node: Node, equation: str) -> Any | None:
    """The equation as a product of matrices, or None where it is none."""
    if len(node.inputs) != 2 or any(node.dtype(i) != "float32" for i in (0, 1)):
        return None
    terms = _spelled_out(equation, [len(node.shape(i)) for i in (0, 1)])
    if terms is None:
        return None
    (left, right), result = terms
    sizes = [dict(zip(term, node.shape(i), strict=True)) for i, term in enumerate((left, right))]
    shared = [c for c in left if c in right]
    if any(len(set(t)) < len(t) for t in (left, right, result)) or any(sizes[0][c] != sizes[1][c] for c in shared):
        return None
    batch, summed = [c for c in result if c in shared], [c for c in shared if c not in result]
    rows, columns = ([c for c in result if c in own and c not in shared] for own in (left, right))
    if not summed or len(result) != len(batch) + len(rows) + len(columns) or set(left + right) != {*result, *summed}:
        return None
    size = sizes[1] | sizes[0]
    x = _matrix(node, 0, left, [batch, rows, summed], size)
    y = _matrix(node, 1, right, [batch, summed, columns], size)
    order = [*batch, *rows, *columns]
    made = relax.op.matmul(x, y)
    if len(rows) != 1 or len(columns) != 1:
        made = relax.op.reshape(node.emit("product", made), [size[c] for c in order])
    return made if list(result) == order else relax.op.permute_dims(node.emit("axes", made), [order.index(c) for c in result])


def _matrix(node: Node, index: int, term: str, parts: Sequence[Sequence[str]], size: dict[str, int]) -> Any:
    """Operand `index`, whose axes are `term`, as [batch..., rows, columns]: `parts` has the axes of each; several are joined."""
    batch, *sides = parts
    x = node.tensor(index)
    axes = [term.index(c) for part in parts for c in part]
    x = node.emit("permuted", relax.op.permute_dims(x, axes)) if axes != sorted(axes) else x
    shape = [*(size[c] for c in batch), *(math.prod(size[c] for c in side) for side in sides)]
    return x if all(len(side) == 1 for side in sides) else node.emit("matrix", relax.op.reshape(x, shape))


def _spelled_out(equation: str, ranks: Sequence[int]) -> tuple[list[str], str] | None:
    """(a letter for each axis of each operand, those of the result), with an ellipsis as letters and the result stated; None for what doesn't fit."""
    inputs, arrow, result = equation.partition("->")
    terms = inputs.split(",")
    if len(terms) != len(ranks) or any(not part.isalpha() for term in [*terms, result] for part in term.split("...") if part):
        return None
    if not arrow:  # letters that occur once, in order, behind the ellipsis
        letters = sorted({c for c in inputs if c.isalpha() and inputs.count(c) == 1})
        result = ("..." if "..." in inputs else "") + "".join(letters)
    hidden = [rank - len(term.replace("...", "")) if "..." in term else 0 for term, rank in zip(terms, ranks, strict=True)]
    spare = "".join(c for c in string.ascii_letters if c not in inputs)
    most = max(hidden)
    if min(hidden) < 0 or most > len(spare):
        return None
    terms = [term.replace("...", spare[most - n : most]) for term, n in zip(terms, hidden, strict=True)]
    return (terms, result.replace("...", spare[:most])) if [len(t) for t in terms] == list(ranks) else None
