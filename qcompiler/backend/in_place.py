"""Concatenation without copies: operands are written where the result wants them.

A concat of channels interleaves its operands pixel by pixel. With the result's pitch as theirs, operands can lie in its memory from the start, each from
its first channel on. Where an operand can't, the concat step copies it, as it copies all of them when they are joined along another axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import numpy as np

from qcompiler.schedules.table import Layout, Row


class Node(Protocol):
    """An operator on its way to a step."""

    id: str
    name: str
    operands: list[Any]  # value ids and constants
    attrs: dict[str, Any]
    row: Row | None


class Value(Protocol):
    """Where a value lies: `shift` bytes behind the start of `root`."""

    layout: Layout
    root: str
    shift: int


def join_in_place(nodes: Iterable[Node], values: Mapping[str, Value], fits: Callable[[str, Layout], bool]) -> None:
    """Move operands of concatenations into the memory of the results, and note in `attrs["in_place"]` of each concat which of them (their indices).

    Halos and pitches must be decided. fits: whether a value may have another layout than it has, for all who read it. The last concat of a chain comes
    first, so that all the others lie in its memory too.
    """
    nodes = list(nodes)
    owners = {n.id for n in nodes if n.row is not None and n.row.own_channels}

    def move(id: str, root: str, shift: int, like: Layout) -> bool:
        """Put a value into the memory of another one, if it has memory of its own and no border that somebody must fill; does it lie there now?"""
        value = values[id]
        layout = replace(value.layout, halo=like.halo, pitch=like.channel_pitch)
        alone = value.root == id and not any(value.layout.halo)
        if alone and id in owners and layout.dtype == like.dtype and fits(id, layout):
            value.root, value.shift, value.layout = root, shift, layout
        return (value.root, value.shift, value.layout) == (root, shift, layout)

    for node in reversed(nodes):
        if node.name != "qc.concat" or len(values[node.id].layout.shape) != 4 or node.attrs["axis"] % 4 != 3:
            continue
        parts = [values.get(o) if isinstance(o, str) else None for o in node.operands]
        sizes = [np.shape(o)[-1] if p is None else p.layout.shape[-1] for o, p in zip(node.operands, parts, strict=True)]
        item = np.dtype(values[node.id].layout.dtype).itemsize
        begins = [item * sum(sizes[:i]) for i in range(len(sizes))]
        first = parts[0]
        if first is not None and all(p and (p.root, p.shift) == (first.root, first.shift + b) for p, b in zip(parts, begins, strict=True)):
            move(node.id, first.root, first.shift, first.layout)  # all of them lie where a later concat wants them, side by side
        whole = values[node.id]
        if fits(node.id, whole.layout):
            places = enumerate(zip(node.operands, begins, strict=True))
            placed = [i for i, (o, b) in places if isinstance(o, str) and move(o, whole.root, whole.shift + b, whole.layout)]
            if placed:
                node.attrs = node.attrs | {"in_place": placed}
