"""Padding: the positions that a network's own masks take out of attention, and the values that have a row for each of them.

    bias = where(mask, 0, -inf)  [1, 1, 1, T]       keys that no query attends to are padding ...
    attention(q, k, v, bias)                        ... and so are the rows of k and v, of what they were computed from row by row,
                                                    and of all that is computed from that row by row

What such rows hold is of no consequence, so statistics leave them out, unless something else mixes rows without a mask (a mean over all positions, say;
products with a mask in front of a sum are fine). Works on the canonical float module, which stays as it is; only masks that are computed from inputs count.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from operator import mul

import tvm
from tvm import relax

from qcompiler.passes.graph import Graph, arguments, shape_of
from qcompiler.passes.groups import Group, find_groups


@dataclass(frozen=True)
class Padded:
    """Values whose leading axes are batch * positions, and the biases [B or 1, H or 1, S or 1, T] of the attentions that read them as keys: a position is
    padding where each of these hides it from all queries. sources: the network inputs that the biases are computed from."""

    batch: int
    positions: int
    values: frozenset[str]
    biases: tuple[str, ...]
    sources: tuple[str, ...]


def padded(module: tvm.IRModule) -> list[Padded]:
    """One entry for each set of positions that masks of the network can hide."""
    graph, groups = Graph.of(module), find_groups(module)
    shapes = {str(p.name): shape_of(p) for p in graph.inputs} | {n: shape_of(e) for n, e in graph.bindings if hasattr(e.ty, "shape")}
    masked = [g for g in groups if g.kind == "attention" and g.plain]
    weights = {str(p.name) for p in graph.inputs}  # masks in front of a sum, and products with them
    for group in groups:
        product = group.traits.elementwise and not group.traits.sums
        if product or group.traits.operator is None or (group.traits.views and group.inputs[0] in weights):
            weights.add(group.id)
    found: list[Padded] = []
    for group in masked:
        key = group.inputs[1]
        if any(key in p.values for p in found):
            continue
        batch, positions = shapes[key][:2]
        values = _spread(key, batch * positions, groups, shapes)
        biases = tuple(dict.fromkeys(g.plain[0] for g in masked if g.inputs[1] in values))
        if not any(_mixes(g, v, batch * positions) for g in groups for v in g.inputs if v in values and v not in weights):
            found.append(Padded(batch, positions, frozenset(values), biases, tuple(_sources(graph, biases))))
    return found


def _mixes(group: Group, value: str, rows: int) -> bool:
    """Does a group read rows of one of its operands together, without a mask?"""
    if group.kind == "attention":
        return not group.plain and value in group.inputs[1:3]
    return group.traits.window or (group.kind != "slice" and leading(group.shape, rows) is None)


def leading(shape: tuple[int, ...], rows: int) -> int | None:
    """How many leading axes have `rows` elements together; None where that cuts through an axis."""
    return next((i for i, n in enumerate(accumulate(shape, mul), 1) if n == rows), None)


def _spread(start: str, rows: int, groups: Iterable[Group], shapes: dict[str, tuple[int, ...]]) -> set[str]:
    """The values with the same rows as `start`."""
    near: dict[str, list[str]] = {}
    for group in groups:
        for together in _row_by_row(group, rows, shapes):
            for value in together:
                near.setdefault(value, []).extend(together)
    found, front = set[str](), [start]
    while front:
        value = front.pop()
        if value not in found:
            found.add(value)
            front += near.get(value, ())
    return found


def _row_by_row(group: Group, rows: int, shapes: dict[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Sets of values of a group of which one's row is made of another's same row, or both are read together."""
    if group.kind == "attention":
        q, k, v = group.inputs[:3]
        yield from ([q, group.id], [k, v])
        return
    axes = leading(group.shape, rows)
    if axes is None or group.traits.row_by_row is None or not group.traits.row_by_row(group.attrs, len(group.shape), axes):
        return
    yield [group.id, *(v for v in (*group.inputs, *([group.residual] if group.residual else [])) if _has_rows(group, shapes[v], axes, rows))]


def _has_rows(group: Group, shape: tuple[int, ...], axes: int, rows: int) -> bool:
    """Does an operand of that shape have the rows of the group's result?"""
    return leading(shape, rows) is not None if group.traits.views else shape[:axes] == group.shape[:axes] and prod(shape[:axes]) == rows


def _sources(graph: Graph, values: Iterable[str]) -> list[str]:
    """The network inputs behind some values."""
    inputs, bound, seen, front = {str(p.name) for p in graph.inputs}, graph.values(), dict[str, None](), list(values)
    for value in front:
        if value not in seen:
            seen[value] = None
            front += [str(a.name) for a in arguments(bound[value]) if isinstance(a, relax.Var)] if value in bound else []
    return [v for v in seen if v in inputs]
