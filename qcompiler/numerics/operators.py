"""The reference arithmetic: what every `qc.*` operator means, in numpy. Compiled code equals it bit for bit.

Normative text: docs/numerics.md. Tensors are canonical int8 (images NHWC) unless said otherwise; attributes are keyword arguments of the names in
docs/architecture.md. Integer sums are exact here: they are formed in float64, whose products and sums of int8 data are integers far below 2^53.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qcompiler.numerics.spec import RESIDUAL_LIMIT, RESIZE_BITS

Array = np.ndarray
F32 = np.float32


def requantize(acc: Array, multiplier: Array | np.float32 | float, zero_point: int, low: int = -128, high: int = 127) -> Array:
    """int8: `int32(rint(clip(float32(acc) * multiplier, low - z, high - z))) + z`.

    One conversion, one multiplication, both rounded to nearest even; clipping while still float, because conversion of out-of-range floats differs
    between machines; rint to even. acc: integers in int32; multiplier: float32, broadcast.
    """
    scaled = np.asarray(acc).astype(np.int32).astype(F32) * np.asarray(multiplier, F32)
    clipped = np.clip(scaled, F32(low - zero_point), F32(high - zero_point))
    return (np.rint(clipped).astype(np.int32) + np.int32(zero_point)).astype(np.int8)


def quantize(x: Array, *, scale: float, zero_point: int, low: int = -128, high: int = 127, axes: Sequence[int] | None = None) -> Array:
    """float32 -> int8. `clip(x * float32(1 / scale))`, rint to even, plus zero point; NaN becomes `high`. Then transposed by `axes`."""
    scaled = np.asarray(x, F32) * F32(1.0 / float(F32(scale)))
    top, bottom = F32(high - zero_point), F32(low - zero_point)
    scaled = np.where(scaled < top, scaled, top)  # in this order, NaN ends at the top: what min and max instructions do
    scaled = np.where(scaled > bottom, scaled, bottom)
    q = (np.rint(scaled).astype(np.int32) + zero_point).astype(np.int8)
    return q if axes is None else np.ascontiguousarray(q.transpose(axes))


def dequantize(q: Array, *, scale: float, zero_point: int, axes: Sequence[int] | None = None) -> Array:
    """int8 -> float32: transposed by `axes`, then `float32(q - zero_point) * scale`."""
    q = q if axes is None else q.transpose(axes)
    return np.ascontiguousarray((q.astype(np.int32) - zero_point).astype(F32) * F32(scale))


# -- products -------------------------------------------------------------------------------------------------------------------------


def finish(
    acc: Array,
    multiplier: Array,
    residual: Array | None,
    *,
    zero_point: int,
    low: int,
    high: int,
    out_dtype: str,
    residual_zero_point: int,
    residual_multiplier: int | None,
    residual_shift: int,
    float_low: float | None,
    float_high: float | None,
) -> Array:
    """The epilogue of conv2d, conv2d_transpose and dense: from int32 accumulators [..., O] to the output.

    Raises ValueError for a residual that has no residual_multiplier, or whose output is float32: neither has a meaning.
    """
    acc = acc.astype(np.int32)
    if out_dtype == "float32":
        if residual is not None:
            raise ValueError("a residual is added before the last rounding to int8; a float32 output has none, so add it there with an operator of its own")
        real = acc.astype(F32) * np.asarray(multiplier, F32)
        if float_low is not None:
            real = np.maximum(real, F32(float_low))
        return real if float_high is None else np.minimum(real, F32(float_high))
    if residual is None:
        return requantize(acc, multiplier, zero_point, low, high)
    if residual_multiplier is None:
        raise ValueError("a residual needs its residual_multiplier (and residual_shift); spec.residual_parameters makes both")
    limit = F32(RESIDUAL_LIMIT)
    share = np.rint(np.clip(acc.astype(F32) * np.asarray(multiplier, F32), -limit, limit)).astype(np.int32)
    total = share + (residual.astype(np.int32) - residual_zero_point) * np.int32(residual_multiplier)
    return requantize(total, 2.0**-residual_shift, zero_point, low, high)


def conv2d(
    x: Array,
    w: Array,
    bias: Array,
    multiplier: Array,
    residual: Array | None = None,
    *,
    strides: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    x_zero_point: int,
    zero_point: int = 0,
    low: int = -128,
    high: int = 127,
    out_dtype: str = "int8",
    residual_zero_point: int = 0,
    residual_multiplier: int | None = None,
    residual_shift: int = 0,
    float_low: float | None = None,
    float_high: float | None = None,
) -> Array:
    """x [N,H,W,I], w [O,KH,KW,I/groups], bias int32 [O], multiplier float32 [O], residual like the output. padding: top, left, bottom, right.

    `acc = bias + sum((x - x_zero_point) * w)`; padding contributes 0.
    """
    acc = convolve(x.astype(np.float64) - x_zero_point, w.astype(np.float64), strides, padding, dilation, groups)
    return finish(
        acc.astype(np.int64) + bias.astype(np.int64),
        multiplier,
        residual,
        zero_point=zero_point,
        low=low,
        high=high,
        out_dtype=out_dtype,
        residual_zero_point=residual_zero_point,
        residual_multiplier=residual_multiplier,
        residual_shift=residual_shift,
        float_low=float_low,
        float_high=float_high,
    )


def convolve(x: Array, w: Array, strides: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> Array:
    """Plain correlation in the operands' float dtype: x [N,H,W,I], w [O,KH,KW,I/groups] -> [N,OH,OW,O]; zeros outside."""
    top, left, bottom, right = padding
    outputs, kh, kw, inputs = w.shape
    x = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    n, height, width, _ = x.shape
    oh = (height - (kh - 1) * dilation[0] - 1) // strides[0] + 1
    ow = (width - (kw - 1) * dilation[1] - 1) // strides[1] + 1
    acc = np.zeros((n, oh, ow, outputs), x.dtype)
    depthwise = groups > 1 and inputs == 1 and outputs == groups
    for i in range(kh):
        for j in range(kw):
            window = x[:, i * dilation[0] :, j * dilation[1] :][:, : (oh - 1) * strides[0] + 1 : strides[0], : (ow - 1) * strides[1] + 1 : strides[1]]
            if depthwise:
                acc += window * w[:, i, j, 0]
                continue
            for g in range(groups):
                out = slice(g * outputs // groups, (g + 1) * outputs // groups)
                acc[..., out] += window[..., g * inputs : (g + 1) * inputs] @ w[out, i, j].T
    return acc


def conv2d_transpose(
    x: Array,
    w: Array,
    bias: Array,
    multiplier: Array,
    *,
    strides: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    x_zero_point: int,
    zero_point: int = 0,
    low: int = -128,
    high: int = 127,
    out_dtype: str = "int8",
    float_low: float | None = None,
    float_high: float | None = None,
) -> Array:
    """ONNX ConvTranspose: x [N,H,W,I], w [O,KH,KW,I/groups]. Each `x - x_zero_point` is scattered times w, then `padding` is cropped away."""
    acc = scatter(x.astype(np.float64) - x_zero_point, w.astype(np.float64), strides, padding, output_padding, dilation, groups)
    return finish(
        acc.astype(np.int64) + bias.astype(np.int64),
        multiplier,
        None,
        zero_point=zero_point,
        low=low,
        high=high,
        out_dtype=out_dtype,
        residual_zero_point=0,
        residual_multiplier=None,
        residual_shift=0,
        float_low=float_low,
        float_high=float_high,
    )


def scatter(x: Array, w: Array, strides: Sequence[int], padding: Sequence[int], output_padding: Sequence[int], dilation: Sequence[int], groups: int) -> Array:
    """The transpose of `convolve` in the operands' float dtype: x [N,H,W,I], w [O,KH,KW,I/groups] -> [N,OH,OW,O]."""
    top, left, bottom, right = padding
    outputs, kh, kw, inputs = w.shape
    n, height, width, _ = x.shape
    full_h = (height - 1) * strides[0] + (kh - 1) * dilation[0] + 1 + output_padding[0]
    full_w = (width - 1) * strides[1] + (kw - 1) * dilation[1] + 1 + output_padding[1]
    acc = np.zeros((n, full_h, full_w, outputs), x.dtype)
    for i in range(kh):
        for j in range(kw):
            target = acc[:, i * dilation[0] :, j * dilation[1] :][:, : (height - 1) * strides[0] + 1 : strides[0], : (width - 1) * strides[1] + 1 : strides[1]]
            for g in range(groups):
                out = slice(g * outputs // groups, (g + 1) * outputs // groups)
                target[..., out] += x[..., g * inputs : (g + 1) * inputs] @ w[out, i, j].T
    return acc[:, top : full_h - bottom, left : full_w - right]


def dense(
    x: Array,
    w: Array,
    bias: Array,
    multiplier: Array,
    residual: Array | None = None,
    *,
    x_zero_point: int,
    zero_point: int = 0,
    low: int = -128,
    high: int = 127,
    out_dtype: str = "int8",
    residual_zero_point: int = 0,
    residual_multiplier: int | None = None,
    residual_shift: int = 0,
    float_low: float | None = None,
    float_high: float | None = None,
) -> Array:
    """x [..., K], w [N, K], bias int32 [N], multiplier float32 [N] -> [..., N]."""
    acc = (x.astype(np.float64) - x_zero_point) @ w.astype(np.float64).T
    return finish(
        acc.astype(np.int64) + bias.astype(np.int64),
        multiplier,
        residual,
        zero_point=zero_point,
        low=low,
        high=high,
        out_dtype=out_dtype,
        residual_zero_point=residual_zero_point,
        residual_multiplier=residual_multiplier,
        residual_shift=residual_shift,
        float_low=float_low,
        float_high=float_high,
    )


def matmul(
    a: Array,
    b: Array,
    *,
    a_zero_point: int,
    b_zero_point: int,
    multiplier: float,
    zero_point: int = 0,
    low: int = -128,
    high: int = 127,
    out_dtype: str = "int8",
    float_low: float | None = None,
    float_high: float | None = None,
) -> Array:
    """a [..., M, K], b [..., K, N], both computed at run time; batch axes broadcast."""
    acc = (a.astype(np.float64) - a_zero_point) @ (b.astype(np.float64) - b_zero_point)
    return finish(
        acc.astype(np.int64),
        np.asarray(multiplier),
        None,
        zero_point=zero_point,
        low=low,
        high=high,
        out_dtype=out_dtype,
        residual_zero_point=0,
        residual_multiplier=None,
        residual_shift=0,
        float_low=float_low,
        float_high=float_high,
    )


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
    low: int = -128,
    high: int = 127,
) -> Array:
    """`requantize((a - za) * A + (b - zb) * B, 2^-shift)`; broadcasting; a negative B subtracts."""
    acc = (a.astype(np.int64) - a_zero_point) * a_multiplier + (b.astype(np.int64) - b_zero_point) * b_multiplier
    return requantize(acc, 2.0**-shift, zero_point, low, high)


def mul(a: Array, b: Array, *, a_zero_point: int, b_zero_point: int, multiplier: float, zero_point: int, low: int = -128, high: int = 127) -> Array:
    """`requantize((a - za) * (b - zb), multiplier)`; broadcasting."""
    return requantize((a.astype(np.int64) - a_zero_point) * (b.astype(np.int64) - b_zero_point), multiplier, zero_point, low, high)


def lut(x: Array, table: Array) -> Array:
    """`table[x + 128]`, table int8 [256]."""
    return table[x.astype(np.int32) + 128]


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
    low: int = -128,
    high: int = 127,
    dilation: Sequence[int] = (1, 1),
) -> Array:
    """`requantize(sum(x - zx), float32(ratio / count))` per window; ratio (float64) is x_scale / y_scale.

    count: elements of the window that lie in the image, or kernel size when `count_include_pad` (padding is 0).
    """
    total = np.sum(np.stack(_windows(x.astype(np.int32) - x_zero_point, 0, kernel, strides, padding, dilation)), axis=0)
    inside = np.sum(np.stack(_windows(np.ones_like(x), 0, kernel, strides, padding, dilation)), axis=0)
    count = np.full_like(inside, kernel[0] * kernel[1]) if count_include_pad else np.maximum(inside, 1)
    return requantize(total, (np.float64(ratio) / count).astype(F32), zero_point, low, high)


def mean(x: Array, *, axes: Sequence[int], keepdims: bool, x_zero_point: int, ratio: float, zero_point: int, low: int = -128, high: int = 127) -> Array:
    """`requantize(sum(x - zx), float32(ratio / count))` over `axes`; ratio (float64) is x_scale / y_scale."""
    total = (x.astype(np.int64) - x_zero_point).sum(axis=tuple(axes), keepdims=bool(keepdims))
    count = math.prod(x.shape[a] for a in axes)
    return requantize(total, F32(np.float64(ratio) / count), zero_point, low, high)


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
    """Constant padding: [[before, after], ...] per axis, with the int8 `value`."""
    return np.pad(x, [tuple(p) for p in pads], constant_values=np.int8(value))


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


def f32_dense(x: Array, w: Array, bias: Array, residual: Array | None = None, *, low: float, high: float) -> Array:
    """float32 dense layer over the last axis, as `f32_conv2d`."""
    y = x.astype(np.float64) @ w.astype(np.float64).T + bias.astype(np.float64)
    return np.asarray(np.clip(y if residual is None else y + residual, low, high), F32)


def f32_dense_weight_only(
    x: Array, q: Array, zero_point: Array, scale: Array, bias: Array, residual: Array | None = None, *, bits: int, group_size: int, low: float, high: float
) -> Array:
    """`f32_dense` with weights `w = f32(f32(q - z) * s)`: q int8 [N, K] of `bits` bits, z int8 and s float32 [N, G], one per `group_size` weights of a row."""
    assert -(1 << (bits - 1)) <= int(q.min()) and int(q.max()) < 1 << (bits - 1), bits
    zero, factor = (np.repeat(a, group_size, axis=1)[:, : q.shape[1]] for a in (zero_point, scale))
    w = (q.astype(F32) - zero.astype(F32)) * factor.astype(F32)
    return f32_dense(x, w, bias, residual, low=low, high=high)


OPERATORS: dict[str, Callable[..., Any]] = {
    "qc.quantize": quantize,
    "qc.dequantize": dequantize,
    "qc.conv2d": conv2d,
    "qc.conv2d_transpose": conv2d_transpose,
    "qc.dense": dense,
    "qc.matmul": matmul,
    "qc.add": add,
    "qc.mul": mul,
    "qc.lut": lut,
    "qc.max_pool2d": max_pool2d,
    "qc.avg_pool2d": avg_pool2d,
    "qc.mean": mean,
    "qc.concat": concat,
    "qc.resize2d": resize2d,
    "qc.reshape": reshape,
    "qc.transpose": transpose,
    "qc.slice": slice_,
    "qc.pad": pad,
    "qc.f32.conv2d": f32_conv2d,
    "qc.f32.dense": f32_dense,
    "qc.f32.dense_weight_only": f32_dense_weight_only,
}
