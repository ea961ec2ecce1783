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


def headroom(samples: int, furthest: np.ndarray, mean: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """float64 like the arguments, from 1 to `MOST`: what the furthest of some samples is to be multiplied by. furthest, mean, variance: of how far each of
    `samples` reached, 0 or more; elements are peers. An end that all samples reach alike is a bound, and one that none reaches is left alone."""
    if samples >= MANY:
        return np.ones_like(mean)
    variance = np.where(variance > 1e-12 * np.square(mean), variance, 0.0)
    spoken = (mean > 0) & ((variance > 0) | (samples == 1))
    square = variance / np.where(spoken, np.square(mean), 1.0) * samples / max(samples - 1, 1)
    usual = float(np.median(square[spoken])) if spoken.any() else 0.0
    usual += (USUAL**2 - usual) / samples
    freedom = samples - 1 + PEERS
    spread = np.sqrt((square * (samples - 1) + PEERS * usual) / freedom)
    limit = mean * (1 + student95(freedom) * math.sqrt(1 + 1 / samples) * spread)
    result: np.ndarray = np.where(spoken, np.clip(limit / np.where(spoken & (furthest > 0), furthest, 1.0), 1.0, MOST), 1.0)
    return result
