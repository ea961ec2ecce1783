"""How far one tensor is from another: statistics over any number of samples, in bounded memory.

The measures are those of gemmlowp's tests (maximum, median and mean signed error: the last shows a bias that the others hide) plus the
signal-to-quantization-noise ratio and the cosine, which quantization papers quote.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

_SHIFT = 17  # a float32 without its low 17 bits: sign, exponent, 6 bits of mantissa
_BINS = 1 << (31 - _SHIFT)
_Z95 = 1.959963984540054  # the 97.5 % point of the normal distribution


@dataclass(frozen=True)
class Metrics:
    """One tensor against its reference. Errors are `actual - reference`, in the tensor's own real unit.

    sqnr_db: 10 log10(sum reference^2 / sum error^2); inf for equal tensors, -inf for noise on a zero reference, NaN when either holds NaN.
    max_error, median_error: of |error|; the median is exact to 1/64 of its value. mean_error: signed. cosine: of the angle between the two.
    channel_bias: the largest mean signed error of one channel (last axis) in quantization steps, and that channel; None for float tensors.
    """

    elements: int
    sqnr_db: float
    max_error: float
    median_error: float
    mean_error: float
    cosine: float
    channel_bias: float | None = None
    channel: int | None = None


class Accumulator:
    """Collects pairs of equal shape; `metrics` may be asked at any time after the first."""

    def __init__(self, step: float | None = None) -> None:
        """`step`: the quantization step (scale) of the tensor, when it has one."""
        self._step = step
        self._elements = 0
        self._reference2 = self._actual2 = self._product = self._error2 = self._signed = 0.0
        self._maximum = 0.0
        self._histogram = np.zeros(_BINS, np.int64)
        self._channels: np.ndarray | None = None

    def add(self, actual: np.ndarray, reference: np.ndarray) -> None:
        """Both are float arrays of one shape."""
        assert actual.shape == reference.shape, (actual.shape, reference.shape)
        a, r = actual.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
        error = a - r
        self._elements += a.size
        self._reference2 += float(r @ r)
        self._actual2 += float(a @ a)
        self._product += float(a @ r)
        self._error2 += float(error @ error)
        self._signed += float(error.sum())
        # The bit pattern of a non-negative float32 grows with its value, so its high bits are a histogram bin with 64 bins per octave.
        magnitude = np.abs(error).astype(np.float32)
        self._maximum = float(np.maximum(self._maximum, magnitude.max(initial=0.0)))  # np.maximum keeps NaN
        self._histogram += np.bincount(magnitude.view(np.uint32) >> _SHIFT, minlength=_BINS)
        if self._step is not None and actual.ndim:
            sums = error.reshape(-1, actual.shape[-1]).sum(0)
            self._channels = sums if self._channels is None else self._channels + sums

    def metrics(self) -> Metrics:
        assert self._elements, "nothing was compared"
        bias, channel = None, None
        if self._step is not None and self._channels is not None:
            means = self._channels * (self._channels.size / self._elements / self._step)
            channel = int(np.abs(means).argmax())
            bias = float(means[channel])
        return Metrics(
            self._elements,
            _decibel(self._reference2, self._error2),
            self._maximum,
            self._median(),
            self._signed / self._elements,
            self._cosine(),
            bias,
            channel,
        )

    def _median(self) -> float:
        index = int(np.searchsorted(np.cumsum(self._histogram), (self._elements + 1) // 2))
        if index == 0:
            return 0.0
        middle = np.array([(index << _SHIFT) + (1 << (_SHIFT - 1))], np.uint32)
        return float(middle.view(np.float32)[0])

    def _cosine(self) -> float:
        if self._error2 == 0.0:
            return 1.0
        norm = math.sqrt(self._reference2) * math.sqrt(self._actual2)
        return self._product / norm if norm else 0.0


def _decibel(signal: float, noise: float) -> float:
    if math.isnan(signal) or math.isnan(noise):
        return math.nan
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 and math.isfinite(noise) else -math.inf


def sqnr_db(actual: np.ndarray, reference: np.ndarray) -> float:
    """Signal-to-quantization-noise ratio of one pair, in dB; see `Metrics`."""
    accumulator = Accumulator()
    accumulator.add(actual, reference)
    return accumulator.metrics().sqnr_db


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson 1927, JASA 22): (low, high), within [0, 1].

        (p + z^2/2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2/n)

    Unlike the normal approximation it is sound for few samples and for proportions near 0 or 1.
    """
    assert 0 <= successes <= trials and trials > 0
    p, z2 = successes / trials, _Z95**2 / trials
    middle, half = p + z2 / 2, math.sqrt(z2 * p * (1 - p) + z2 * z2 / 4)
    return (middle - half) / (1 + z2) if successes else 0.0, (middle + half) / (1 + z2) if successes < trials else 1.0
