"""The arithmetic of docs/numerics.md a second time: exact integers and fractions, one number at a time, no numpy in the arithmetic."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from hypothesis import HealthCheck, settings


def fixed(examples: int = 60) -> Any:
    """Hypothesis with the same examples on every run."""
    return settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])


def float32(value: Fraction | int) -> Fraction:
    """The nearest float32, ties to even (IEEE 754-2019, section 4.3.1); beyond the greatest one it goes on without an end, as clips follow."""
    value = Fraction(value)
    if value == 0:
        return value
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if Fraction(2) ** exponent > magnitude:
        exponent -= 1
    unit = Fraction(2) ** (max(exponent, -126) - 23)
    return round(value / unit) * unit


def wrap(value: int) -> int:
    """`value` modulo 2^32, as int32."""
    return (value + 2**31) % 2**32 - 2**31


def clip(value: Any, low: Any, high: Any) -> Any:
    return min(max(value, low), high)


def scaled(acc: int, multiplier: float) -> Fraction:
    """int32 to float32, then times a float32: two roundings."""
    return float32(float32(wrap(acc)) * Fraction(multiplier))


def requantize(acc: int, multiplier: float, zero_point: int, low: int = -128, high: int = 127) -> int:
    return round(clip(scaled(acc, multiplier), low - zero_point, high - zero_point)) + zero_point


def with_residual(acc: int, multiplier: float, r: int, zero_point: int, low: int, high: int, residual: dict[str, int], negative: float | None = None) -> int:
    """negative: the multiplier of a negative sum, where it has one of its own."""
    share = round(clip(scaled(acc, multiplier), -(2**30), 2**30))
    total = share + (r - residual["residual_zero_point"]) * residual["residual_multiplier"]
    assert abs(total) < 2**31
    return requantize(total, negative if negative is not None and total < 0 else 2.0 ** -residual["residual_shift"], zero_point, low, high)


def windows(
    size: Sequence[int], kernel: Sequence[int], strides: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> Iterator[tuple[int, int, list[tuple[int, int, int, int]]]]:
    """Per output pixel (row, column) the (kernel row, kernel column, image row, image column) that lie in an image of `size`."""
    span = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    out = [(size[a] + padding[a] + padding[a + 2] - span[a]) // strides[a] + 1 for a in (0, 1)]
    for y, x in itertools.product(*map(range, out)):
        inside = []
        for i, j in itertools.product(*map(range, kernel)):
            row, column = y * strides[0] - padding[0] + i * dilation[0], x * strides[1] - padding[1] + j * dilation[1]
            if 0 <= row < size[0] and 0 <= column < size[1]:
                inside.append((i, j, row, column))
        yield y, x, inside


def conv_accumulators(x: np.ndarray, w: np.ndarray, bias: np.ndarray, zero_point: int, geometry: dict[str, Any]) -> list[list[int]]:
    """Of one image: per output pixel, the accumulator of every output channel."""
    outputs, kh, kw, inputs = w.shape
    rows = []
    image, weight = x[0].tolist(), w.tolist()
    shape = (kh, kw), geometry["strides"], geometry["padding"], geometry["dilation"]
    for _, _, inside in windows(x.shape[1:3], *shape):
        row = []
        for o in range(outputs):
            first = o // (outputs // geometry["groups"]) * inputs
            products = ((image[r][c][first + k] - zero_point) * weight[o][i][j][k] for i, j, r, c in inside for k in range(inputs))
            row.append(int(bias[o]) + sum(products))
        rows.append(row)
    return rows


def each(*arrays: Any) -> Iterable[tuple[Any, ...]]:
    """The elements of arrays, broadcast together, as Python numbers."""
    return zip(*(b.reshape(-1).tolist() for b in np.broadcast_arrays(*arrays)), strict=True)


def reference(op: str, arrays: Sequence[np.ndarray | None], **attributes: Any) -> np.ndarray:
    """One ONNX operator (opset 18), computed by the reference implementation in the onnx package."""
    from onnx import TensorProto, helper
    from onnx.reference import ReferenceEvaluator

    names = ["" if a is None else f"x{i}" for i, a in enumerate(arrays)]
    given = {n: a for n, a in zip(names, arrays, strict=True) if a is not None}
    inputs = [helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in given.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node(op, names, ["y"], **attributes)], "g", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    return np.asarray(ReferenceEvaluator(model).run(None, given)[0])
