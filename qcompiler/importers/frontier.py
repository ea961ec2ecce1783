"""Where a network is cut in few places, so that what can't be compiled stands behind them.

The values that a refused tail reads are many where it takes classes or levels one at a time. Between them and the layers that learned something
stand operators that cost little wherever they run. The fewest values in between that tell the tail all it reads are a minimum cut of vertices
(by augmenting paths: as many as there are disjoint paths, says Menger's theorem), of several such the one nearest to the tail.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from itertools import pairwise

import onnx

from qcompiler.importers.control import reads

LEARNED = {
    *("Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "DeformConv", "Gemm", "MatMul", "MatMulInteger", "QLinearMatMul", "Einsum", "Attention"),
    *("LSTM", "GRU", "RNN"),
}
"""Operators that are never left to whoever runs the tail."""


def few(ends: Sequence[str], most: int, nodes: Iterable[onnx.NodeProto], values: Mapping[str, bool], inputs: Collection[str]) -> list[str]:
    """`ends` where they are `most` or less and numbers, else the fewest numbers that tell the same beside the network's inputs, in the order of `nodes`.

    ends: what the tail reads and the network's own outputs. nodes: those that were converted, in order. values: those that a network can be cut at, and
    whether each is of numbers: what only says which passed a threshold is offered where no numbers stand before it, or where they are too many.
    """
    if len(ends) <= most and all(values[name] for name in ends):
        return list(ends)
    made = {name: node for node in nodes for name in node.output if name in values}
    residual: dict[Hashable, dict[Hashable, float]] = {"source": {}, "sink": {}}  # a value is (name, False) as it is made, (name, True) as it is read

    def edge(a: Hashable, b: Hashable, capacity: float) -> None:
        residual.setdefault(a, {})[b] = capacity
        residual.setdefault(b, {}).setdefault(a, 0)

    for name, node in made.items():
        read = reads(node)
        first = node.op_type in LEARNED or not read.isdisjoint(inputs)
        edge((name, False), (name, True), 1 if first or values[name] else len(made))
        if first:
            edge("source", (name, False), len(made))
        if node.op_type not in LEARNED:
            for earlier in read & made.keys():
                edge((earlier, True), (name, False), len(made))
    for name in ends:
        edge((name, True), "sink", len(made))
    paths = 0
    while (path := _path(residual)) and paths < len(made):
        paths += 1
        for a, b in pairwise(path):
            residual[a][b] -= 1
            residual[b][a] += 1
    near, left = set[Hashable](["sink"]), deque[Hashable](["sink"])
    while left:
        b = left.popleft()
        for a in residual[b]:
            if a not in near and residual[a][b] > 0:
                near.add(a)
                left.append(a)
    cut = [name for name in made if (name, True) in near and (name, False) not in near]
    return cut if len(cut) <= max(most, len(ends)) else list(ends)


def _path(residual: dict[Hashable, dict[Hashable, float]]) -> list[Hashable]:
    """The shortest path from source to sink along which something is left; empty where there is none."""
    came: dict[Hashable, Hashable] = {"source": "source"}
    left = deque[Hashable](["source"])
    while left and "sink" not in came:
        a = left.popleft()
        for b, capacity in residual[a].items():
            if capacity > 0 and b not in came:
                came[b] = a
                left.append(b)
    if "sink" not in came:
        return []
    path: list[Hashable] = ["sink"]
    while path[-1] != "source":
        path.append(came[path[-1]])
    return path[::-1]
