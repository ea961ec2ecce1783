"""The trade of accuracy against time: which layers shall stay float, and which values be read in 16 bits, found on numbers alone.

`sensitivity.py` measures them; `accuracy_target.py` tries the answer out.

Every rounding to 8 bits adds noise to the network's outputs. Noises of independent roundings that are small beside the signal add up by power, and
a layer's time does not depend on its neighbours' but for the conversions between them:

    noise(plan)   = sum over the weights and the values that the plan rounds of the noise of that rounding alone
    seconds(plan) = sum over layers of float or int8 seconds + conversions of values that both kinds of layers touch
                    + the seconds of second products, where a value is read in halves of 8 bits (`passes/halves.py`) and so not rounded at all

Both are estimates that rank plans; what is promised is measured on the compiled plan itself.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from qcompiler.plan.placement import Placement


@dataclass(frozen=True)
class LayerCost:
    """A group. inputs: the values it reads (its output has its id). noise: float64[outputs], relative noise power of its int8 weights alone.

    int8_seconds, float_seconds: its own time, conversions left out. int8_bytes, float_bytes: of its parameters. movable: may the search keep it float?
    carries: it only moves data, in the type that its neighbours want.
    """

    id: str
    inputs: tuple[str, ...]
    noise: np.ndarray
    int8_seconds: float
    float_seconds: float
    int8_bytes: int
    float_bytes: int
    movable: bool
    carries: bool = False


@dataclass(frozen=True)
class ValueCost:
    """A value. noise: float64[outputs], of rounding it alone. to_int8, to_float: seconds of a conversion of the whole value."""

    noise: np.ndarray
    to_int8: float
    to_float: float


@dataclass(frozen=True)
class Wide:
    """What a plan may do with a value: store it in 16 bits, to be read in halves."""

    value: str


@dataclass(frozen=True)
class WideCost:
    """layers: those that are computed twice, for as many seconds as in 8 bits. seconds: of halving the value."""

    layers: tuple[str, ...]
    seconds: float


Choice = frozenset[str | Wide]
"""What a plan does otherwise than all in 8 bits: groups that stay float, values in 16 bits."""


@dataclass(frozen=True)
class Point:
    """A plan as it is predicted to be. noise: relative noise power of the worst output. bytes: of parameters."""

    keep: Choice
    noise: float
    seconds: float
    bytes: int

    @property
    def floats(self) -> frozenset[str]:
        """The groups that stay float."""
        return frozenset(k for k in self.keep if isinstance(k, str))

    @property
    def wide(self) -> frozenset[str]:
        """The values that are read in halves."""
        return frozenset(k.value for k in self.keep if isinstance(k, Wide))


@dataclass
class Network:
    """layers, values: by id. place: kept groups -> what a plan makes of them (`Placer.place`). outputs: values that leave the network. wide: the values
    that may be read in halves."""

    layers: Mapping[str, LayerCost]
    values: Mapping[str, ValueCost]
    place: Callable[[frozenset[str]], Placement]
    outputs: frozenset[str] = frozenset()
    wide: Mapping[str, WideCost] = field(default_factory=dict)
    _known: dict[Choice, Point] = field(default_factory=dict, repr=False)

    def predict(self, keep: Choice) -> Point:
        """The plan that keeps `keep` in float or in 16 bits."""
        if keep not in self._known:
            self._known[keep] = self._predict(keep)
        return self._known[keep]

    def _predict(self, keep: Choice) -> Point:
        point = Point(keep, 0.0, 0.0, 0)
        placement, wide = self.place(point.floats), point.wide
        noise, seconds, size = np.zeros(1), 0.0, 0
        read_in_float = set(self.outputs)
        for layer in self.layers.values():
            if layer.id in placement.reasons:
                seconds, size = seconds + layer.float_seconds, size + layer.float_bytes
                read_in_float.update(layer.inputs)
            else:
                seconds, size, noise = seconds + layer.int8_seconds, size + layer.int8_bytes, noise + layer.noise
        for value in placement.stored:
            cost = self.values[value]
            if value in wide:
                twice = [self.layers[n].int8_seconds for n in self.wide[value].layers if n not in placement.reasons]
                seconds += sum(twice) + self.wide[value].seconds
            else:
                noise = noise + cost.noise
            if value not in self.layers or value in placement.reasons:
                seconds += cost.to_int8
            if value in read_in_float:
                seconds += cost.to_float
        return Point(keep, float(noise.max()), seconds, size)

    def moves(self) -> list[Choice]:
        """What one step of the search may add: a value in 16 bits; a layer; a layer with a neighbour (no conversion between the two); all readers of a value
        with its maker (the value is then never rounded). Layers that carry values are no neighbours: those behind them are."""
        movable = {n for n, layer in self.layers.items() if layer.movable}
        readers: dict[str, set[str]] = {}
        for layer in self.layers.values():
            for value in () if layer.carries else self._sources(layer.id):
                readers.setdefault(value, set()).add(layer.id)
        found: set[Choice] = {frozenset([n]) for n in movable} | {frozenset([Wide(v)]) for v in self.wide}
        for value, whom in readers.items():
            found |= {frozenset([value, reader]) & movable for reader in whom}
            found.add(frozenset([value, *whom]) & movable)
        return sorted((m for m in found if m), key=lambda m: sorted(map(str, m)))

    def _near(self, name: str | Wide) -> list[str]:
        """The values whose cost depends on what a plan does with a layer or a value."""
        return [name.value, *self.wide[name.value].layers] if isinstance(name, Wide) else [name, *self._sources(name)]

    def _sources(self, name: str) -> list[str]:
        """The values that a layer reads, or that are carried to it."""
        found, front = dict[str, None](), list(self.layers[name].inputs)
        for value in front:
            if value in self.layers and self.layers[value].carries:
                front += self.layers[value].inputs
            found[value] = None
        return list(found)

    def path(self, start: Choice) -> list[Point]:
        """Plans of falling noise, each the one before with the move that lowers noise most per second; from `start` to everything float.

        After a step only moves that touch its neighbourhood are estimated again: elsewhere the sums change by the same terms as before.
        """
        moves = self.moves()
        near: dict[str, set[int]] = {}
        for index, move in enumerate(moves):
            for name in move:
                for value in self._near(name):
                    near.setdefault(value, set()).add(index)
        points = [self.predict(start)]

        def rank(index: int) -> tuple[float, float] | None:
            """Best first: what costs nothing by how much it helps, then the most noise per second."""
            point = self.predict(points[-1].keep | moves[index])
            gain, cost = points[-1].noise - point.noise, point.seconds - points[-1].seconds
            if gain <= 0:
                return None
            return (-math.inf, -gain) if cost <= 0 else (-gain / cost, cost)

        stamp = [0] * len(moves)
        heap: list[tuple[tuple[float, float], int, int]] = []

        def push(indices: Iterable[int]) -> None:
            for index in indices:
                stamp[index] += 1
                if not moves[index] <= points[-1].keep and (key := rank(index)) is not None:
                    heapq.heappush(heap, (key, index, stamp[index]))

        push(range(len(moves)))
        while heap:
            _, index, when = heapq.heappop(heap)
            added = moves[index] - points[-1].keep
            if when != stamp[index] or not added:
                continue
            point = self.predict(points[-1].keep | added)
            if point.noise >= points[-1].noise:
                continue
            points.append(point)
            touched = {v for name in added for v in self._near(name)}
            push(sorted({i for v in touched for i in near.get(v, ())}))
        return points

    def trimmed(self, point: Point, noise: float, fixed: Choice) -> Point:
        """`point` without what its predicted noise can spare below `noise`, that first which costs most; `fixed` stays."""

        def cost(name: str | Wide) -> float:
            if isinstance(name, Wide):
                return self.wide[name.value].seconds + sum(self.layers[n].int8_seconds for n in self.wide[name.value].layers)
            return self.layers[name].float_seconds - self.layers[name].int8_seconds

        for name in sorted(point.keep - fixed, key=lambda n: (-cost(n), str(n))):
            less = self.predict(point.keep - {name})
            if less.noise <= noise and less.seconds < point.seconds:
                point = less
        return point

    def gain(self, point: Point, name: str | Wide) -> tuple[float, float]:
        """(dB, seconds) that keeping `name` in float, or in 16 bits, adds to `point`, which holds it."""
        without = self.predict(point.keep - {name})
        ratio = without.noise / point.noise if point.noise > 0 else math.inf
        return (10 * math.log10(ratio) if 0 < ratio < math.inf else ratio), point.seconds - without.seconds


def first_below(points: Sequence[Point], noise: float) -> int:
    """The index of the first point whose predicted noise is at most `noise`; the last one where none is."""
    return next((i for i, p in enumerate(points) if p.noise <= noise), len(points) - 1)
