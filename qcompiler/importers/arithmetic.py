"""ONNX operators over single elements and matrices, where Relax's importer would leave loops or an unrecognizable form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax

from qcompiler.importers.nodes import Node, Refused, Value, real
from qcompiler.passes.graph import const
from qcompiler.passes.unary import clamped


def identity(node: Node) -> list[Value]:
    return [node.inputs[0]]


def dropout(node: Node) -> list[Value]:
    if node.has(2) and np.any(node.constant(2, "training_mode")):
        raise Refused("it is in training mode; supported: inference. Export the model with model.eval()")
    mask = np.ones(node.shape(), np.bool_)
    return [node.inputs[0], mask][: len(node.outputs)]


def clip(node: Node) -> list[Value]:
    """Constant bounds: `relax.nn.relu` for [0, inf), else `relax.clip`; bounds computed at run time: maximum and minimum."""
    bounds = [node.attrs.get(name, node.inputs[i] if node.has(i) else None) for i, name in enumerate(("min", "max"), 1)]
    if any(isinstance(b, relax.Expr) for b in bounds):
        x = node.tensor(0)
        if bounds[0] is not None:
            x = node.emit("low", relax.op.maximum(x, node.tensor(1)))
        return [x if bounds[1] is None else relax.op.minimum(x, node.tensor(2))]
    low, high = (None if b is None or np.isnan(b) or np.isinf(b) else np.ravel(np.asarray(b))[0] for b in bounds)
    return [clamped(node.tensor(0), low, high)]


def hard_sigmoid(node: Node) -> list[Value]:
    return [_hard_sigmoid(node, float(node.attrs.get("alpha", 0.2)), float(node.attrs.get("beta", 0.5)))]


def hard_swish(node: Node) -> list[Value]:
    """`x * clip(x / 6 + 0.5, 0, 1)`."""
    gate = node.emit("gate", _hard_sigmoid(node, 1 / 6, 0.5))
    return [relax.op.multiply(node.tensor(0), gate)]


def _hard_sigmoid(node: Node, alpha: float, beta: float) -> Any:
    scaled = node.emit("scaled", relax.op.multiply(node.tensor(0), const(np.float32(alpha))))
    shifted = node.emit("shifted", relax.op.add(scaled, const(np.float32(beta))))
    return relax.op.clip(shifted, 0.0, 1.0)


def mish(node: Node) -> list[Value]:
    """`x * tanh(ln(1 + e^x))`, with a softplus that doesn't overflow."""
    soft = node.emit("softplus", relax.op.nn.softplus(node.tensor(0)))
    return [relax.op.multiply(node.tensor(0), node.emit("tanh", relax.op.tanh(soft)))]


def swish(node: Node) -> list[Value]:
    """`x * sigmoid(alpha * x)`."""
    alpha = float(node.attrs.get("alpha", 1.0))
    if alpha == 1.0:
        return [relax.op.nn.silu(node.tensor(0))]
    scaled = node.emit("scaled", relax.op.multiply(node.tensor(0), const(np.float32(alpha))))
    return [relax.op.multiply(node.tensor(0), node.emit("gate", relax.op.sigmoid(scaled)))]


def gemm(node: Node) -> list[Value]:
    """`alpha * A' B' + beta * C`: a constant B is transposed and scaled here, a constant C is scaled here."""
    alpha, beta = float(node.attrs.get("alpha", 1.0)), float(node.attrs.get("beta", 1.0))
    a, b = node.tensor(0), node.inputs[1]
    if node.attrs.get("transA", 0):
        a = node.emit("a", relax.op.permute_dims(a, [1, 0]))
    if isinstance(b, np.ndarray):
        b = real(b)
        b = const(np.ascontiguousarray(b.T if node.attrs.get("transB", 0) else b) * np.float32(alpha))
        alpha = 1.0
    elif node.attrs.get("transB", 0):
        b = node.emit("b", relax.op.permute_dims(b, [1, 0]))
    result = relax.op.matmul(a, b)
    if alpha != 1.0:
        result = relax.op.multiply(node.emit("product", result), const(np.float32(alpha)))
    if not node.has(2) or beta == 0.0:
        return [result]
    c = node.inputs[2]
    if isinstance(c, np.ndarray):
        offset = const(real(c) * np.float32(beta))
    else:
        offset = c if beta == 1.0 else node.emit("c", relax.op.multiply(c, const(np.float32(beta))))
    return [relax.op.add(node.emit("matmul", result), offset)]


def chain(combine: Callable[[Any, Any], Any], mean: bool = False) -> Callable[[Node], list[Value]]:
    """Sum, Max, Min, Mean of any number of operands, two at a time."""

    def convert(node: Node) -> list[Value]:
        result, *rest = node.tensors()
        if not rest:
            return [node.inputs[0]]
        for i, operand in enumerate(rest):
            result = combine(result, operand)
            if mean or i < len(rest) - 1:
                result = node.emit("partial", result)
        return [relax.op.multiply(result, const(np.float32(1 / len(node.inputs)))) if mean else result]

    return convert
