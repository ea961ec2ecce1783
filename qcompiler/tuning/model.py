"""The search: points of a design space, a cost model that ranks them, and evolution that proposes them.

The cost model is gradient-boosted trees (XGBoost), one model per kernel row, trained on every measurement of that row in the log, whichever
workload and whichever type of core it belongs to. It predicts log(ratio): the time of a point over that of the default of its workload, which is
comparable across workloads and machines.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np

Point = dict[str, Any]
LANES = 16  # 32-bit lanes of the widest vector here; for other widths the derived features are off by a constant factor, which trees don't mind
SMALL = 1000  # points of a space that is ranked as a whole
IMPOSSIBLE = math.log(8.0)  # what the model learns of points that can't be built: as bad as 8 times slower


@dataclass(frozen=True)
class Space:
    """Tunables and their candidate values, the default's own values included, each list sorted if it is of numbers."""

    values: dict[str, list[Any]]
    default: Point

    @staticmethod
    def of(space: Mapping[str, list[Any]], default: Mapping[str, Any]) -> Space:
        values = {k: list(dict.fromkeys([*v, default[k]])) for k, v in space.items()}
        numeric = {k: all(isinstance(x, (int, float)) for x in v) for k, v in values.items()}
        return Space({k: sorted(v) if numeric[k] else v for k, v in values.items()}, dict(default))

    def fixed(self, point: Mapping[str, Any], names: Iterable[str]) -> Space:
        """The part of the space where `names` are as in `point`."""
        return Space(self.values | {k: [point[k]] for k in names}, self.default | {k: point[k] for k in names})

    @property
    def size(self) -> int:
        return math.prod(len(v) for v in self.values.values())

    def understands(self, point: Mapping[str, Any]) -> bool:
        """Whether a point of another workload, or of an older version, has these tunables: the same names, values of the same types, numbers above 0."""
        if point.keys() != self.values.keys():
            return False
        return all(type(point[k]) in {type(v) for v in values} and (isinstance(point[k], str) or point[k] > 0) for k, values in self.values.items())

    def random(self, rng: Random) -> Point:
        return {k: rng.choice(v) for k, v in self.values.items()}

    def mutated(self, point: Point, rng: Random) -> Point:
        """One or two tunables changed: a number mostly to a near value, anything else to any other."""
        free = [k for k, v in self.values.items() if len(v) > 1]
        new = dict(point)
        for name in rng.sample(free, min(len(free), rng.choice((1, 1, 2)))):
            values = self.values[name]
            at = values.index(point[name])
            near = [i for i in (at - 2, at - 1, at + 1, at + 2) if 0 <= i < len(values)]
            choices = near if isinstance(values[at], (int, float)) and rng.random() < 0.7 else [i for i in range(len(values)) if i != at]
            new[name] = values[rng.choice(choices)]
        return new

    def crossed(self, a: Point, b: Point, rng: Random) -> Point:
        return {k: (a if rng.random() < 0.5 else b)[k] for k in self.values}

    def nearest(self, point: Mapping[str, Any]) -> Point:
        """A point of another workload moved into this space: each value to the nearest candidate, unknown ones to the default."""

        def near(name: str) -> Any:
            value, values = point.get(name), self.values[name]
            if value in values:
                return values[values.index(value)]  # 1 where a log has 1.0
            if isinstance(value, (int, float)) and all(isinstance(v, (int, float)) for v in values):
                return min(values, key=lambda v: abs(v - value))
            return self.default[name]

        return {name: near(name) for name in self.values}


def key(point: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(point[k] for k in sorted(point))


# -- features -----------------------------------------------------------------------------------------------------------------------------


def sizes(workload: Mapping[str, Any]) -> list[float]:
    """A workload as numbers, logarithms of extents: image, channels, kernel, stride, groups, multiply-adds, bytes; and whether tensors are padded."""
    operands, (out, out_type, *padded) = workload["operands"], workload["output"]
    x = [1] * (4 - len(operands[0][0])) + list(operands[0][0])
    out = [1] * (4 - len(out)) + list(out)
    weight = operands[1][0] if len(operands) > 1 else []
    kernel = weight[1:3] if len(weight) == 4 else [1, 1]
    depth = math.prod(weight[1:]) if weight else 1
    strides, groups = workload["attrs"].get("strides", [1, 1]), workload["attrs"].get("groups", 1)
    numbers = [*x[-4:], *out[-4:], *kernel, *strides, groups, depth, math.prod(out) * depth, math.prod(x), math.prod(out), math.prod(weight or [1])]
    tensors = sum(o[-1] != "constant" for o in operands)
    return [math.log2(max(1, n)) for n in numbers] + [float(tensors), float(len(padded) > 0), float(len(operands[0]) > 2), float(out_type == "float32")]


def features(workload: Mapping[str, Any], space: Space, points: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """float32 [points, features]: tunables, sizes, and what follows from both (outputs and accumulators of a tile, waste at ragged edges, tasks)."""
    constant, (out, *_) = sizes(workload), workload["output"]
    _, height, width, channels = [1] * (4 - len(out)) + list(out[-4:])
    if workload["attrs"].get("strides", [1, 1]) == [1, 1] and [o[0][1:3] for o in workload["operands"][1:2]] == [[1, 1]]:
        height, width = 1, height * width  # a 1x1 is tiled over all pixels

    def row(p: Mapping[str, Any]) -> list[float]:
        tunables = [float(p[k]) if isinstance(p[k], (int, float)) else float(v.index(p[k]) if p[k] in v else -1) for k, v in sorted(space.values.items())]
        rows, cols = p.get("rows", 1), p.get("cols", p.get("columns", 1))
        lanes = p["blocks"] * LANES if "blocks" in p else p.get("width", LANES)
        tasks = math.prod(v for k, v in p.items() if k.endswith("tasks"))
        waste = [-(-n // t) * t / n for n, t in ((height, rows), (width, cols), (channels, lanes))]
        tiles = -(-height // rows) * -(-width // cols) * -(-channels // lanes)
        derived = [rows * cols, rows * cols * lanes / LANES, *waste, math.prod(waste), math.log2(tiles), math.log2(tasks), tiles / tasks]
        return [*tunables, *derived]

    return np.array([row(p) + constant for p in points], np.float32)


class CostModel:
    """Predicts log(ratio) on one type of core. Says nothing (zeros) before it has seen 16 points.

    others: other types of core, whose points teach it too. Which of them a point was measured on is a feature, a column for each, zeros for the core that is
    predicted: what all have in common is learned from all, and where they differ from this one's own points.
    """

    def __init__(self, others: Sequence[str] = ()) -> None:
        self._others = list(others)
        self._x: list[np.ndarray] = []
        self._y: list[np.ndarray] = []
        self._count, self._own, self._trained, self._trees = 0, 0, 0, None  # type: int, int, int, Any

    def learn(self, x: np.ndarray, ratios: Sequence[float], other: str | None = None) -> None:
        """x: as `features`; an infinite ratio is a point that can't be built. other: the other core it was measured on."""
        if len(ratios):
            self._x.append(self._marked(x, other))
            self._y.append(np.minimum(np.log(np.asarray(ratios, np.float64)), IMPOSSIBLE).astype(np.float32))
            self._count += len(ratios)
            self._own += len(ratios) if other is None else 0

    def _marked(self, x: np.ndarray, other: str | None) -> np.ndarray:
        return np.hstack([x, np.tile(np.array([name == other for name in self._others], np.float32), (len(x), 1))])

    def predict(self, x: np.ndarray) -> np.ndarray:
        """float32 [points]; trains first when a tenth more has been learned of this core."""
        if self._count < 16:
            return np.zeros(len(x), np.float32)
        import xgboost

        if self._trees is None or self._own >= max(1.1 * self._trained, self._trained + 1):
            settings = {"objective": "reg:squarederror", "max_depth": 6, "eta": 0.2, "subsample": 0.9, "nthread": 1, "seed": 0, "verbosity": 0}
            y = np.concatenate(self._y)
            data = xgboost.DMatrix(np.concatenate(self._x), label=y, weight=np.exp(-np.maximum(y, 0)))  # fast points must be ranked well, slow ones not
            self._trees, self._trained = xgboost.train(settings, data, num_boost_round=60), self._own
        return np.asarray(self._trees.predict(xgboost.DMatrix(self._marked(x, None))), np.float32)


def propose(
    space: Space,
    workload: Mapping[str, Any],
    model: CostModel,
    parents: Sequence[Point],
    tried: set[tuple[Any, ...]],
    count: int,
    rng: Random,
) -> list[Point]:
    """Up to `count` untried points, most promising first: the best by the model among descendants of `parents` (fastest first) and random points.

    A small space is ranked whole. Else there are three generations: children of parents by mutation and crossover, of which the best by the model
    are parents again. One point in eight is taken at random, so that the model learns where it does not look. Fewer points, or none, are left when
    the space is used up.
    """
    population = [space.nearest(p) for p in parents][:16] or [space.default]
    pool: dict[tuple[Any, ...], Point] = {}
    if space.size <= SMALL:
        every = (dict(zip(space.values, values, strict=True)) for values in itertools.product(*space.values.values()))
        pool = {key(p): p for p in every if key(p) not in tried}
    for _ in range(3 if space.size > SMALL else 0):
        children = [space.random(rng) for _ in range(32)]
        while len(children) < 160:
            mother, father = (population[min(int(rng.expovariate(0.3)), len(population) - 1)] for _ in range(2))
            child = space.crossed(mother, father, rng) if rng.random() < 0.4 else mother
            children.append(space.mutated(child, rng))
        new = {key(c): c for c in children if key(c) not in tried}
        pool |= new
        if not pool:
            continue
        ranked = _ranked(space, workload, model, list(pool.values()))
        population = [*population[:8], *ranked[:24]]
    if not pool:
        return []
    ranked = _ranked(space, workload, model, list(pool.values()))
    chosen = ranked[:count]
    for i in range(len(chosen)):
        if len(ranked) > count and rng.random() < 1 / 8:
            chosen[i] = ranked[rng.randrange(count, len(ranked))]
    return list({key(c): c for c in chosen}.values())


def _ranked(space: Space, workload: Mapping[str, Any], model: CostModel, points: list[Point]) -> list[Point]:
    order = np.argsort(model.predict(features(workload, space, points)), kind="stable")
    return [points[i] for i in order]
