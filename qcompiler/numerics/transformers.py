"""Normalization, softmax and attention in exact integers: docs/numerics.md, sections 8 to 10, is normative.

Every float step is one correctly rounded float32 operation, and none is an addition behind a product.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from qcompiler.numerics.arithmetic import F32, Array, requantize, to_int
from qcompiler.numerics.constants import ATTENTION, NORM_BITS, NORM_LIMIT, SOFTMAX, attention_fault, thresholds


def layer_norm(
    x: Array, gain: Array, shift: Array, *, epsilon: float, zero_point: int = 0, low: int | None = None, high: int | None = None, out_dtype: str = "int8"
) -> Array:
    """x int8 or int16 [..., N], gain float32 [N], shift int32 [N] (`constants.layer_norm_parameters`); the zero point of x cancels. N <= 32768."""
    q, n = x.astype(np.int64), x.shape[-1]
    total = q.sum(-1, keepdims=True)
    variance = n * (q * q).sum(-1, keepdims=True) - total * total
    return _normalized(n * q - total, variance, gain, shift, epsilon, zero_point, low, high, out_dtype)


def rms_norm(
    x: Array,
    gain: Array,
    shift: Array,
    *,
    x_zero_point: int,
    epsilon: float,
    zero_point: int = 0,
    low: int | None = None,
    high: int | None = None,
    out_dtype: str = "int8",
) -> Array:
    """x int8 or int16 [..., N], gain float32 [N], shift int32 [N] (`constants.rms_norm_parameters`). N <= 32768."""
    q = x.astype(np.int64) - x_zero_point
    return _normalized(q, (q * q).sum(-1, keepdims=True), gain, shift, epsilon, zero_point, low, high, out_dtype)


def _normalized(
    centered: Array, square: Array, gain: Array, shift: Array, epsilon: float, zero_point: int, low: int | None, high: int | None, out_dtype: str
) -> Array:
    """Two products, then integers: `requantize(int32(centered / sqrt(square + epsilon) * gain) + shift, 2^-8)`."""
    inverse = F32(1) / np.sqrt(square.astype(F32) + F32(epsilon))
    unit = centered.astype(np.int32).astype(F32) * inverse
    scaled = to_int(unit * gain.astype(F32), -NORM_LIMIT, NORM_LIMIT)
    return requantize(scaled + shift.astype(np.int32), 2.0**-NORM_BITS, zero_point, low, high, out_dtype)


def softmax(
    x: Array, *, multiplier: float, steps: float, zero_point: int = 0, low: int | None = None, high: int | None = None, out_dtype: str = "int8"
) -> Array:
    """Over the last axis of x (int8 or int16; its zero point cancels). multiplier: the scale of x times `SOFTMAX.steps`; steps: 1 / output scale."""
    q = x.astype(np.int32)
    e = SOFTMAX.table[SOFTMAX.index(q.max(-1, keepdims=True) - q, F32(multiplier))]
    return requantize(e, F32(steps) / e.sum(-1, keepdims=True, dtype=np.int32).astype(F32), zero_point, low, high, out_dtype)


def attention(
    q: Array,
    k: Array,
    v: Array,
    multiplier: Array,
    out_multiplier: Array,
    *extras: Array,
    heads: int,
    kv_heads: int,
    size: int,
    value_size: int,
    columns: Sequence[int],
    zero_points: Sequence[int],
    extra: Sequence[str] = (),
    bias_multipliers: Sequence[int] = (),
    causal: int | None = None,
    zero_point: int = 0,
    low: int | None = None,
    high: int | None = None,
    out_dtype: str = "int8",
) -> Array:
    """Attention of q int8 [B, S, *] over k and v int8 [B, T, *], heads packed side by side -> [B, S, heads * value_size].

    Head h of q is columns `columns[0] + h * size` on; of k and v, that of `h * kv_heads // heads`, behind `columns[1]` and `columns[2]`. One tensor may
    be all three. multiplier, out_multiplier float32 [heads] (`constants.attention_multipliers`). extra names the operands that follow: "bias" (integers
    [B', 1 or heads, 1 or S, T], B' a divisor of B: row b reads b mod B'), which times `bias_multipliers` (one, or one per head) is added to q . k;
    "mask" (integers or bool of such a shape), not 0 where a key counts; "lengths" (integers [B]), how many keys count, clipped to [0, T]. causal: key j
    counts for query i where j <= i + causal. Where none counts, all do, as if every q . k were the same. Raises ValueError as `attention_fault` says.
    """
    sizes = {"heads": heads, "kv_heads": kv_heads, "size": size, "value_size": value_size, "columns": columns, "zero_points": zero_points}
    shapes = [x.shape for x in (q, k, v, multiplier, out_multiplier, *extras)]
    fault = attention_fault(shapes, sizes | {"extra": extra, "bias_multipliers": bias_multipliers})
    if fault:
        raise ValueError(fault)
    (b, s, _), t = q.shape, k.shape[1]
    given = dict(zip(extra, extras, strict=True))

    def split(tensor: Array, first: int, count: int, width: int, zero: int) -> Array:
        part = tensor[:, :, first : first + count * width].astype(np.float64) - zero
        return part.reshape(b, -1, count, width).transpose(0, 2, 1, 3)

    queries = split(q, columns[0], heads, size, zero_points[0])
    keys, values = (
        np.repeat(split(x, columns[i], kv_heads, width, zero_points[i]), heads // kv_heads, axis=1) for i, x, width in ((1, k, size), (2, v, value_size))
    )
    acc = (queries @ keys.swapaxes(-1, -2)).astype(np.int64)
    if "bias" in given:
        acc = acc + _batched(given["bias"], b).astype(np.int64) * np.asarray(bias_multipliers, np.int64).reshape(-1, 1, 1)
    counts = _counted(acc.shape, given, causal)
    nothing = ~counts.any(-1, keepdims=True)
    largest = np.where(counts, acc, np.iinfo(np.int32).min).max(-1, keepdims=True)
    index = ATTENTION.index(np.where(counts, largest - acc, 0), multiplier.astype(F32).reshape(-1, 1, 1))
    e = np.where(nothing, ATTENTION.table[0], np.where(counts, ATTENTION.table[index], 0))
    p = (e + thresholds(t)) >> 7
    total = (p.astype(np.float64) @ values).astype(np.int64)
    scale = out_multiplier.astype(F32).reshape(-1, 1, 1) / p.sum(-1, keepdims=True, dtype=np.int32).astype(F32)
    return requantize(total, scale, zero_point, low, high, out_dtype).transpose(0, 2, 1, 3).reshape(b, s, -1)


def _counted(shape: tuple[int, ...], given: Mapping[str, Array], causal: int | None) -> Array:
    """bool [B, heads, S, T]: which keys count for a query, by the operands "mask" and "lengths" and by `causal` (see `attention`)."""
    b, _, s, t = shape
    counts = np.ones(shape, bool)
    if "mask" in given:
        counts &= _batched(given["mask"], b) != 0
    if "lengths" in given:
        counts &= np.arange(t) < given["lengths"].reshape(-1, 1, 1, 1)
    if causal is not None:
        counts &= np.arange(t) <= np.arange(s)[:, None] + causal
    return counts


def _batched(tensor: Array, b: int) -> Array:
    """[B', ...] repeated to [B, ...]: row b is row b mod B'."""
    return np.tile(tensor, (b // tensor.shape[0], 1, 1, 1))
