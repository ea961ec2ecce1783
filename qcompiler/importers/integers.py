"""Quantization that a network itself carries out, as float arithmetic: what ONNX defines, to the rounding of float32.

    QuantizeLinear(x, s, z)      -->   cast(clip(round(x / s) + z, what the type holds))           ties to even
    DequantizeLinear(q, s, z)    -->   (float(q) - z) * s
    DynamicQuantizeLinear(x)     -->   scale and zero point of the least and greatest x, 0 between them, and QuantizeLinear
    MatMulInteger, ConvInteger   -->   the product of int32 numbers

Scales are one per tensor, per index of an axis, or per block of it; constants or computed when the network runs. Types of 4 and 2 bits
are held in 8. None of these values is ever stored in 8 bits by the plan: each is recorded as exact (`passes/trained.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto
from tvm import relax

from qcompiler.importers import images
from qcompiler.importers.nodes import Node, Refused, Value
from qcompiler.importers.stated import BITS, check_scale
from qcompiler.passes.graph import const, dtype_of, shape_of
from qcompiler.passes.trained import ATTRIBUTE, EXACT

STORED = {"int2": "int8", "uint2": "uint8", "int4": "int8", "uint4": "uint8"}
"""How integers of fewer than 8 bits are held."""


def quantize_linear(node: Node) -> list[Value]:
    kind = _kind(node)
    if kind not in BITS:
        raise Refused(f"quantization to {kind} is not supported; supported: {', '.join(BITS)}")
    scale, zero = _along(node, 1), _along(node, 2)
    low, high = BITS[kind]
    x = _exact(node, "scaled", relax.op.divide(_real(node, 0), scale))
    x = _exact(node, "rounded", relax.op.round(x))
    x = _exact(node, "shifted", relax.op.add(x, zero)) if zero is not None else x
    x = _exact(node, "saturated", relax.op.clip(x, float(low), float(high)))
    return [_exact(node, None, relax.op.astype(x, STORED.get(kind, kind)))]


def dequantize_linear(node: Node) -> list[Value]:
    scale, zero = _along(node, 1), _along(node, 2)
    if node.dtype() == "float32":
        raise Refused("its operand is no tensor of integers")
    x = _real(node, 0)
    x = _exact(node, "centred", relax.op.subtract(x, zero)) if zero is not None else x
    return [_exact(node, None, relax.op.multiply(x, scale))]


def dynamic_quantize_linear(node: Node) -> list[Value]:
    """uint8. A tensor of zeros has scale 1."""
    x, none = node.tensor(0), const(np.float32(0))
    low = _exact(node, "low", relax.op.minimum(_exact(node, "least", relax.op.min(x)), none))
    high = _exact(node, "high", relax.op.maximum(_exact(node, "greatest", relax.op.max(x)), none))
    spread = _exact(node, "step", relax.op.divide(_exact(node, "spread", relax.op.subtract(high, low)), const(np.float32(255))))
    flat = _exact(node, "flat", relax.op.equal(spread, none))
    scale = _named(node, 1, relax.op.where(flat, const(np.float32(1)), spread))
    zero = _exact(node, "lowest", relax.op.round(_exact(node, "steps", relax.op.divide(_exact(node, "below", relax.op.negative(low)), scale))))
    zero = _exact(node, "origin", relax.op.clip(zero, 0.0, 255.0))
    x = _exact(node, "rounded", relax.op.round(_exact(node, "scaled", relax.op.divide(x, scale))))
    x = _exact(node, "saturated", relax.op.clip(_exact(node, "shifted", relax.op.add(x, zero)), 0.0, 255.0))
    q = _named(node, 0, relax.op.astype(x, "uint8"))
    return [q, scale, _named(node, 2, relax.op.astype(zero, "uint8"))]


def matmul_integer(node: Node) -> list[Value]:
    """Zero points: one, one per row of the left operand, or one per column of the right one."""
    left, right = (_centred(node, i, -2 if i == 0 else -1) for i in (0, 1))
    return [_exact(node, None, relax.op.matmul(left, right))]


def conv_integer(node: Node) -> list[Value]:
    """What padding adds stands for 0, as the zero point does."""
    inner = Node("Conv", node.domain, node.opset, [_centred(node, 0, None), _centred(node, 1, 0)], node.outputs, node.attrs, node.proto, node.builder)
    (result,) = images.conv(inner)
    return [_exact(node, None, result)]


def _kind(node: Node) -> str:
    """The type of a QuantizeLinear's result."""
    if node.has(2):
        name = node.proto.input[2]
        value = node.inputs[2]
        return str(value.dtype) if isinstance(value, np.ndarray) else _declared(node, name, dtype_of(value))
    wanted = int(node.attrs.get("output_dtype", 0))
    return TensorProto.DataType.Name(wanted).lower() if wanted else "uint8"


def _declared(node: Node, name: str, held: str) -> str:
    if held not in BITS:
        raise Refused(f"its zero point '{name}' is {held}, computed when the network runs; supported: {', '.join(BITS)}")
    return held


def _real(node: Node, index: int) -> Any:
    """Operand `index` in float32."""
    value = node.inputs[index]
    if isinstance(value, np.ndarray):
        return const(value.astype(np.float32))
    return value if node.dtype(index) == "float32" else _exact(node, "real", relax.op.astype(value, "float32"))


def _along(node: Node, index: int) -> Any:
    """Scale (operand 1) or zero point (operand 2) in float32, so that it broadcasts against the data; None when left out."""
    if not node.has(index):
        if index == 1:
            raise Refused("it has no scale")
        return None
    shape, value = node.shape(), node.inputs[index]
    own = tuple(value.shape) if isinstance(value, np.ndarray) else shape_of(value)
    if isinstance(value, np.ndarray):
        value = value.astype(np.float32)
        if index == 1:
            check_scale(value, node.proto.input[1], divides=node.op == "QuantizeLinear")
    elif dtype_of(value) != "float32":
        value = _exact(node, f"parameter{index}", relax.op.astype(value, "float32"))
    if int(np.prod(own)) == 1:
        return const(value.reshape(())) if isinstance(value, np.ndarray) else value if own == () else _exact(node, f"one{index}", relax.op.reshape(value, ()))
    axis, block = node.axis(int(node.attrs.get("axis", 1)), len(shape)), int(node.attrs.get("block_size", 0))
    if block:
        if len(own) != len(shape) or any(d != s for i, (d, s) in enumerate(zip(own, shape, strict=True)) if i != axis) or -(-shape[axis] // block) != own[axis]:
            raise Refused(f"scales of shape {list(own)} don't fit blocks of {block} along axis {axis} of a tensor of shape {list(shape)}")
        if isinstance(value, np.ndarray):
            return const(np.ascontiguousarray(np.repeat(value, block, axis=axis)[tuple(slice(0, d) for d in shape)]))
        spread = _exact(node, f"blocks{index}", relax.op.repeat(value, block, axis))
        cut = own[axis] * block != shape[axis]
        return _exact(node, f"cut{index}", relax.op.strided_slice(spread, [axis], [0], [shape[axis]], [1])) if cut else spread
    if own != (shape[axis],):
        raise Refused(f"scales of shape {list(own)} don't fit axis {axis} of a tensor of shape {list(shape)}")
    full = [shape[axis] if i == axis else 1 for i in range(len(shape))]
    return const(value.reshape(full)) if isinstance(value, np.ndarray) else _exact(node, f"along{index}", relax.op.reshape(value, full))


def _centred(node: Node, index: int, axis: int | None) -> Any:
    """Operand `index` of an integer product as int32, less its zero point (operand index + 2), which is one or lies along `axis`."""
    value, zero = node.inputs[index], node.inputs[index + 2] if node.has(index + 2) else None
    shape = node.shape(index)
    if zero is not None:
        own = tuple(zero.shape) if isinstance(zero, np.ndarray) else shape_of(zero)
        size = int(np.prod(own))
        if size == 1:
            full: list[int] = []
        elif axis is not None and len(own) == 1 and own[0] == shape[axis]:
            full = [own[0] if i == axis % len(shape) else 1 for i in range(len(shape))]
        elif axis is not None and len(own) == len(shape):
            full = list(own)
        else:
            raise Refused(f"zero points of shape {list(own)} don't fit an operand of shape {list(shape)}")
        if isinstance(zero, np.ndarray):
            zero = zero.astype(np.int32).reshape(full)
        else:
            zero = _exact(node, f"zero{index}", relax.op.astype(zero, "int32"))
            zero = zero if own == tuple(full) else _exact(node, f"origin{index}", relax.op.reshape(zero, full))
    if isinstance(value, np.ndarray):
        value = value.astype(np.int32)
        if zero is None or isinstance(zero, np.ndarray):
            return const(value - zero if zero is not None else value)
        value = const(value)
    else:
        value = _exact(node, f"integers{index}", relax.op.astype(value, "int32"))
    return value if zero is None else _exact(node, f"centred{index}", relax.op.subtract(value, const(zero) if isinstance(zero, np.ndarray) else zero))


def _exact(node: Node, what: str | None, expr: Any) -> Any:
    """Bind an interior value and record it as exact. what=None: the node's first result, which is bound later."""
    if what is not None:
        variable = node.emit(what, expr)
        node.builder.annotate(ATTRIBUTE, EXACT, str(variable.name), _REASON)
        return variable
    node.builder.annotate(ATTRIBUTE, EXACT, node.outputs[0], _REASON)
    return expr


def _named(node: Node, index: int, expr: Any) -> Any:
    """Bind result `index`, or an interior value where nobody wants it."""
    if index >= len(node.outputs) or not node.outputs[index]:
        return _exact(node, f"result{index}", expr)
    node.builder.annotate(ATTRIBUTE, EXACT, node.outputs[index], _REASON)
    return node.builder.emit(node.outputs[index], expr)


_REASON = "it is the model file's own arithmetic on integers"
