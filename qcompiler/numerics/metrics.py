"""How far one tensor is from another: statistics over any number of samples, in bounded memory.

The measures are those of gemmlowp's tests (maximum, median and mean signed error: the last shows a bias that the others hide) plus the
signal-to-quantization-noise ratio and the cosine, which quantization papers quote.

Two kinds of numbers would make a ratio of sums say nothing. Values that only mask others (scores that an attention mask moved to -1e4 or to the least float)
have all the power and no part in what follows: `masked` leaves them out. An output that holds several quantities (boxes in hundreds of pixels
beside scores below 1) is as good as the worse one: `Parts` tells them apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

_SHIFT = 17  # a float32 without its low 17 bits: sign, exponent, 6 bits of mantissa
_BINS = 1 << (31 - _SHIFT)
_Z95 = 1.959963984540054  # the 97.5 % point of the normal distribution


_MASK = -1e3  # a softmax makes nothing of what lies so far below the rest
_APART = 64  # times the magnitude of all that is no mask
_HUGE = 2.0**100  # no network computes with such numbers
_GAP = 100.0  # of mean squares, between quantities of one tensor: ten times in magnitude
_DUST = 1e-12  # of the greatest sum of squares: a millionth in magnitude, as dead channels leave it, is no quantity
_SLICES = 4096  # more of them are positions, not quantities
_LEAST = 16  # elements that tell a slice's magnitude


def masked(reference: np.ndarray) -> np.ndarray | None:
    """bool, of `reference`'s shape: the elements that only mask others, which are below -1000 and 64 times further from zero than all others, or beyond 2^100
    either way. None where there are none, or nothing else."""
    if reference.size == 0 or not (reference.min() <= _MASK or reference.max() >= _HUGE):
        return None
    magnitude, low = np.abs(reference), reference <= _MASK
    found = magnitude >= _HUGE
    rest = ~(found | low)
    if rest.any() and magnitude[low].min(initial=math.inf) > _APART * magnitude[rest].max():
        found = found | low
    return found if found.any() and not found.all() else None


@dataclass(frozen=True)
class Parts:
    """The quantities that a tensor holds, as sets of slices along an axis. members: indices of each part's slices, in order of its first; one part: no axis."""

    axis: int = 0
    members: tuple[tuple[int, ...], ...] = ((),)

    @staticmethod
    def of(reference: np.ndarray) -> Parts:
        """Slices along the second or the last axis, of three or more, where their mean squares leave a gap of a factor of 100."""
        return Parts.by_power({axis: slice_sums(np.square(reference.astype(np.float64)), axis) for axis in _axes(reference.shape)})

    @staticmethod
    def by_power(power: Mapping[int, np.ndarray]) -> Parts:
        """power: axis -> float64[slices], sums of squares."""
        best, chosen = _GAP, Parts()
        for axis, sums in power.items():
            order = np.argsort(sums, kind="stable")
            order = order[sums[order] > _DUST * sums.max(initial=0.0)]  # what is always zero says nothing
            jumps = sums[order[1:]] / sums[order[:-1]]
            if len(jumps) and jumps.max() > best:
                best = float(jumps.max())
                groups = np.split(order, np.flatnonzero(jumps > _GAP) + 1)
                chosen = Parts(axis, tuple(sorted(tuple(sorted(g.tolist())) for g in groups)))
        return chosen

    def sums(self, squares: np.ndarray) -> np.ndarray:
        """float64[parts] of an array of the tensor's shape."""
        return np.array([squares.sum()]) if len(self.members) == 1 else self.of_slices(slice_sums(squares, self.axis))

    def of_slices(self, sums: np.ndarray) -> np.ndarray:
        """float64[parts] of sums by slice."""
        return np.array([sums[list(m)].sum() for m in self.members])

    def names(self) -> list[str]:
        """Each part for people: "0-3 of axis 1"."""
        return [f"{_spans(m)} of axis {self.axis}" for m in self.members]


def slice_sums(array: np.ndarray, axis: int) -> np.ndarray:
    """float64[size of `axis`]: sums over the other axes."""
    result: np.ndarray = array.sum(axis=tuple(a for a in range(array.ndim) if a != axis), dtype=np.float64)
    return result


def _axes(shape: Sequence[int]) -> list[int]:
    """Along which slices may be quantities of their own."""
    every = math.prod(shape)
    return [a for a in sorted({1, len(shape) - 1}) if len(shape) > 2 and 1 < shape[a] <= _SLICES and every >= _LEAST * shape[a]]


def _spans(indices: Sequence[int]) -> str:
    spans: list[list[int]] = []
    for i in indices:
        if spans and spans[-1][1] == i - 1:
            spans[-1][1] = i
        else:
            spans.append([i, i])
    shown = [str(a) if a == b else f"{a}-{b}" for a, b in spans[:4]]
    return ", ".join([*shown, *(["..."] if len(spans) > 4 else [])])


@dataclass(frozen=True)
class Metrics:
    """One tensor against its reference. Errors are `actual - reference`, in the tensor's own real unit.

    sqnr_db: 10 log10(sum reference^2 / sum error^2) without `masked` elements; inf for equal tensors, -inf for noise on a zero reference, NaN when either
    holds NaN. parts: the same for each of several quantities by name, where the tensor holds such.
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
    parts: dict[str, float] = field(default_factory=dict)

    @property
    def worst_db(self) -> float:
        """The least SQNR of its quantities; NaN where one is."""
        return float(np.min([self.sqnr_db, *self.parts.values()]))


class Accumulator:
    """Collects pairs of equal shape, which may be another from pair to pair; `metrics` may be asked at any time after the first. Of an axis whose length
    varies no slices or channels are told apart."""

    def __init__(self, step: float | None = None) -> None:
        """`step`: the quantization step (scale) of the tensor, when it has one."""
        self._step = step
        self._elements = 0
        self._reference2 = self._actual2 = self._product = self._error2 = self._signed = 0.0
        self._maximum = 0.0
        self._histogram = np.zeros(_BINS, np.int64)
        self._channels: np.ndarray | None = None
        self._slices: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # axis -> sums of squares of reference and error

    def add(self, actual: np.ndarray, reference: np.ndarray) -> None:
        """Both are float arrays of one shape."""
        assert actual.shape == reference.shape, (actual.shape, reference.shape)
        a, r = actual.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
        error = a - r
        everything = error
        if (out := masked(r)) is not None:
            a, r, error = (np.where(out, 0.0, x) for x in (a, r, error))
        slices = {}
        for axis in _axes(actual.shape):
            power, noise = (slice_sums(np.square(x).reshape(actual.shape), axis) for x in (r, error))
            slices[axis] = (power, noise)
        # The bit pattern of a non-negative float32 grows with its value, so its high bits are a histogram bin with 64 bins per octave.
        magnitude = np.abs(everything).astype(np.float32)
        channels = everything.reshape(-1, actual.shape[-1]).sum(0) if self._step is not None and actual.ndim else None
        self._join(
            a.size,
            (float(r @ r), float(a @ a), float(a @ r), float(error @ error), float(everything.sum())),
            float(magnitude.max(initial=0.0)),
            np.bincount(magnitude.view(np.uint32) >> _SHIFT, minlength=_BINS),
            channels,
            slices,
        )

    def merge(self, other: Accumulator) -> None:
        """Add what another one collected. Where that is one pair, the sums have the bits that `add` gives."""
        sums = (other._reference2, other._actual2, other._product, other._error2, other._signed)
        self._join(other._elements, sums, other._maximum, other._histogram, other._channels, other._slices)

    def _join(
        self,
        elements: int,
        sums: tuple[float, float, float, float, float],
        maximum: float,
        histogram: np.ndarray,
        channels: np.ndarray | None,
        slices: Mapping[int, tuple[np.ndarray, np.ndarray]],
    ) -> None:
        self._elements += elements
        self._reference2 += sums[0]
        self._actual2 += sums[1]
        self._product += sums[2]
        self._error2 += sums[3]
        self._signed += sums[4]
        self._maximum = float(np.maximum(self._maximum, maximum))  # np.maximum keeps NaN
        self._histogram += histogram
        for axis, (power, noise) in slices.items():
            before = self._slices.get(axis, (np.zeros_like(power), np.zeros_like(noise)))
            same = len(before[0]) == len(power)
            self._slices[axis] = (before[0] + power, before[1] + noise) if same else (np.zeros(0), np.zeros(0))
        if channels is not None:
            if self._channels is not None and len(self._channels) != len(channels):
                self._channels, channels = self._channels.sum(keepdims=True), channels.sum(keepdims=True)
            self._channels = channels if self._channels is None else self._channels + channels

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
            self._parts(),
        )

    def _parts(self) -> dict[str, float]:
        parts = Parts.by_power({axis: power for axis, (power, _) in self._slices.items()})
        if len(parts.members) == 1:
            return {}
        power, noise = (parts.of_slices(sums) for sums in self._slices[parts.axis])
        return {name: _decibel(*pair) for name, *pair in zip(parts.names(), power.tolist(), noise.tolist(), strict=True)}

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


def student95(freedom: int) -> float:
    """The 95 % point of Student's t: the expansion in powers of 1/freedom around the normal one (Abramowitz and Stegun 26.7.5), within 1 % from 3
    degrees on; the exact values below."""
    if freedom < 3:
        return (6.3138, 2.9200)[freedom - 1]
    z = 1.6448536269514722  # that of the normal distribution
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return float(z + sum(term / freedom ** (i + 1) for i, term in enumerate(terms)))
