"""Convolution, dense layers and products of two computed tensors: docs/numerics.md, section 3, is normative.

Integer sums are exact here: they are formed in float64, whose products and sums of int8 data are integers far below 2^53.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qcompiler.numerics.arithmetic import F32, Array, requantize, to_int
from qcompiler.numerics.spec import RESIDUAL_LIMIT


def by_sign(number: Array, multiplier: Array) -> Array:
    """float32: the multiplier of each integer [..., O]: a scalar, [O], or [2, O], whose second row is for negative numbers."""
    rows = np.asarray(multiplier, F32)
    return np.where(number < 0, rows[1], rows[0]) if rows.ndim > 1 else rows


def finish(
    acc: Array,
    multiplier: Array,
    residual: Array | None,
    *,
    zero_point: int,
    low: int | None,
    high: int | None,
    out_dtype: str,
    residual_zero_point: int,
    residual_multiplier: int | None,
    residual_shift: int,
    bends_sum: bool = False,
    float_low: float | None,
    float_high: float | None,
) -> Array:
    """The epilogue of conv2d, conv2d_transpose and dense: from int32 accumulators [..., O] to the output. multiplier: as `by_sign` reads it, of the
    accumulators; with bends_sum its second row is that of negative sums with the residual.

    Raises ValueError for a residual that has no residual_multiplier, or whose output is float32, and for bends_sum without one: none has a meaning.
    """
    acc = acc.astype(np.int32)
    if bends_sum and (residual is None or np.ndim(multiplier) < 2):
        raise ValueError("bends_sum says that the multiplier's second row is that of sums with a residual; it needs both")
    if out_dtype == "float32":
        if residual is not None:
            raise ValueError(
                "a residual is added before the last rounding to an integer; a float32 output has none, so add it there with an operator of its own"
            )
        real: Array = acc.astype(F32) * by_sign(acc, multiplier)
        if float_low is not None:
            real = np.maximum(real, F32(float_low))
        return real if float_high is None else np.minimum(real, F32(float_high))
    if residual is None:
        return requantize(acc, by_sign(acc, multiplier), zero_point, low, high, out_dtype)
    if residual_multiplier is None:
        raise ValueError("a residual needs its residual_multiplier (and residual_shift); spec.residual_parameters makes both")
    share = to_int(acc.astype(F32) * (np.asarray(multiplier[0], F32) if bends_sum else by_sign(acc, multiplier)), -RESIDUAL_LIMIT, RESIDUAL_LIMIT)
    total = share + (residual.astype(np.int32) - residual_zero_point) * np.int32(residual_multiplier)
    scale = F32(2.0**-residual_shift)
    return requantize(total, np.where(total < 0, np.asarray(multiplier[1], F32), scale) if bends_sum else scale, zero_point, low, high, out_dtype)


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
    low: int | None = None,
    high: int | None = None,
    out_dtype: str = "int8",
    residual_zero_point: int = 0,
    residual_multiplier: int | None = None,
    residual_shift: int = 0,
    bends_sum: bool = False,
    float_low: float | None = None,
    float_high: float | None = None,
) -> Array:
    """x [N,H,W,I], w [O,KH,KW,I/groups], bias int32 [O], multiplier float32 [O] or [2, O], residual like the output. padding: top, left, bottom, right.

    `acc = bias + sum((x - x_zero_point) * w)`; padding contributes 0. The rest is `finish`.
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
        bends_sum=bends_sum,
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
    low: int | None = None,
    high: int | None = None,
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
    low: int | None = None,
    high: int | None = None,
    out_dtype: str = "int8",
    residual_zero_point: int = 0,
    residual_multiplier: int | None = None,
    residual_shift: int = 0,
    bends_sum: bool = False,
    float_low: float | None = None,
    float_high: float | None = None,
) -> Array:
    """x [..., K], w [N, K], bias int32 [N], multiplier float32 [N] or [2, N] -> [..., N]; `finish`."""
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
        bends_sum=bends_sum,
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
    low: int | None = None,
    high: int | None = None,
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
