"""One ONNX node on its way to Relax: operands, attributes and parameters whatever the operator-set version, and how values are emitted.

Every value is static, so what an operator calls a "parameter" (axes, pads, sizes, ...) is known here, be it an attribute (older versions) or an
input computed from shapes (newer ones).
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from tvm import relax

from qcompiler.passes.graph import GraphBuilder, const, dtype_of, shape_of

LARGEST_BYTES = 1 << 31
RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
"""Operators whose results are never computed in advance."""
Value = Any  # a Relax variable, or a numpy array for a constant


class Refused(Exception):
    """This node can't be converted; the message is the reason, the node is named by whoever catches it."""


class Beyond(Refused):
    """This node can't be compiled, though the file is right: its result has no static shape, or it has no conversion. The network may be cut before it."""


def cut_offer(names: Sequence[str]) -> str:
    """How to compile what stands before values that can't be computed; nothing where `names` has none."""
    if not names:
        return ""
    option = " ".join(map(shlex.quote, names))
    return f". What stands before is compiled with --outputs {option} (in Python outputs={list(names)}), and the rest runs outside, on these"


def check_bytes(what: str, shape: Sequence[int], itemsize: int = 4) -> None:
    """Raises Refused for a tensor of more than `LARGEST_BYTES`: kernels count elements in 32 bits, and no memory would hold a network of such."""
    size = math.prod(int(d) for d in shape) * itemsize
    if size > LARGEST_BYTES:
        raise Refused(f"{what} would take {size / 1e9:.1f} GB (shape {list(shape)}); at most {LARGEST_BYTES / 1e9:.1f} GB are supported")


def real(array: np.ndarray) -> np.ndarray:
    """A constant as the canonical module holds it: every floating type becomes float32, the rest is kept."""
    if array.dtype.kind in "OSU":
        raise Refused("tensors of strings can't be compiled")
    floating = array.dtype.kind == "f" or array.dtype.name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")
    return array.astype(np.float32) if floating and array.dtype != np.float32 else array


_WEIGHTED = {
    *("Conv", "ConvTranspose", "Gemm", "MatMul", "PRelu"),
    *(f"{kind}Normalization" for kind in ("Batch", "Group", "Instance", "Layer", "RMS")),
}
_ARITHMETIC = {"Add", "Sub", "Mul", "Div"}


def is_tensor(value: Value) -> bool:
    """A tensor, and no sequence of them?"""
    return isinstance(value, np.ndarray) or isinstance(value.ty, relax.TensorType)


def check_finite(node: Node) -> None:
    """Raises Refused for weights that are not finite, and for NaN in the constants of sums and products (where an infinity may be a mask)."""
    for name, value in zip(node.proto.input, node.inputs, strict=True):
        if node.op not in _WEIGHTED | _ARITHMETIC or not isinstance(value, np.ndarray) or real(value).dtype != np.float32:
            continue
        nan, infinite = int(np.isnan(value).sum()), int(np.isinf(value).sum()) if node.op in _WEIGHTED else 0
        if nan or infinite:
            what = " and ".join(f"{n} {word}" for n, word in ((nan, "NaN"), (infinite, "Inf")) if n)
            raise Refused(f"tensor '{name}' holds {what} among its {value.size} elements. Mend the weights before export: training may have diverged")


class Undefined(Exception):
    """Neither our table nor Relax's importer converts this node rightly: use the operator's definition."""


@dataclass
class Node:
    """A node with its operands. `inputs[i]` is a Relax variable, a numpy array (constant), or None (left out)."""

    op: str
    domain: str
    opset: int
    inputs: list[Value | None]
    outputs: list[str]  # "" where left out
    attrs: dict[str, Any]
    proto: onnx.NodeProto
    builder: GraphBuilder

    @property
    def id(self) -> str:
        """The value id that names what this node computes: its first output."""
        return next(o for o in self.outputs if o)

    def has(self, index: int) -> bool:
        return index < len(self.inputs) and self.inputs[index] is not None

    def present(self, index: int) -> Value:
        """Operand `index`. Raises Refused where it is left out."""
        if not self.has(index):
            raise Refused(f"operand {index} is missing")
        return self.inputs[index]

    def tensor(self, index: int) -> Any:
        """Operand `index` as a Relax expression (variable or constant)."""
        value = self.present(index)
        return const(real(value)) if isinstance(value, np.ndarray) else value

    def tensors(self) -> list[Any]:
        return [self.tensor(i) for i in range(len(self.inputs))]

    def shape(self, index: int = 0) -> tuple[int, ...]:
        value = self.present(index)
        return tuple(value.shape) if isinstance(value, np.ndarray) else shape_of(value)

    def dtype(self, index: int = 0) -> str:
        value = self.present(index)
        return str(real(value).dtype) if isinstance(value, np.ndarray) else dtype_of(value)

    def constant(self, index: int, what: str) -> np.ndarray | None:
        """Operand `index` as an array, None when left out. Raises Refused when it is computed at run time."""
        if not self.has(index):
            return None
        value = self.inputs[index]
        if not isinstance(value, np.ndarray):
            raise Beyond(f"its {what} (operand '{self.proto.input[index]}') is computed at run time; supported: constants and functions of shapes")
        return value

    def param(self, name: str, index: int) -> list[int] | None:
        """Integers given as attribute `name` or as constant operand `index`; None when neither is there."""
        if name in self.attrs:
            return [int(v) for v in np.ravel(self.attrs[name])]
        value = self.constant(index, name)
        return None if value is None else [int(v) for v in np.ravel(value)]

    def axes(self, name: str, index: int, rank: int) -> list[int] | None:
        """Like `param`, with negative axes counted from the end. Raises Refused for an axis out of range."""
        found = self.param(name, index)
        return None if found is None else [self.axis(a, rank) for a in found]

    def axis(self, axis: int, rank: int) -> int:
        if not -rank <= axis < max(rank, 1):
            raise Refused(f"axis {axis} is out of range for a tensor of rank {rank}")
        return axis % max(rank, 1)

    def text(self, name: str, default: str) -> str:
        value = self.attrs.get(name, default)
        return value.decode() if isinstance(value, bytes) else str(value)

    def emit(self, what: str, expr: Any) -> Any:
        """Bind an interior value, named `<id>~<what>`, and return its variable."""
        return self.builder.emit(self.builder.made(self.id, what), expr)

    def variable(self, what: str, value: Value) -> Any:
        """A value as a Relax variable or constant: an expression is bound first."""
        if isinstance(value, np.ndarray):
            return const(real(value))
        return value if isinstance(value, relax.Var) else self.emit(what, value)

    def reshape(self, x: Value, shape: Sequence[int]) -> Value:
        """`x` in another static shape: an array for an array, the same variable when nothing changes."""
        target = tuple(int(d) for d in shape)
        if isinstance(x, np.ndarray):
            return x.reshape(target)
        return x if shape_of(x) == target else relax.op.reshape(x, target)


def attributes(proto: onnx.NodeProto) -> dict[str, Any]:
    """Attributes as Python values: tensors as arrays, strings as bytes, graphs as GraphProto."""
    found = {}
    for attribute in proto.attribute:
        if attribute.ref_attr_name:
            continue
        value = helper.get_attribute_value(attribute)
        if isinstance(value, onnx.TensorProto):
            value = numpy_helper.to_array(value)
        found[attribute.name] = value
    return found


def window_padding(node: Node, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> tuple[list[int], list[int]]:
    """(begin, end) padding per spatial axis of a convolution or pooling node, `auto_pad` resolved.

    SAME pads `max((ceil(n / stride) - 1) * stride + (kernel - 1) * dilation + 1 - n, 0)` in all, the odd one at the end (SAME_UPPER) or the
    beginning (SAME_LOWER): ONNX operator documentation, Conv.
    """
    mode = node.text("auto_pad", "NOTSET") or "NOTSET"
    rank = len(sizes)
    if mode == "NOTSET":
        pads = list(node.attrs.get("pads", [0] * 2 * rank))
        if len(pads) != 2 * rank or min(pads) < 0:
            raise Refused(f"pads {pads} are not {2 * rank} non-negative numbers")
        return pads[:rank], pads[rank:]
    if mode == "VALID":
        return [0] * rank, [0] * rank
    if mode not in ("SAME_UPPER", "SAME_LOWER"):
        raise Refused(f"auto_pad '{mode}' is unknown; supported: NOTSET, VALID, SAME_UPPER, SAME_LOWER")
    begin, end = [], []
    for n, k, s, d in zip(sizes, kernel, strides, dilations, strict=True):
        total = max((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        small = total // 2
        begin.append(small if mode == "SAME_UPPER" else total - small)
        end.append(total - begin[-1])
    return begin, end
