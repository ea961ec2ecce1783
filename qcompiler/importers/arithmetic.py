"""ONNX operators over single elements and matrices, where Relax's importer would leave loops or an unrecognizable form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import helper
from tvm import relax

from qcompiler.importers.nodes import Node, Refused, Value, real
from qcompiler.passes.graph import const, const_value, is_const, make_op, shape_of
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
    low, high = (None if b is None or np.size(b) == 0 else np.ravel(np.asarray(b))[0] for b in bounds)
    if (low is not None and np.isnan(low)) or (high is not None and np.isnan(high)):
        raise Refused("a bound is NaN")
    if low is not None and high is not None and low > high:
        low = high
    if low == np.inf or high == -np.inf:
        raise Refused(f"its bounds {low} and {high} leave nothing but an infinity")
    return [clamped(node.tensor(0), None if low == -np.inf else low, None if high == np.inf else high)]


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


def matrix_product(node: Node, a: Any, b: Any) -> Any:
    """`a @ b`. A constant matrix on the left is moved to the right, where weights are: `a @ b = (b' @ a')'`."""
    if not is_const(a) or is_const(b) or len(shape_of(a)) != 2 or len(shape_of(b)) < 2:
        return relax.op.matmul(a, b)
    rank = len(shape_of(b))
    swap = [*range(rank - 2), rank - 1, rank - 2]
    turned = node.emit("turned", relax.op.permute_dims(b, swap))
    return relax.op.permute_dims(node.emit("product", relax.op.matmul(turned, const(np.ascontiguousarray(const_value(a).T)))), swap)


def matmul(node: Node) -> list[Value]:
    return [matrix_product(node, node.tensor(0), node.tensor(1))]


def gemm(node: Node) -> list[Value]:
    """`alpha * A' B' + beta * C`: a constant B is transposed and scaled here, a constant C is scaled here."""
    alpha, beta = float(node.attrs.get("alpha", 1.0)), float(node.attrs.get("beta", 1.0))
    a, b = node.inputs[0], node.inputs[1]
    if isinstance(a, np.ndarray):
        a = const(np.ascontiguousarray(real(a).T if node.attrs.get("transA", 0) else real(a)))
    elif node.attrs.get("transA", 0):
        a = node.emit("a", relax.op.permute_dims(a, [1, 0]))
    if isinstance(b, np.ndarray):
        b = real(b)
        b = const(np.ascontiguousarray(b.T if node.attrs.get("transB", 0) else b) * np.float32(alpha))
        alpha = 1.0
    elif node.attrs.get("transB", 0):
        b = node.emit("b", relax.op.permute_dims(b, [1, 0]))
    result = matrix_product(node, a, b)
    if alpha != 1.0:
        result = relax.op.multiply(node.emit("scaled", result), const(np.float32(alpha)))
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


def bit_shift(node: Node) -> list[Value]:
    """By the type's width or more nothing is left but the sign of what is shifted right; TVM's shifts are undefined there."""
    left, dtype = node.text("direction", "LEFT") == "LEFT", node.dtype()
    x, by = node.tensor(0), node.tensor(1)
    width = np.dtype(dtype).itemsize * 8

    def constant(value: int) -> Any:
        return const(np.asarray(value, dtype))

    small = node.emit("small", relax.op.less(by, constant(width)))
    if dtype.startswith("int"):
        small = node.emit("valid", relax.op.logical_and(small, node.emit("positive", relax.op.greater_equal(by, constant(0)))))
    shifted = node.emit("shifted", (relax.op.left_shift if left else relax.op.right_shift)(x, node.emit("by", relax.op.where(small, by, constant(0)))))
    rest = constant(0)
    if not left and dtype.startswith("int"):
        rest = node.emit("sign", relax.op.right_shift(x, constant(width - 1)))
    return [relax.op.where(small, shifted, rest)]


def divide(node: Node) -> list[Value] | None:
    """Of integers, see `whole`; what divides floats is left to Relax's importer."""
    return None if "float" in node.dtype() else whole(node, relax.op.divide, by_minus_one=relax.op.negative)


def whole(node: Node, operation: Callable[[Any, Any], Any], by_minus_one: Callable[[Any], Any] | None = None) -> list[Value]:
    """A quotient or remainder of integers: 0 where the divisor is 0, and wrapping where it is -1, which ONNX Runtime does for int32; processors trap at
    -2^31 / -1. by_minus_one: None yields 0."""
    dtype, divisor = node.dtype(), node.inputs[1]
    x, by = node.tensor(0), node.tensor(1)
    signed = dtype.startswith("int")
    if isinstance(divisor, np.ndarray) and divisor.all() and not (signed and (divisor == -1).any()):
        return [operation(x, by)]

    def constant(value: int) -> Any:
        return const(np.asarray(value, dtype))

    none = node.emit("none", relax.op.equal(by, constant(0)))
    other = node.emit("flips", relax.op.equal(by, constant(-1))) if signed else None
    plain = none if other is None else node.emit("special", relax.op.logical_or(none, other))
    result = operation(x, node.emit("divisor", relax.op.where(plain, constant(1), by)))
    if other is not None:
        flipped = node.emit("flipped", by_minus_one(x)) if by_minus_one is not None else constant(0)
        result = relax.op.where(other, flipped, node.emit("divided", result))
    return [relax.op.where(none, constant(0), node.emit("result", result))]


def modulo(node: Node) -> list[Value] | None:
    """With fmod 0, a remainder has the divisor's sign, of floats also where the divisor is infinite or the remainder is zero. Of integers, see `whole`."""
    if "float" not in node.dtype():
        return whole(node, relax.op.mod if node.attrs.get("fmod", 0) else relax.op.floor_mod)
    if node.attrs.get("fmod", 0):
        return None
    zero, divisor = const(np.float32(0)), node.tensor(1)
    rest = node.emit("rest", relax.op.mod(node.tensor(0), divisor))
    below = node.emit("below", relax.op.less(divisor, zero))
    other = node.emit("other", relax.op.logical_xor(node.emit("negative", relax.op.less(rest, zero)), below))
    moved = node.emit("moved", relax.op.where(other, node.emit("sum", relax.op.add(rest, divisor)), rest))
    none = node.emit("none", relax.op.where(below, const(np.float32(-0.0)), zero))
    return [relax.op.where(node.emit("divides", relax.op.equal(rest, zero)), none, moved)]


def lp_normalization(node: Node) -> list[Value]:
    """`x / norm` along one axis; zeros where the norm is 0."""
    x, axis = node.tensor(0), node.axis(int(node.attrs.get("axis", -1)), len(node.shape()))
    p = int(node.attrs.get("p", 2))
    if p not in (1, 2):
        raise Refused(f"its norm is of order {p}; supported: 1 and 2")
    power = node.emit("power", relax.op.abs(x) if p == 1 else relax.op.multiply(x, x))
    norm = node.emit("norm", relax.op.sum(power, [axis], True))
    norm = norm if p == 1 else node.emit("root", relax.op.sqrt(norm))
    zero = const(np.float32(0))
    return [relax.op.where(node.emit("nothing", relax.op.equal(norm, zero)), zero, node.emit("quotient", relax.op.divide(x, norm)))]


def bit_cast(node: Node) -> list[Value]:
    """The same bits as another type of the same width. Integers only change their sign's meaning; floats are float32 here, whatever the file has."""
    wanted, have = helper.tensor_dtype_to_np_dtype(int(node.attrs["to"])), node.dtype()
    if (wanted.kind == "f" and wanted != np.float32) or (have == "float32" and wanted.itemsize != 4):
        raise Refused(f"the bits of {wanted} can't be had, as every floating type is computed in float32; supported: float32 and integers")
    if wanted.kind == "f" or have == "float32":
        return [node.inputs[0] if have == str(wanted) else make_op("qc.bitcast", [node.tensor(0)], {"dtype": str(wanted)}, node.shape(), str(wanted))]
    return [relax.op.astype(node.tensor(0), str(wanted))]
