"""Images brought to another size, in integers: separable filters with fixed-point weights, antialiased (docs/numerics.md, section 7).

The arithmetic is that of Pillow's `Image.resize` on 8-bit images (its file Resample.c), so that a library's own resizing gives the very pixels which the
reference pipeline gives: weights in multiples of 2^-22, the columns first, uint8 between the two passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

BITS = 22  # behind the binary point of a weight: 255 * 2^22 times a filter's sum of absolute weights (at most 1.5) fits 31 bits


def _bilinear(x: float) -> float:
    return max(0.0, 1.0 - abs(x))


def _bicubic(x: float) -> float:
    """Keys' kernel with a = -1/2."""
    x, a = abs(x), -0.5
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


FILTERS = {"bilinear": (_bilinear, 1.0), "bicubic": (_bicubic, 2.0)}  # function, and where it ends


def resample_weights(old: int, new: int, method: str) -> tuple[list[int], np.ndarray]:
    """For each of `new` positions along an axis: the first of `old` positions that it is made of, and the weights of that and the next ones in multiples of
    2^-22, int32 [new, taps].

    Reduced images are antialiased: the filter is widened by old / new, so that every pixel counts. Raises ValueError for an unknown method.
    """
    if method not in FILTERS:
        raise ValueError(f"resampling by '{method}' is not supported; supported: {', '.join(FILTERS)}")
    function, end = FILTERS[method]
    scale = old / new
    wide = max(scale, 1.0)
    first, rows = [], []
    for j in range(new):
        center = (j + 0.5) * scale
        begin, stop = max(0, int(center - end * wide + 0.5)), min(old, int(center + end * wide + 0.5))
        weights = [function((i - center + 0.5) * (1.0 / wide)) for i in range(begin, stop)]
        total = 0.0
        for w in weights:  # in this order: the sum's rounding counts
            total += w
        rows.append([int(math.copysign(0.5, w) + w / total * (1 << BITS)) for w in weights])
        first.append(begin)
    taps = max(map(len, rows))
    table = np.zeros((new, taps), np.int32)
    for j, row in enumerate(rows):
        shift = max(0, first[j] + taps - old)  # so that reads stay inside: zeros come first then
        first[j] -= shift
        table[j, shift : shift + len(row)] = row
    return first, table


def resample(x: np.ndarray, *, axis: int, first: Sequence[int], weights: Sequence[int]) -> np.ndarray:
    """uint8 along `axis`: `clip((2^21 + sum over t of weights[j, t] * x[first[j] + t]) >> 22, 0, 255)`; weights: [len(first), taps], flat."""
    table = np.asarray(weights, np.int64).reshape(len(first), -1)
    moved = np.moveaxis(x, axis, -1).astype(np.int64)
    total = (moved[..., np.asarray(first)[:, None] + np.arange(table.shape[1])] * table).sum(-1)
    return np.ascontiguousarray(np.moveaxis(np.clip((total + (1 << (BITS - 1))) >> BITS, 0, 255).astype(np.uint8), -1, axis))
