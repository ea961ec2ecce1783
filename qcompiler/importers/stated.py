"""What QuantizeLinear and DequantizeLinear nodes state: scales and zero points as ONNX means them, and constants that are stored as integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qcompiler.importers.nodes import Refused
from qcompiler.numerics.spec import QParams

BITS = {
    "int2": (-2, 1), "uint2": (0, 3), "int4": (-8, 7), "uint4": (0, 15), "int8": (-128, 127), "uint8": (0, 255),
    "int16": (-(1 << 15), (1 << 15) - 1), "uint16": (0, (1 << 16) - 1),
}  # fmt: skip
"""The least and the greatest number of the types that QuantizeLinear yields."""
_SHIFT = {"int2": 0, "uint2": 2, "int4": 0, "uint4": 8, "int8": 0, "uint8": 128}  # what moves a type's numbers into int8's
_WEIGHT_AXIS = {"Conv": 0, "ConvTranspose": 1}
_MOST = 127  # the farthest that an int8 weight lies from 0
_SMALLEST, _LARGEST = np.float32(2.0**-125), np.float32(2.0**119)  # 255 steps of the largest are still a float32


def check_scale(scale: np.ndarray, tensor: str, divides: bool) -> None:
    """Raises Refused for a scale by which nothing can be quantized (`divides`) or that yields no number."""
    wrong = ~np.isfinite(scale)
    if divides:
        wrong |= ~(scale >= _SMALLEST)
    if wrong.any():
        which = f" ({int(wrong.sum())} of {scale.size} are so)" if scale.size > 1 else ""
        raise Refused(f"the scale '{tensor}' is {scale[wrong].reshape(-1)[0]:g}{which}; supported: finite numbers from 2^-125 on. Export the model again")


@dataclass(frozen=True)
class Parameters:
    """Of one Q or DQ node: real = scale * (q - zero_point). axis: of several scales; block: elements of the axis per scale, 0: not blocked."""

    scale: np.ndarray
    zero_point: np.ndarray
    dtype: str
    axis: int
    block: int

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Parameters) or (self.dtype, self.block) != (other.dtype, other.block):
            return False
        same = np.array_equal(self.scale, other.scale) and np.array_equal(self.zero_point, other.zero_point)
        return same and (self.scale.size == 1 or self.axis == other.axis)

    __hash__ = None  # type: ignore[assignment]

    def along(self, shape: Sequence[int], array: np.ndarray) -> np.ndarray:
        """`scale` or `zero_point` so that it broadcasts against a tensor of `shape`. Raises Refused when it doesn't."""
        if array.size == 1:
            return array.reshape(())
        axis = self.axis + len(shape) if self.axis < 0 else self.axis
        if not 0 <= axis < len(shape):
            raise Refused(f"axis {self.axis} is out of range for a tensor of rank {len(shape)}")
        if self.block:
            spread: np.ndarray = np.repeat(array, self.block, axis=axis)[tuple(slice(0, d) for d in shape)] if array.ndim == len(shape) else array
        else:
            spread = array.reshape([-1 if i == axis else 1 for i in range(len(shape))])
        if (self.block and spread.shape != tuple(shape)) or spread.shape[axis] != shape[axis]:
            raise Refused(f"its scales of shape {list(array.shape)} don't fit a tensor of shape {list(shape)} along axis {self.axis}")
        return spread

    def dequantize(self, q: np.ndarray) -> np.ndarray:
        """float32, as ONNX defines it."""
        centred = (q.astype(np.int64) - self.along(q.shape, self.zero_point)).astype(np.float32)
        return np.asarray(centred * self.along(q.shape, self.scale), np.float32)

    def quantize(self, real: np.ndarray) -> np.ndarray:
        """int64, as ONNX defines it: round half to even, saturate."""
        with np.errstate(over="ignore"):
            scaled = np.rint(real.astype(np.float32) / self.along(real.shape, self.scale)).astype(np.float64)
        low, high = BITS[self.dtype]
        return np.asarray(np.clip(scaled + self.along(real.shape, self.zero_point), low, high), np.int64)

    def of_activation(self) -> QParams | str:
        """Parameters of a canonical int8 activation that states the same numbers; or why there are none."""
        if self.dtype not in _SHIFT:
            return f"{self.dtype} activations have no int8 kernel"
        if (self.scale != self.scale.reshape(-1)[:1]).any() or (self.zero_point != self.zero_point.reshape(-1)[:1]).any():
            return "an activation has one scale in int8 kernels, not one per channel or block"
        if self.scale.reshape(-1)[0] > _LARGEST:  # of attention masks, whose least number is float32's
            return f"a scale of {self.scale.reshape(-1)[0]:g} is beyond 2^119, the largest of int8 kernels"
        return QParams(float(self.scale.reshape(-1)[0]), int(self.zero_point.reshape(-1)[0]) - _SHIFT[self.dtype])

    @property
    def is_positive(self) -> bool:
        """Are the scales such as an activation may have?"""
        return bool((self.scale >= _SMALLEST).all())

    @property
    def fills_int8(self) -> bool:
        """Does saturation to int8 clip just where this type does?"""
        return self.dtype in ("int8", "uint8")

    @property
    def range(self) -> tuple[np.ndarray, np.ndarray]:
        """float32: the least and the greatest real number that the type can say, scalars for one scale."""
        low, high = (np.asarray(self.scale * (b - self.zero_point).astype(np.float32), np.float32) for b in BITS[self.dtype])
        return (low.reshape(()), high.reshape(())) if low.size == 1 else (low, high)


@dataclass(frozen=True)
class Rounded:
    """A constant that is stated in integers: real = scale * (value - zero_point); value is int64, the others broadcast against it.
    params: of the one scale that all of it has, where int8 can say the same."""

    value: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray
    dtype: str
    params: QParams | str

    @staticmethod
    def of(value: np.ndarray, parameters: Parameters) -> Rounded:
        found = [np.broadcast_to(parameters.along(value.shape, a), value.shape) for a in (parameters.scale, parameters.zero_point)]
        params = parameters.of_activation() if parameters.is_positive else "its scale is none of an activation"
        return Rounded(np.asarray(value, np.int64), found[0], found[1], parameters.dtype, params)


def weight_scales(op: str, attributes: dict[str, Any], weight: Rounded) -> np.ndarray | str:
    """float64 scales per output channel of a weight; or why int8 weights can't say the same."""
    axis = _WEIGHT_AXIS.get(op, weight.value.ndim - 1)
    if op == "Gemm":
        axis = 0 if attributes.get("transB") else 1
        if attributes.get("alpha", 1.0) != 1.0:
            return "the product has a factor alpha"
    if weight.value.ndim < 2:
        return "a product with a vector has no int8 kernel"
    centred = np.abs(weight.value - weight.zero_point).max(initial=0)
    if centred > 128:
        return f"weights of {weight.dtype} farther than 128 steps from their zero point have no int8 kernel"
    apart = np.moveaxis(weight.scale, axis, 0).reshape(weight.value.shape[axis], -1)
    if (apart != apart[:, :1]).any():
        return "weights with several scales along an output channel have no int8 kernel"
    scales = np.abs(apart[:, 0].astype(np.float64))  # a negative scale is a positive one of negative integers
    scales[scales < _SMALLEST] = 1.0  # such weights are nothing beside any other number
    return np.tile(scales, int(attributes.get("group", 1))) if op == "ConvTranspose" else scales


def summands(op: str, attributes: dict[str, Any], weight: Rounded) -> tuple[int, list[tuple[int, int] | None], Rounded] | None:
    """Weights of 9 bits (uint8 whose zero point is not its middle) as several of 8, side by side along the axis that the product sums over:

        sum over k of x[k] * w[k]    =    sum over k of x[k] * clip(w[k], -127, 127) + sum over k of x[k] * the rest of w[k]

    (the axis of x, from where to where x is to be read again along it, None: all of it, the weights); None where nothing is so far from 0, and where several
    groups share a convolution."""
    centred = weight.value - weight.zero_point
    if weight.value.ndim < 2 or np.abs(centred).max(initial=0) <= 128 or attributes.get("group", 1) != 1 or attributes.get("transA"):
        return None
    convolves = op in _WEIGHT_AXIS
    axis = 1 - _WEIGHT_AXIS[op] if convolves else centred.ndim - 2
    if op == "Gemm" and attributes.get("transB"):
        axis = 1
    parts, scales = [np.clip(centred, -_MOST, _MOST)], [weight.scale]
    rest, again = centred - parts[0], list[tuple[int, int] | None]()
    while rest.any():
        used = np.flatnonzero(np.moveaxis(rest, axis, 0).reshape(rest.shape[axis], -1).any(1))
        first, behind, size = int(used[0]), int(used[-1]) + 1, rest.shape[axis]
        if 4 * (behind - first) > 3 * size:  # a copy of a part saves nothing then
            first, behind = 0, size
        again.append(None if behind - first == size else (first, behind))
        part = np.clip(rest, -_MOST, _MOST)
        parts.append(part.take(range(first, behind), axis))
        scales.append(weight.scale.take(range(first, behind), axis))
        rest = rest - part
    value = np.concatenate(parts, axis)
    found = Rounded(value, np.concatenate(scales, axis), np.zeros_like(value), weight.dtype, "it is read in several parts")
    return 1 if convolves else -1, again, found
