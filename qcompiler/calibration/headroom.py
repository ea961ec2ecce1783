"""How much further than all samples the next one may reach, by how far each of them reached.

Of n samples the furthest is exceeded by the next one with a probability of 1 / (n + 1), and by how much shows in how they differ: with extremes of mean m and
standard deviation s, the next one lies with a probability of 95 % below

    m + t s sqrt(1 + 1/n),      t: the 95 % point of Student's distribution

`MANY` samples reach beyond that themselves, and get no headroom. The s of few samples is hardly known, so it is taken relative to m and together with that
of peers (channels of a value, values of a network), as if `PEERS` more samples had it; theirs with `USUAL`, as if one had.
"""

from __future__ import annotations

import math

import numpy as np

from qcompiler.numerics.metrics import student95

MANY = 100
PEERS = 3
USUAL = 0.15  # standard deviation over mean
MOST = 2.0


def spread(samples: int, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """float64 like the arguments: standard deviation over mean of how far samples reach, as far as `samples` of them and their peers tell. 0 for an end that
    all samples reach alike, which is a bound, and for one that none reaches."""
    variance = np.where(variance > 1e-12 * np.square(mean), variance, 0.0)
    spoken = (mean > 0) & ((variance > 0) | (samples == 1))
    square = variance / np.where(spoken, np.square(mean), 1.0) * samples / max(samples - 1, 1)
    usual = float(np.median(square[spoken])) if spoken.any() else 0.0
    usual += (USUAL**2 - usual) / samples
    result: np.ndarray = np.where(spoken, np.sqrt((square * (samples - 1) + PEERS * usual) / (samples - 1 + PEERS)), 0.0)
    return result


def headroom(samples: int, furthest: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """float64 like the arguments, from 1 to `MOST`: what the furthest of some samples is to be multiplied by. furthest, mean, variance: of how far each of
    `samples` reached, 0 or more; elements are peers."""
    if samples >= MANY:
        return np.ones_like(mean)
    limit = mean * (1 + student95(samples - 1 + PEERS) * math.sqrt(1 + 1 / samples) * spread(samples, mean, variance))
    result: np.ndarray = np.clip(limit / np.where(furthest > 0, furthest, 1.0), 1.0, MOST)
    return result


def unseen(end: np.ndarray, furthest: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """The expected square of what the next sample loses beyond `end` by reaching further than all before it (what those lose was seen). furthest, mean,
    deviation: of how far they reach. Greatest elements follow Gumbel's distribution, of scale b = deviation sqrt(6) / pi: beyond any x far out lies
    exp(-(x - mean) / b - 0.577) of them, b further on the average, so that with B the greater of `end` and `furthest`

        E = exp(-(B - mean) / b - 0.577) ((B - end)^2 + 2 b (B - end) + 2 b^2)
    """
    b = np.maximum(deviation * math.sqrt(6) / math.pi, 1e-30)
    beyond = np.maximum(furthest - end, 0.0)
    part = np.exp(np.minimum(-(end + beyond - mean) / b - np.euler_gamma, 0.0))
    result: np.ndarray = np.where(deviation > 0, part * (np.square(beyond) + 2 * b * beyond + 2 * np.square(b)), 0.0)
    return result
