"""The reference arithmetic: what every `qc.*` operator means, in numpy. Compiled code equals it bit for bit.

Normative text: docs/numerics.md. Tensors are canonical int8 (images NHWC) unless said otherwise; attributes are keyword arguments of the names in
docs/architecture.md. Products and what transformers add are in files of their own; `OPERATORS` has all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qcompiler.numerics.arithmetic import F32, Array, limits, requantize
from qcompiler.numerics.products import conv2d, conv2d_transpose, convolve, dense, matmul, scatter
from qcompiler.numerics.recurrence import f32_recurrence, recurrence
from qcompiler.numerics.resample import resample
from qcompiler.numerics.spec import RESIZE_BITS
from qcompiler.numerics.transformers import attention, layer_norm, rms_norm, softmax


def quantize(
    x: Array,
    *,
    scale: float,
    zero_point: int,
    low: int | None = None,
    high: int | None = None,
    axes: Sequence[int] | None = None,
    out_dtype: str = "int8",
) -> Array:
    """float32 -> int8 or int16. `clip(x * float32(1 / scale))`, rint to even, plus zero point; NaN becomes `high`. Then transposed by `axes`."""
    least, most = limits(out_dtype, low, high)
    scaled = np.asarray(x, F32) * F32(1.0 / float(F32(scale)))
    top, bottom = F32(most - zero_point), F32(least - zero_point)
    scaled = np.where(scaled < top, scaled, top)  # in this order, NaN ends at the top: what min and max instructions do
    scaled = np.where(scaled > bottom, scaled, bottom)
    q = (np.rint(scaled).astype(np.int32) + zero_point).astype(out_dtype)
    return q if axes is None else np.ascontiguousarray(q.transpose(axes))


def dequantize(q: Array, *, scale: float, zero_point: int, axes: Sequence[int] | None = None) -> Array:
    """int8 or int16 -> float32: transposed by `axes`, then `float32(q - zero_point) * scale`."""
    q = q if axes is None else q.transpose(axes)
    return np.ascontiguousarray((q.astype(np.int32) - zero_point).astype(F32) * F32(scale))


def pixels(x: Array, table: Array, *, channels: Sequence[int], axes: Sequence[int] | None = None) -> Array:
    """uint8 [..., C'] -> the type of `table` [C, 256]: channel c is `table[c, x]` of channel `channels[c]`. Then transposed by `axes`."""
    y = np.stack([table[c, x[..., source]] for c, source in enumerate(channels)], -1)
    return y if axes is None else np.ascontiguousarray(y.transpose(axes))


def enter(x: Array, *, dtype: str = "int8", axes: Sequence[int] | None = None) -> Array:
    """Integers of `dtype` as a user gives them, transposed by `axes`: int8, or uint8, of which 128 is taken."""
    q = x if dtype == "int8" else (x.astype(np.int16) - 128).astype(np.int8)
    return q if axes is None else np.ascontiguousarray(q.transpose(axes))


def leave(q: Array, *, dtype: str, axes: Sequence[int] | None = None) -> Array:
    """int8, transposed by `axes`, as a user gets them: `q`, or `q + 128` in uint8."""
    q = q if axes is None else np.ascontiguousarray(q.transpose(axes))
    return q if dtype == "int8" else (q.astype(np.int16) + 128).astype(np.uint8)


def rescale(
    x: Array, multiplier: Array, *, x_zero_point: int, zero_point: int, low: int | None = None, high: int | None = None, out_dtype: str = "int8"
) -> Array:
    """int8 or int16 -> int8 or int16: `requantize(x - x_zero_point, multiplier)`, multiplier float32 [1] or one per channel of the last axis."""
    return requantize(x.astype(np.int32) - x_zero_point, multiplier, zero_point, low, high, out_dtype)


# -- elementwise ----------------------------------------------------------------------------------------------------------------------


def add(
    a: Array,
    b: Array,
    *,
    a_zero_point: int,
    a_multiplier: int,
    b_zero_point: int,
    b_multiplier: int,
    shift: int,
    zero_point: int,
    low: int | None = None,
    high: int | None = None,
    out_dtype: str = "int8",
) -> Array:
    """`requantize((a - za) * A + (b - zb) * B, 2^-shift)`, operands int8 or int16; broadcasting; a negative B subtracts."""
    acc = (a.astype(np.int64) - a_zero_point) * a_multiplier + (b.astype(np.int64) - b_zero_point) * b_multiplier
    return requantize(acc, 2.0**-shift, zero_point, low, high, out_dtype)


def mul(
    a: Array,
    b: Array,
    *,
    a_zero_point: int,
    b_zero_point: int,
    multiplier: float,
    zero_point: int,
    low: int | None = None,
    high: int | None = None,
    out_dtype: str = "int8",
) -> Array:
    """`requantize((a - za) * (b - zb), multiplier)`, operands int8 or int16; broadcasting."""
    return requantize((a.astype(np.int64) - a_zero_point) * (b.astype(np.int64) - b_zero_point), multiplier, zero_point, low, high, out_dtype)


def lut(x: Array, table: Array) -> Array:
    """`table[x + 128]`, table int8 [256]."""
    return table[x.astype(np.int32) + 128]


def prelu(
    x: Array,
    negative: Array,
    *,
    multiplier: float,
    x_zero_point: int,
    zero_point: int,
    low: int | None = None,
    high: int | None = None,
) -> Array:
    """`requantize(d, d < 0 ? negative : multiplier)` where `d = x - x_zero_point`; negative float32 [C], one multiplier per channel of the last axis."""
    acc = x.astype(np.int32) - x_zero_point
    return requantize(acc, np.where(acc < 0, negative, F32(multiplier)), zero_point, low, high)


def lut16(x: Array, table: Array, *, shift: int, zero_point: int, low: int | None = None, high: int | None = None, out_dtype: str = "int8") -> Array:
    """x int16, table int16 [2^bits + 1] (`constants.lut16`): the entries on both sides of x, weighted by its distances from them."""
    width = 2**16 // (table.size - 1)
    place = x.astype(np.int32) + 2**15
    index, part = place // width, place % width
    entries = table.astype(np.int32)
    return requantize(entries[index] * (width - part) + entries[index + 1] * part, 2.0**-shift, zero_point, low, high, out_dtype)


# -- pools and means ------------------------------------------------------------------------------------------------------------------


def _windows(x: Array, fill: int, kernel: Sequence[int], strides: Sequence[int], padding: Sequence[int], dilation: Sequence[int]) -> list[Array]:
    top, left, bottom, right = padding
    padded = np.pad(x.astype(np.int32), ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=fill)
    oh = (padded.shape[1] - (kernel[0] - 1) * dilation[0] - 1) // strides[0] + 1
    ow = (padded.shape[2] - (kernel[1] - 1) * dilation[1] - 1) // strides[1] + 1
    return [
        padded[:, i * dilation[0] :, j * dilation[1] :][:, : (oh - 1) * strides[0] + 1 : strides[0], : (ow - 1) * strides[1] + 1 : strides[1]]
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]


def max_pool2d(x: Array, *, kernel: Sequence[int], strides: Sequence[int], padding: Sequence[int], dilation: Sequence[int] = (1, 1)) -> Array:
    """The maximum over the part of each window that lies in the image; -128 where none does."""
    return np.asarray(np.max(np.stack(_windows(x, -128, kernel, strides, padding, dilation)), axis=0), np.int8)


def avg_pool2d(
    x: Array,
    *,
    kernel: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[int],
    count_include_pad: bool,
    x_zero_point: int,
    ratio: float,
    zero_point: int,
    low: int | None = None,
    high: int | None = None,
    dilation: Sequence[int] = (1, 1),
) -> Array:
    """`requantize(sum(x - zx), float32(ratio / count))` per window; ratio (float64) is x_scale / y_scale.

    count: elements of the window that lie in the image, or kernel size when `count_include_pad` (padding is 0).
    """
    total = np.sum(np.stack(_windows(x.astype(np.int32) - x_zero_point, 0, kernel, strides, padding, dilation)), axis=0)
    inside = np.sum(np.stack(_windows(np.ones_like(x), 0, kernel, strides, padding, dilation)), axis=0)
    count = np.full_like(inside, kernel[0] * kernel[1]) if count_include_pad else np.maximum(inside, 1)
    return requantize(total, (np.float64(ratio) / count).astype(F32), zero_point, low, high)


def mean(
    x: Array,
    *,
    axes: Sequence[int],
    keepdims: bool,
    x_zero_point: int,
    ratio: float,
    zero_point: int,
    low: int | None = None,
    high: int | None = None,
    out_dtype: str = "int8",
) -> Array:
    """`requantize(sum(x - zx), float32(ratio / count))` over `axes`, x int8 or int16; ratio (float64) is x_scale / y_scale."""
    total = (x.astype(np.int64) - x_zero_point).sum(axis=tuple(axes), keepdims=bool(keepdims))
    count = math.prod(x.shape[a] for a in axes)
    return requantize(total, F32(np.float64(ratio) / count), zero_point, low, high, out_dtype)


# -- data movement --------------------------------------------------------------------------------------------------------------------


def concat(*xs: Array, axis: int) -> Array:
    return np.concatenate(xs, axis=axis)


def resize2d(
    x: Array,
    *,
    size: Sequence[int],
    method: str,
    iy0: Sequence[int],
    iy1: Sequence[int],
    wy: Sequence[int],
    ix0: Sequence[int],
    ix1: Sequence[int],
    wx: Sequence[int],
) -> Array:
    """nearest: `x[iy0][ix0]`. linear: the four corners weighted by 10-bit fixed-point weights, `requantize(acc, 2^-20)` with zero point 0."""
    if method == "nearest":
        return x[:, list(iy0)][:, :, list(ix0)]
    one = 1 << RESIZE_BITS
    v, h = np.asarray(wy, np.int64).reshape(1, -1, 1, 1), np.asarray(wx, np.int64).reshape(1, 1, -1, 1)
    wide = x.astype(np.int64)
    upper, lower = wide[:, list(iy0)], wide[:, list(iy1)]
    acc = (one - v) * ((one - h) * upper[:, :, list(ix0)] + h * upper[:, :, list(ix1)])
    acc = acc + v * ((one - h) * lower[:, :, list(ix0)] + h * lower[:, :, list(ix1)])
    return requantize(acc, 2.0 ** (-2 * RESIZE_BITS), 0)


def reshape(x: Array, *, shape: Sequence[int]) -> Array:
    return x.reshape(tuple(shape))


def transpose(x: Array, *, axes: Sequence[int]) -> Array:
    return np.ascontiguousarray(x.transpose(tuple(axes)))


def slice_(x: Array, *, begin: Sequence[int], end: Sequence[int], strides: Sequence[int]) -> Array:
    """`x[begin:end:strides]` per axis; full rank, non-negative, strides positive."""
    return np.ascontiguousarray(x[tuple(slice(b, e, s) for b, e, s in zip(begin, end, strides, strict=True))])


def pad(x: Array, *, pads: Sequence[Sequence[int]], value: int) -> Array:
    """Constant padding: [[before, after], ...] per axis, with the integer `value`."""
    return np.pad(x, [tuple(p) for p in pads], constant_values=x.dtype.type(value))


def select(x: Array, *, indices: Sequence[Sequence[int]]) -> Array:
    """Elements of x by their indices along each axis, from 0 on; an axis without indices is taken whole."""
    for axis, chosen in enumerate(indices):
        x = np.take(x, chosen, axis) if chosen else x
    return np.ascontiguousarray(x)


def gather(
    table: Array,
    ids: Array,
    multiplier: Array | None = None,
    *,
    table_zero_point: int = 0,
    zero_point: int = 0,
    low: int | None = None,
    high: int | None = None,
    out_dtype: str | None = None,
) -> Array:
    """Rows of table (int8 or int16 [V, C]) for ids (int32 or int64 [...]) -> [..., C].

    An id from -V to -1 counts from the end; whatever lies outside of [-V, V - 1] is the nearest id in it. Without a multiplier rows are copied; with one
    (float32 [1], or [V]: one per row) they become `requantize(row - table_zero_point, multiplier)` of `out_dtype`.
    """
    size, wide = table.shape[0], ids.astype(np.int64)
    index = np.clip(np.where(wide < 0, wide + size, wide), 0, size - 1)
    if multiplier is None:
        return np.asarray(table[index])
    factor = multiplier[index][..., None] if multiplier.size > 1 else multiplier
    return requantize(table[index].astype(np.int32) - table_zero_point, factor, zero_point, low, high, out_dtype or "int8")


# -- of any element type: elements that depend on one another in order ------------------------------------------------------------------


def cumulative(x: Array, *, axis: int, reduction: str, exclusive: bool, reverse: bool) -> Array:
    """Running sum ("add") or product ("mul") along `axis`, one element after the other in the type of `x`; exclusive: without the element itself."""
    lines = np.moveaxis(x, axis, 0)[:: -1 if reverse else 1]
    result, combine = np.empty_like(lines), np.multiply if reduction == "mul" else np.add
    result[0] = (reduction == "mul") if exclusive else lines[0]
    for i in range(1, len(lines)):
        result[i] = combine(result[i - 1], lines[i - 1 if exclusive else i])
    return np.ascontiguousarray(np.moveaxis(result[:: -1 if reverse else 1], 0, axis))


def top_k(x: Array, *, axis: int, k: int, largest: bool) -> Array:
    """int64: where along `axis` the k largest (smallest) elements are, best first; of equal ones the first comes first. NaN counts as the largest."""
    lines = np.moveaxis(x, axis, -1)
    length = lines.shape[-1]
    ascending = np.argsort(lines if not largest else lines[..., ::-1], axis=-1, kind="stable")  # backwards twice keeps the order of equal ones
    order = length - 1 - ascending[..., ::-1] if largest else ascending
    return np.ascontiguousarray(np.moveaxis(order[..., :k], -1, axis)).astype(np.int64)


def scatter_rows(data: Array, indices: Array, updates: Array, *, reduction: str) -> Array:
    """`data` [R, W] with row `indices[m]` (int64 [M]) replaced by, or combined with, row m of `updates` [M, W], in order; rows outside of `data` are left out.

    reduction: "none", "add", "mul", "max" or "min".
    """
    combine: Callable[[Array, Array], Array] = {"add": np.add, "mul": np.multiply, "max": np.maximum, "min": np.minimum}.get(reduction, lambda old, new: new)
    result = data.copy()
    for row, update in zip(indices.tolist(), updates, strict=True):
        if 0 <= row < len(result):
            result[row] = combine(result[row], update)
    return result


def bitcast(x: Array, *, dtype: str) -> Array:
    """The same bytes as elements of another type of the same width."""
    return np.ascontiguousarray(x).view(dtype)


# -- float groups, for tests with a tolerance -----------------------------------------------------------------------------------------


def f32_conv2d(
    x: Array,
    w: Array,
    bias: Array,
    residual: Array | None = None,
    *,
    strides: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    low: float,
    high: float,
) -> Array:
    """float32 convolution with bias, residual and clamp; the order of the sum is free, so kernels agree only to rounding."""
    y = convolve(x.astype(np.float64), w.astype(np.float64), strides, padding, dilation, groups) + bias.astype(np.float64)
    return np.asarray(np.clip(y if residual is None else y + residual, low, high), F32)


def f32_conv2d_transpose(
    x: Array,
    w: Array,
    bias: Array,
    *,
    strides: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    low: float,
    high: float,
) -> Array:
    """float32 transposed convolution with bias and clamp, as `f32_conv2d`."""
    y = scatter(x.astype(np.float64), w.astype(np.float64), strides, padding, output_padding, dilation, groups) + bias.astype(np.float64)
    return np.asarray(np.clip(y, low, high), F32)


def f32_dense(x: Array, w: Array, bias: Array, residual: Array | None = None, *, low: float, high: float) -> Array:
    """float32 dense layer over the last axis, as `f32_conv2d`."""
    y = x.astype(np.float64) @ w.astype(np.float64).T + bias.astype(np.float64)
    return np.asarray(np.clip(y if residual is None else y + residual, low, high), F32)


def f32_dense_weight_only(
    x: Array, q: Array, zero_point: Array, scale: Array, bias: Array, residual: Array | None = None, *, bits: int, group_size: int, low: float, high: float
) -> Array:
    """`f32_dense` with weights `w = f32(f32(q - z) * s)`: q int8 [N, K] of `bits` bits, z int8 and s float32 [N, G], one per `group_size` weights of a row."""
    assert -(1 << (bits - 1)) <= int(q.min()) and int(q.max()) < 1 << (bits - 1), bits
    zero, factor = (np.repeat(a, min(group_size, q.shape[1]), axis=1)[:, : q.shape[1]] for a in (zero_point, scale))
    w = (q.astype(F32) - zero.astype(F32)) * factor.astype(F32)
    return f32_dense(x, w, bias, residual, low=low, high=high)


OPERATORS: dict[str, Callable[..., Any]] = {
    "qc.quantize": quantize,
    "qc.dequantize": dequantize,
    "qc.pixels": pixels,
    "qc.enter": enter,
    "qc.leave": leave,
    "qc.requantize": rescale,
    "qc.conv2d": conv2d,
    "qc.conv2d_transpose": conv2d_transpose,
    "qc.dense": dense,
    "qc.matmul": matmul,
    "qc.add": add,
    "qc.mul": mul,
    "qc.lut": lut,
    "qc.prelu": prelu,
    "qc.lut16": lut16,
    "qc.max_pool2d": max_pool2d,
    "qc.avg_pool2d": avg_pool2d,
    "qc.mean": mean,
    "qc.layer_norm": layer_norm,
    "qc.rms_norm": rms_norm,
    "qc.softmax": softmax,
    "qc.recurrence": recurrence,
    "qc.f32.recurrence": f32_recurrence,
    "qc.attention": attention,
    "qc.concat": concat,
    "qc.resize2d": resize2d,
    "qc.resample": resample,
    "qc.reshape": reshape,
    "qc.transpose": transpose,
    "qc.slice": slice_,
    "qc.pad": pad,
    "qc.select": select,
    "qc.gather": gather,
    "qc.cumulative": cumulative,
    "qc.top_k": top_k,
    "qc.scatter": scatter_rows,
    "qc.bitcast": bitcast,
    "qc.f32.conv2d": f32_conv2d,
    "qc.f32.conv2d_transpose": f32_conv2d_transpose,
    "qc.f32.dense": f32_dense,
    "qc.f32.dense_weight_only": f32_dense_weight_only,
}
