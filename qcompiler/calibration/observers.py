"""Observers: from the histogram of a value to the range that 8 bits should cover, and what that range costs.

An observer only proposes a range [low, high]; ranges are widened to contain 0 (`QParams.from_range`), so that 0 is exact.
`relative_error` judges any range on the same histogram, which is how a plan compares observers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from qcompiler.calibration.histogram import BINS, Histogram
from qcompiler.numerics.metrics import masked
from qcompiler.numerics.spec import QParams

Range = tuple[float, float]
Observer = Callable[[Histogram], Range]


def squared_error(histogram: Histogram, params: QParams) -> float:
    """Expected squared error E[(x - dequantize(quantize(x)))^2] over all values, in squared units of the value."""
    return _means(histogram, *_plain(histogram), [params])[0]


def relative_error(histogram: Histogram, params: QParams) -> float:
    """The mean over samples of (sum of squared errors) / (sum of squares): what a plan minimises; -10 log10 of it is an SQNR in dB."""
    return _means(histogram, *_by_sample(histogram), [params])[0]


def sqnr_db(histogram: Histogram, params: QParams) -> float:
    """What a range leaves, in dB: -10 log10 of `relative_error`, of the values that can matter (see `metrics.masked`); inf for no error."""
    error = relative_error(histogram, params)
    middle = (histogram.edges[1:] + histogram.edges[:-1]) / 2
    used = np.flatnonzero(histogram.relative)
    if (out := masked(middle[used])) is not None:
        kept = used[~out]
        weight = histogram.relative[kept]
        error = float(weight @ _bin_errors(histogram, [params])[0, kept]) / float(weight @ np.square(middle[kept]))
    return -10 * math.log10(error) if error > 0 else math.inf


_Weights = Callable[[Histogram], tuple[np.ndarray, int]]
"""float64[bins], how much an error in each counts; what their sum is divided by."""


def result_db(function: Callable[[np.ndarray], np.ndarray], histogram: Histogram, params: QParams) -> float:
    """SQNR in dB of an elementwise function's result when its argument, of which `histogram` tells, is rounded; each bin counts as a value in its middle."""
    used = np.flatnonzero(histogram.counts)
    x, weight = (histogram.edges[used] + histogram.edges[used + 1]) / 2, histogram.counts[used]
    wanted = function(x)
    noise = float(np.sum(weight * np.square(function(params.dequantize(params.quantize(x))) - wanted)))
    power = float(np.sum(weight * np.square(wanted)))
    return math.inf if noise == 0 else 10 * math.log10(power / noise) if power else -math.inf


def _plain(histogram: Histogram) -> tuple[np.ndarray, int]:
    return histogram.nonzero, histogram.total


def _by_sample(histogram: Histogram) -> tuple[np.ndarray, int]:
    return histogram.relative, histogram.powered


def _means(histogram: Histogram, weights: np.ndarray, count: int, params: Sequence[QParams]) -> list[float]:
    """The mean error of each of several quantizations."""
    return [float(weights @ errors) / max(count, 1) for errors in _bin_errors(histogram, params)]


def _bin_errors(histogram: Histogram, params: Sequence[QParams]) -> np.ndarray:
    """Expected squared error of one value in each bin, float64[params, bins].

    Values are taken as uniform within their bin (exact zeros, whose error is 0, the caller leaves out). With s the scale and [l, h] the
    representable range, the squared error is (x - s*rint(x/s))^2 inside, (x - l)^2 below and (x - h)^2 above; each has a closed
    antiderivative, so the integral over a bin is a difference of two values of it, exact for bins wider and narrower than a step alike.
    Inside: with t = x/s = n + r, n = rint(t), F(x) = s^3 * (n/12 + r^3/3), since every whole step contributes s^3/12.
    """
    scale, cubed = (np.array(v)[:, None] for v in ([p.scale for p in params], [p.scale**3 for p in params]))
    bottom, top = (np.array(v)[:, None] for v in zip(*(p.range for p in params), strict=True))
    edges = histogram.edges
    inside = np.clip(edges, bottom, top)
    steps = inside / scale
    whole = np.rint(steps)
    rest, beyond = steps - whole, edges - inside
    integral = cubed * (whole / 12 + rest * rest * rest / 3) + beyond * beyond * beyond / 3
    errors: np.ndarray = np.diff(integral) / histogram.width
    return errors


def min_max(histogram: Histogram) -> Range:
    """Everything seen: nothing clips."""
    return histogram.low, histogram.high


def moving_average(histogram: Histogram) -> Range:
    """The mean over samples of each sample's extremes: the limit of the exponential moving average of Jacob et al. 2018 (arXiv:1712.05877,
    section 3.1), without its dependence on the order of samples."""
    return histogram.mean_low, histogram.mean_high


def percentile(percent: float) -> Observer:
    """The range that leaves (100 - percent) percent of values out, half at each end (McKinstry et al. 2018, arXiv:1809.04191; Wu et al.
    2020, arXiv:2004.09602, section 3.2). An end without values beyond 0 stays at 0, and its share goes to the other end."""

    def observe(histogram: Histogram) -> Range:
        total, edges = histogram.total, histogram.edges
        if not total:
            return 0.0, 0.0
        outside = total * (1 - percent / 100)
        share = outside if histogram.low >= 0 or histogram.high <= 0 else outside / 2
        below = np.concatenate([[0.0], np.cumsum(histogram.counts)])
        low = 0.0 if histogram.low >= 0 else float(np.interp(share, below, edges))
        high = 0.0 if histogram.high <= 0 else float(np.interp(total - share, below, edges))
        return max(min(low, 0.0), histogram.low), min(max(high, 0.0), histogram.high)

    return observe


def least(weights: _Weights) -> Observer:
    """The range with the least error: each end in turn over a shrinking grid of fractions of the observed range, until neither moves.

    With that of `squared_error` this is what Banner et al. 2019 (arXiv:1810.05723) minimise, on the histogram itself instead of a fitted distribution.
    """

    def observe(histogram: Histogram) -> Range:
        low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
        if low == high:
            return low, high
        coarse = histogram.coarser(histogram.exponent + 2, histogram.first >> 2)  # the search gets by with a quarter of the bins
        bins = BINS // 4 + 1
        coarse.counts, coarse.relative = coarse.counts[:bins], coarse.relative[:bins]

        weight, count = weights(coarse)

        def costs(trials: Sequence[list[float]]) -> list[float]:
            return _means(coarse, weight, count, [QParams.from_range(below * low, above * high) for below, above in trials])

        fractions = [1.0, 1.0]
        (best,) = costs([fractions])
        for grid, absolute in (
            (np.linspace(0.05, 1.0, 20), True),
            (np.linspace(-0.04, 0.04, 9), False),
            (np.linspace(-0.008, 0.008, 5), False),
        ):
            for _ in range(2):
                before = list(fractions)
                for end in (0, 1):
                    if (low, high)[end] == 0:
                        continue
                    candidates = [c for c in (grid + (0.0 if absolute else fractions[end])).tolist() if 0 < c <= 1]
                    trials = [[c, fractions[1]] if end == 0 else [fractions[0], c] for c in candidates]
                    for trial, found in zip(trials, costs(trials), strict=True):
                        if found < best:
                            best, fractions = found, trial
                if fractions == before:
                    break
        return fractions[0] * low, fractions[1] * high

    return observe


def entropy(histogram: Histogram) -> Range:
    """The range whose 8-bit histogram is nearest to the clipped one by Kullback-Leibler divergence (Migacz, "8-bit Inference with
    TensorRT", GTC 2017),
    for asymmetric ranges: both ends shrink in proportion. Exact zeros don't take part: every range represents them."""
    low, high = min(histogram.low, 0.0), max(histogram.high, 0.0)
    counts = histogram.nonzero
    if low == high or not counts.any():
        return low, high
    zero, best, chosen = -histogram.first, math.inf, (low, high)
    used = np.flatnonzero(counts)
    begin, end = min(int(used[0]), zero), max(int(used[-1]) + 1, zero)
    for fraction in np.linspace(0.1, 1.0, 91):
        first, last = zero - round((zero - begin) * fraction), zero + round((end - zero) * fraction)
        if last - first < 256:
            continue
        divergence = _divergence(counts, first, last)
        if divergence < best:
            best, chosen = divergence, (max(low, histogram.edges[first]), min(high, histogram.edges[last]))
    return float(chosen[0]), float(chosen[1])


def _divergence(counts: np.ndarray, first: int, last: int) -> float:
    """KL(P || Q) where P is counts[first:last] with what lies outside added to its end bins, and Q spreads 256 levels over P's occupied
    bins."""
    inside = counts[first:last]
    p = inside.copy()
    p[0] += counts[:first].sum()
    p[-1] += counts[last:].sum()
    level = np.arange(last - first) * 256 // (last - first)
    occupied = p > 0
    mass, bins = np.bincount(level, inside, 256), np.bincount(level, occupied, 256)
    q = np.where(occupied, (mass / np.maximum(bins, 1))[level], 0.0)
    p, q = p / p.sum(), q / max(q.sum(), 1e-300)
    shared = occupied & (q > 0)
    if not shared[occupied].all():  # values that Q can't produce: their divergence is infinite; TensorRT smooths with a small constant
        q = np.where(occupied & (q == 0), 1e-9, q)
    return float((p[occupied] * np.log(p[occupied] / q[occupied])).sum())


OBSERVERS: dict[str, Observer] = {
    "min-max": min_max,
    "average": moving_average,
    "percentile-99.9": percentile(99.9),
    "percentile-99.99": percentile(99.99),
    "percentile-99.999": percentile(99.999),
    "mse": least(_plain),
    "sqnr": least(_by_sample),
    "entropy": entropy,
}
"""Observers by name, simplest first: of equal errors the first wins."""
