"""Channel equalization: a network that computes the same function, whose channels share one 8-bit scale with less loss.

A value is stored under one scale, so a channel that stays small gets few of the 256 steps. Where only convolutions and dense layers write and read a
value, or a layer normalization writes it (its gamma and beta are as good as weights and bias), or a product with a constant per channel does (the copy of
a 16-bit stream: no shift then), channel c may be stored as

    x'[c] = scale[c] * (x[c] - shift[c])

when the writer's output channel c is scaled and shifted (weights have a scale per output channel, so that costs nothing) and the readers' weights are
divided by scale[c] and their biases take `shift` back: cross-layer equalization (Nagel et al. 2019, arXiv:1906.04721), without its assumption of one
weight scale per layer. Weights of a dense reader share a scale over its input channels, so what the value gains its readers may lose; both are estimated:

    noise = sum over values of step(scale)^2 / 12 * sum over readers, channels of |w[:, c]|^2 / scale[c]^2
          + sum over readers, outputs of (max |w[o]| / scale / 127)^2 / 12 * sum over channels of var(x[c]) scale[c]^2      (per reader's output power)

and the best of a grid scale[c] = (reach of x[c])^-a * (largest share of w[:, c] in its row)^b is taken; a + b = 1 is SmoothQuant's rule
(Xiao et al. 2022, arXiv:2211.10438), a = 1, b = 0 gives every channel the full range. Depthwise readers have a scale per channel and lose nothing.

Residual sums, pooling and rectifiers pass a channel's scale on, so a whole residual stream has one. A clamp at h > 0 (ReLU6) stays where it is,
h / scale[c] in the value's own units: scale[c] is at least 1, so that the clamp never opens, and is 1 for a channel that reaches h. A channel
that stays below is scaled until its reach, extrapolated from its extremes in single samples (`reach`), comes to h. What goes further is cut off, whatever
it is worth, and few samples don't show it: of n, fewer than `MANY`, the bound of the scale is taken to the power sqrt(n / MANY).

A shift (values without a clamp) centres the channels. Of a rectified value a channel that is always positive gives up what it never falls below:
high-bias absorption. Padding would have to be shifted too, so readers of a shifted value must have none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import tvm

from qcompiler.calibration.headroom import MANY, headroom
from qcompiler.calibration.histogram import channel_statistics
from qcompiler.numerics.metrics import student95
from qcompiler.numerics.spec import WEIGHT_HIGH
from qcompiler.passes.graph import Graph
from qcompiler.passes.groups import Group, find_groups
from qcompiler.passes.layer_norms import layer_norms
from qcompiler.runtime.channels import Channels

CAP = 16.0  # a scale lies within this factor of the widest channel's: channels that hardly ever speak are not worth more
EXPONENTS = ((0.0, 0.0), (0.25, 0.0), (0.5, 0.0), (0.75, 0.0), (1.0, 0.0), (0.5, 0.5), (1.0, 0.5), (0.75, 0.25), (1.0, 1.0))
"""The grid of (a, b)."""
MIN_GAIN = 0.05  # of the estimated noise; below it a value is left alone
_OCTAVE = 8  # scales are 2^(n / 8)


# -- what must be known of each value -------------------------------------------------------------------------------------------------------


@dataclass
class Extremes:
    """Of each channel: sums over all elements, and of each sample's extremes. float64[C] each."""

    count: int = 0
    samples: int = 0
    total: np.ndarray = field(default_factory=lambda: np.zeros(0))
    square: np.ndarray = field(default_factory=lambda: np.zeros(0))
    low: np.ndarray = field(default_factory=lambda: np.zeros(0))
    high: np.ndarray = field(default_factory=lambda: np.zeros(0))
    moments: np.ndarray = field(default_factory=lambda: np.zeros((2, 2, 0)))  # [low or high, sum or sum of squares, C]

    def add(self, array: np.ndarray) -> None:
        self.take(channel_statistics(array), array.size)

    def take(self, statistics: Sequence[np.ndarray], size: int) -> None:
        """`add` of an array of so many elements, of which `channel_statistics` are known."""
        total, square, low, high = (a.astype(np.float64) for a in statistics)
        ends = np.stack([low, high])
        moments = np.stack([ends, np.square(ends)], axis=1)
        if self.samples:
            total, square, moments = total + self.total, square + self.square, moments + self.moments
            low, high = np.minimum(low, self.low), np.maximum(high, self.high)
        self.total, self.square, self.low, self.high, self.moments = total, square, low, high, moments
        self.count += size // len(total)
        self.samples += 1

    @property
    def mean(self) -> np.ndarray:
        return self.total / max(self.count, 1)

    @property
    def variance(self) -> np.ndarray:
        """float64[C] over all elements."""
        result: np.ndarray = np.maximum(self.square / max(self.count, 1) - np.square(self.mean), 0)
        return result

    def reach(self, end: int, shift: np.ndarray) -> np.ndarray:
        """float64[C]: how far a channel goes beyond `shift`, downwards (end 0) or upwards (1), on data like that seen.

            reach = |extreme - rest| * (1 + (0.05 + variance / mean^2) * sqrt(100 / n)),      variance and mean of the n samples' own |extreme - rest|

        where a channel rests at 0 if it is rectified, else at its mean. One that every sample excites alike has been seen whole; one that few samples
        excite may go much further in the next, and all the further the fewer there were (more than 100 count as 100).
        """
        distance, typical, variance, rest = self._distances(end)
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            spread = np.minimum(variance / np.square(typical), 1e6)
            beyond = np.where(distance > 0, distance * (1 + (0.05 + spread) * math.sqrt(max(MANY / max(self.samples, 1), 1.0))), 0)
        result: np.ndarray = np.maximum(beyond + self._sign(end) * (rest - shift), 0)
        return result

    def seen(self, end: int, shift: np.ndarray, ahead: bool = False) -> np.ndarray:
        """float64[C]: how far a channel went beyond `shift`; ahead: with headroom for the next sample."""
        distance, typical, variance, _ = self._distances(end)
        further = distance * (headroom(self.samples, distance, typical, variance) - 1) if ahead else 0.0
        result: np.ndarray = np.maximum(self._sign(end) * ((self.high if end else self.low) - shift), 0) + further
        return result

    def doubt(self, end: int) -> np.ndarray:
        """float64[C]: variance, over sets of as many samples, of the logarithm of a channel's extreme, beyond that which `MANY` leave; that of normal extremes
        is 1 / (1 + ln n) of the samples' own, nearly. For two samples or more."""
        distance, _, variance, _ = self._distances(end)
        single = variance * self.samples / (self.samples - 1)
        chance = max(1 / (1 + math.log(self.samples)) - 1 / (1 + math.log(MANY)), 0.0)
        result: np.ndarray = single * chance / np.maximum(np.square(distance), 1e-60)
        return result

    def next_low(self) -> np.ndarray:
        """float64[C]: what the next sample's least element is not below, with a probability of 95 % (`headroom.py`); for two samples or more."""
        typical, square = self.moments[0] / self.samples
        variance = np.maximum(square - np.square(typical), 0) * (self.samples + 1) / (self.samples - 1)
        result: np.ndarray = typical - student95(self.samples - 1) * np.sqrt(variance)
        return result

    @staticmethod
    def _sign(end: int) -> int:
        return 1 if end else -1

    def _distances(self, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """float64[C] each: of the samples' |extreme - rest| the greatest, mean and variance; and where a channel rests."""
        rest = np.where(self.low >= 0, 0.0, self.mean)
        typical, square = self.moments[end] / max(self.samples, 1)
        distance = np.maximum(self._sign(end) * ((self.high if end else self.low) - rest), 0)
        return distance, np.abs(typical - rest), np.maximum(square - np.square(typical), 0), rest


class ChannelWatcher:
    """A calibration watcher: `Extremes` of every value that equalization may look at."""

    def __init__(self, module: tvm.IRModule) -> None:
        self.streams = find_streams(module)
        self.values: dict[str, Extremes] = {}
        self._wanted = {v for s in self.streams for v in (*s.values, *(r.id for r in s.readers))}

    def look(self, sample: int, value_id: str, array: np.ndarray, seen: object) -> tuple[Sequence[np.ndarray], int] | None:
        return (channel_statistics(array), array.size) if value_id in self._wanted and array.ndim and array.size else None

    def take(self, value_id: str, seen: tuple[Sequence[np.ndarray], int]) -> None:
        self.values.setdefault(value_id, Extremes()).take(*seen)

    def end_sample(self, outputs: Mapping[str, np.ndarray]) -> None:
        """Outputs are of no interest here."""

    def state(self) -> dict[str, np.ndarray]:
        return {f"{name}/{k}": np.asarray(v) for name, seen in self.values.items() for k, v in vars(seen).items()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        self.values = {}
        for key, array in state.items():
            name, _, part = key.rpartition("/")
            setattr(self.values.setdefault(name, Extremes()), part, array.copy() if array.ndim else int(array))


# -- which values may be equalized ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stream:
    """Values that have one scale per channel in common, in order; the groups that write (convolutions, dense layers, layer normalizations) and read them.
    limit: the clamp, None for none."""

    values: tuple[str, ...]
    writers: tuple[Group, ...]
    readers: tuple[Group, ...]
    limit: float | None


def find_streams(module: tvm.IRModule) -> list[Stream]:
    """The streams of a canonical float module, in order of execution."""
    graph, groups, norms = Graph.of(module), find_groups(module), layer_norms(module)
    parent: dict[str, str] = {}
    shapes = {g.id: g.shape for g in groups}

    def root(value: str) -> str:
        while parent.setdefault(value, value) != value:
            value = parent[value]
        return value

    frozen = {str(p.name) for p in graph.inputs} | {str(v.name) for _, v in graph.outputs}
    for group in groups:
        operands = group.inputs + ((group.residual,) if group.residual else ())
        if group.traits.gathers:
            joined = [group.residual] if group.residual else []
        elif passes(group, shapes):
            joined = list(group.inputs)
        else:
            joined = []
            frozen |= {*operands, *([] if group.id in norms or group.traits.restates else [group.id])}
        if group.low not in (None, 0.0) or (group.high is not None and group.high <= 0):
            frozen.add(group.id)
        for value in joined:
            parent[root(value)] = root(group.id)
    closed = {root(v) for v in frozen}
    members: dict[str, list[str]] = {}
    for group in groups:
        if root(group.id) not in closed:
            members.setdefault(root(group.id), []).append(group.id)
    streams = []
    for values in members.values():
        inside = set(values)
        readers = tuple(g for g in groups if g.traits.gathers and g.inputs[0] in inside)
        writers = tuple(g for g in groups if (g.traits.gathers or g.traits.restates or g.id in norms) and g.id in inside)
        limits = [g.high for g in groups if g.id in inside and g.high is not None]
        if readers and writers:
            streams.append(Stream(tuple(values), writers, readers, min(limits, default=None)))
    return streams


def passes(group: Group, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Does `group` make each channel of its output from that channel of its operands, whatever positive factor the channel has?"""
    condition = group.traits.per_channel
    if condition is None or group.weight is not None or any(v not in shapes for v in group.inputs):
        return False
    return condition(group.attrs, [shapes[v] for v in group.inputs], group.shape)


def shiftable(stream: Stream, groups: Sequence[Group]) -> set[str]:
    """The values of a stream that may be shifted: written with a bias and without slopes, which are for what lies below 0, read by layers without padding or
    as a residual that is added to the bias."""
    allowed = {g.id for g in stream.writers if not g.traits.restates and g.slopes is None}
    for group in groups:
        padded = any(group.attrs.get("padding", [])) or not group.traits.gathers
        allowed -= set(group.inputs) if padded else set()
        allowed -= {group.residual} if group.slopes is not None and not group.bends_sum else set()
    return allowed


# -- scales and shifts ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Equalization:
    """channels: by value id. noise: value id of a stream's first value -> estimated noise power after / before. room: float64[2] by value id, how much further
    than seen the next sample may reach below and above zero, for one of its channels."""

    channels: dict[str, Channels] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)
    room: dict[str, np.ndarray] = field(default_factory=dict)
    shifted: int = 0

    def summary(self) -> str:
        """One line for people."""
        if not self.channels:
            return "no value gains from it"
        gain = -10 * np.log10(np.median(list(self.noise.values())))
        return f"{len(self.channels)} values scaled channel by channel, {self.shifted} of them centered: {gain:.1f} dB less noise from a typical one, estimated"


def decide_channels(module: tvm.IRModule, seen: Mapping[str, Extremes], absorb: bool = True) -> Equalization:
    """Scales and shifts for a canonical float module whose values were `seen`. absorb: shift values as well."""
    groups, result = find_groups(module), Equalization()
    order = {g.id: i for i, g in enumerate(groups)}
    for stream in find_streams(module):
        if any(v not in seen or seen[v].samples < 2 for v in (*stream.values, *(r.id for r in stream.readers))):
            continue  # one sample does not tell how channels differ
        free = shiftable(stream, groups) if absorb else set()
        clamped = {g.id for g in groups if g.low is not None or g.high is not None}
        shifts = {v: _shift(seen[v], v in clamped, stream.limit) if v in free else np.zeros_like(seen[v].mean) for v in stream.values}
        judge = _Judge(stream, seen, shifts, order)
        before = judge.noise(np.ones(len(judge.span)), _ends(seen, {v: np.zeros_like(s) for v, s in shifts.items()}))
        candidates = [_snapped(judge.scale(a, b)) for a, b in EXPONENTS]
        noises = [judge.noise(s) for s in candidates]
        best = int(np.argmin(noises))
        if not noises[best] < before * (1 - MIN_GAIN):
            continue
        result.noise[stream.values[0]] = noises[best] / before
        plain = _ends(seen, shifts, ahead=False)
        for value in stream.values:
            seen_so_far, ahead = ((ends[value] * candidates[best]).max(axis=1) for ends in (plain, judge.ends))
            result.room[value] = np.divide(ahead, seen_so_far, out=np.ones(2), where=seen_so_far > 0)
            result.channels[value] = Channels(candidates[best].astype(np.float32), shifts[value].astype(np.float32))
            result.shifted += bool(shifts[value].any())
    return result


def _shift(seen: Extremes, clamped: bool, limit: float | None) -> np.ndarray:
    """float64[C]: the middle of the channel's range; of a rectified channel what lies below its mean by 3 standard deviations, below all
    seen, and below what the next sample is to have."""
    shift = np.zeros_like(seen.low)
    if not clamped:
        shift = (seen.low + seen.high) / 2
    elif limit is None:
        shift = np.maximum(np.minimum.reduce([seen.low, seen.next_low(), seen.mean - 3 * np.sqrt(seen.variance)]), 0)
    return shift


def _snapped(scale: np.ndarray) -> np.ndarray:
    """Downwards to a power of 2^(1/8): such factors state compactly, and 9 % more or less make no difference."""
    result: np.ndarray = np.exp2(np.floor(np.log2(scale) * _OCTAVE + 1e-9) / _OCTAVE)
    return result


def _ends(seen: Mapping[str, Extremes], shifts: Mapping[str, np.ndarray], ahead: bool = True) -> dict[str, np.ndarray]:
    """float64[2, C] of each value: how far its channels reach below and above their shifts; ahead: in the next sample."""
    return {v: np.stack([seen[v].seen(end, s, ahead) for end in (0, 1)]) for v, s in shifts.items()}


def reliability(span: np.ndarray, doubt: np.ndarray) -> float:
    """From 0 to 1: how much of the differences between channels' spans, in logarithms, would be the same with other samples (James and Stein 1961). doubt:
    variance of each logarithm."""
    spoken = span > span.max() * 1e-9
    between = float(np.log(span[spoken]).var()) if spoken.any() else 0.0
    return max(0.0, 1 - float(doubt[spoken].mean()) / between) if between > 0 else 0.0


class _Judge:
    """Candidates for a stream's scales, and what they cost."""

    def __init__(self, stream: Stream, seen: Mapping[str, Extremes], shifts: Mapping[str, np.ndarray], order: Mapping[str, int]) -> None:
        self.limit = stream.limit
        self.reach = {v: np.stack([seen[v].reach(end, shifts[v]) for end in (0, 1)]) for v in stream.values}
        reach = np.concatenate([*self.reach.values()])
        self.span, furthest = reach.max(axis=0), reach.argmax(axis=0)[None]
        doubt = np.stack([seen[v].doubt(end) for v in stream.values for end in (0, 1)])
        self.reliability = reliability(self.span, np.take_along_axis(doubt, furthest, axis=0)[0])
        self.trust = math.sqrt(min(*(seen[v].samples for v in stream.values), MANY) / MANY)  # in that channels stay below the clamp
        self.seen_top = np.maximum.reduce([seen[v].high for v in stream.values])
        self.ends = _ends(seen, shifts)
        channels = len(self.span)
        self.energy = {v: np.zeros(channels) for v in stream.values}  # |w[:, c]|^2 of the readers behind a value, per output power
        self.share = np.zeros(channels)
        self.weights: list[tuple[np.ndarray, np.ndarray, np.ndarray, float]] = []
        for reader in stream.readers:
            weight = reader.weight
            assert weight is not None
            outputs = len(weight)
            flat = np.abs(weight.reshape(outputs, -1, weight.shape[-1]).astype(np.float64))
            at = input_channels(reader)
            power = max(float(seen[reader.id].variance.mean()), 1e-12)
            peak = flat.max(axis=1)
            row = np.maximum(peak.max(axis=1, keepdims=True), 1e-30)
            blocks = (peak / row).reshape(int(reader.attrs.get("groups", 1)), -1, weight.shape[-1])
            self.share = np.maximum(self.share, blocks.max(axis=1).reshape(-1))
            energy = np.bincount(at.reshape(-1), (np.square(flat).sum(axis=1) / power).reshape(-1), channels)
            x = reader.inputs[0]
            self.weights.append((peak, at, seen[x].variance * flat.shape[1], power))
            for value in stream.values:
                if value == x or order[value] < order[reader.id]:
                    self.energy[value] += energy

    def scale(self, a: float, b: float) -> np.ndarray:
        """float64[C] of one point of the grid, within what the clamp and CAP allow; 1 for the channel that reaches furthest."""
        most = float(self.span.max())
        if most <= 0:
            return np.ones_like(self.span)
        share = np.maximum(self.share, 1 / CAP**2)
        known = self.span > most * 1e-9  # a channel that never spoke may yet; it is left alone
        scale = np.where(known, (np.maximum(self.span, 1e-30) / most) ** (-a * self.reliability) * (share / share.max()) ** b, 1.0)
        scale = np.clip(scale / scale[int(self.span.argmax())], 1 / CAP, CAP)
        if self.limit is not None:
            room = np.where(known & (self.seen_top < self.limit), self.limit / np.maximum(self.span, 1e-30), 1.0)
            scale = np.clip(scale, 1.0, np.clip(room, 1.0, CAP) ** self.trust)
        result: np.ndarray = scale
        return result

    def noise(self, scale: np.ndarray, ends: Mapping[str, np.ndarray] | None = None) -> float:
        """ends: other ones than with the shifts."""
        total = 0.0
        for value, reach in (self.ends if ends is None else ends).items():
            low, high = (reach * scale).max(axis=1)
            total += ((low + high) / 255) ** 2 / 12 * float((self.energy[value] / np.square(scale)).sum())
        for peak, at, power, output in self.weights:
            step = (peak / scale[at]).max(axis=1) / WEIGHT_HIGH
            total += float((np.square(step) / 12 * (power * np.square(scale))[at].sum(axis=1)).sum()) / output
        return total


def input_channels(group: Group) -> np.ndarray:
    """int64[O, I/groups]: the input channel that each weight of an output channel meets."""
    assert group.weight is not None
    outputs, width = group.weight.shape[0], group.weight.shape[-1]
    groups = int(group.attrs.get("groups", 1))
    first: np.ndarray = np.arange(outputs) // (outputs // groups) * width
    return first[:, None] + np.arange(width)


# -- the layers of the equalized network ----------------------------------------------------------------------------------------------------


def equalized_layers(module: tvm.IRModule, channels: Mapping[str, Channels]) -> dict[str, tuple[np.ndarray, ...]]:
    """{group id: (weight float32 like `Group.weight`, bias float64[O])} of every convolution and dense group that reads or writes `channels`, and
    {value id: (gamma float32[C], beta float64[C])} of every layer normalization that writes them, {value id: (factors float32[C],)} of every product per
    channel that does."""
    changed: dict[str, tuple[np.ndarray, ...]] = {}
    norms = layer_norms(module)
    for group in find_groups(module):
        touched = [v for v in (group.id, group.inputs[0] if group.inputs else "", group.residual or "") if v in channels]
        if not touched or not (group.traits.gathers or group.traits.restates or group.id in norms):
            continue
        if group.traits.restates:
            assert group.weight is not None
            changed[group.id] = (group.weight * channels[group.id].scale,) if group.id in channels else (group.weight,)
            continue
        given, offset = norms.get(group.id, (group.weight, group.bias))
        assert given is not None
        weight = given.astype(np.float64)
        bias = np.zeros(len(weight)) if offset is None else offset.astype(np.float64)
        if (x := channels.get(group.inputs[0])) is not None:
            at = input_channels(group)
            along = (len(weight), *[1] * (weight.ndim - 2), -1)
            taps = weight.reshape(len(weight), -1, weight.shape[-1]).sum(axis=1)
            bias = bias + (taps * x.shift.astype(np.float64)[at]).sum(axis=1)
            weight = weight / x.scale.astype(np.float64)[at].reshape(along)
        if (r := channels.get(group.residual or "")) is not None:
            bias = bias + r.shift
        if (y := channels.get(group.id)) is not None:
            bias = (bias - y.shift) * y.scale
            weight = weight * y.scale.astype(np.float64).reshape(-1, *[1] * (weight.ndim - 1))
        changed[group.id] = weight.astype(np.float32), bias
    return changed
