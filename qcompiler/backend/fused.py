"""Operators on a GPU that go element by element, or reduce over rows of elements, as one kernel where they hang together: each launch costs more than most of
them compute.

dequantize -> multiply -> add -> quantize      one kernel, which writes the last value
greater(x); multiply(x) -> clip -> round       one kernel, which writes both results
dequantize -> softmax -> quantize              one kernel, whose threads share rows
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, MutableMapping, Sequence
from typing import Any

import numpy as np

from qcompiler.backend.node import Node
from qcompiler.base.targets import Target
from qcompiler.schedules.cuda.fused import CONVERSIONS, FusedCall, Part
from qcompiler.schedules.cuda.fused_rows import fused_kernel, rows_of
from qcompiler.schedules.cuda.nests import nests, operand_reads, reduces
from qcompiler.schedules.table import LARGEST, Kernel, Layout, OpCall

_REPEATED = 2**22  # operations that are rather computed again than launched before: less than a microsecond of a GPU
_POINTERS, _PARTS, _CONVERSIONS = 40, 64, 12  # of a kernel; a conversion has up to 5 of its 64 scalars
_COPIES = 4 * _PARTS  # of parts in its code: each branch of a concatenation has its own


def with_fused(nodes: Sequence[Node], values: MutableMapping[str, Any], outputs: Collection[str]) -> list[Node]:
    """The nodes in an order in which they can run, with one for each group of them that a kernel computes. What lies inside of a group is no value of the
    program any more. outputs: values that the network hands out."""
    grouping = _Grouping(nodes, {value: v.layout for value, v in values.items()}, outputs)
    for node in nodes:
        grouping.join(node)
    made = grouping.result()
    left = {value for node in made for value in node.written}
    for value in (value for node in nodes for value in node.written if value not in left):
        del values[value]
    return made


def fused_kernel_of(node: Node, layout: Callable[[str], Layout], target: Target) -> Kernel:
    """The kernel of a node with parts. layout: as decided of what it reads and writes; others are of what they were."""
    return fused_kernel(_call(node, lambda value: node.inside[value] if value in node.inside and value not in node.outputs else layout(value)), target)


def _call(node: Node, layout: Callable[[str], Layout]) -> FusedCall:
    outside = [o for o in node.operands if isinstance(o, str)]
    arrays = {_key(o): o for part in node.parts for o in part.operands if isinstance(o, np.ndarray)}
    numbers: dict[Any, int] = {key: i for i, key in enumerate([*outside, *arrays, *(part.id for part in node.parts)])}

    parts = []
    for part in node.parts:
        call = OpCall(part.name, [layout(o) if isinstance(o, str) else o for o in part.operands], part.attrs, layout(part.id), part.id)
        parts.append(Part(call, tuple(numbers[o if isinstance(o, str) else _key(o)] for o in part.operands), part.function))
    results = [numbers[value] - len(outside) - len(arrays) for value in node.outputs]
    operands: list[Layout | np.ndarray] = [*(layout(o) for o in outside), *arrays.values()]
    return FusedCall("fused", operands, {}, layout(node.id), node.id, parts=parts, results=results)


def _key(array: np.ndarray) -> tuple[Any, ...]:
    return array.shape, str(array.dtype), array.tobytes()


def _values(node: Node) -> list[str]:
    return [o for o in node.operands if isinstance(o, str)]


class _Grouping:
    """Groups of nodes, each of them in one: that is no graph with cycles. rank: of a group, by its first node, less than those of all that read from it."""

    def __init__(self, nodes: Sequence[Node], layouts: Mapping[str, Layout], outputs: Collection[str]) -> None:
        self.nodes, self.layouts, self.outputs = nodes, layouts, set(outputs)
        self.place = {node.id: i for i, node in enumerate(nodes)}
        self.maker = {value: node for node in nodes for value in node.written}
        self.readers: dict[str, list[Node]] = {value: [] for value in self.maker}
        for node in nodes:
            for operand in set(_values(node)) & set(self.readers):
                self.readers[operand].append(node)
        self.groups = {node.id: [node] for node in nodes}
        self.rank = {node.id: i for i, node in enumerate(nodes)}
        self.before = {node.id: {s.id: s for o in _values(node) if (s := self.source(o))} for node in nodes}
        self.behind: dict[str, list[Node]] = {node.id: [] for node in nodes}
        for node in nodes:
            for source in () if self.views(node) else self.before[node.id]:
                self.behind[source].append(node)
        self.joinable = {node.id for node in nodes if self.may_join(node)}

    def may_join(self, node: Node) -> bool:
        layouts = [self.layouts[v] for v in (*_values(node), *node.written)]
        if any(not 0 < math.prod(layout.shape) <= LARGEST for layout in layouts) or node.tail or not _values(node):
            return False
        if node.name in CONVERSIONS:  # those at the edges of a network stay steps, which say how its inputs and outputs are stored
            return node.id not in self.outputs if node.name == "qc.dequantize" else node.operands[0] in self.maker
        if node.name != "legalized" or len(node.outputs) > 1 or nests(node.function) is None:
            return False
        return not reduces(node.function) or self.rows([node]) is not None

    def rows(self, nodes: Sequence[Node]) -> Collection[str] | None:
        """Of what some make, each thread of a row has it; None where they agree on no rows."""
        call = _call(self.one(nodes), self.layouts.__getitem__)
        rows = rows_of(call)
        if rows is None or (len(nodes) > 1 and not rows.busy):
            return None
        return {call.part(number).call.value_id for number, stage in rows.levels if call.last(number) == (number, stage)}

    def join(self, node: Node) -> None:
        """With the groups of what it reads."""
        for made in self.before[node.id].values() if node.id in self.joinable else []:
            one, other = self.groups[made.id], self.groups[node.id]
            if made.id in self.joinable and one is not other and len(one) + len(other) <= _PARTS:
                both = sorted([*one, *other], key=lambda n: self.place[n.id])
                inner = self.between(other, one, self.before_of)
                if inner is not None and self.is_a_kernel(both):
                    self.merge(one, other, both, inner)

    def before_of(self, node: Node) -> Collection[Node]:
        return self.before[node.id].values()

    def behind_of(self, node: Node) -> Collection[Node]:
        return self.behind[node.id]

    def between(self, group: list[Node], end: list[Node], step: Callable[[Node], Collection[Node]]) -> list[list[Node]] | None:
        """The groups that steps from one lead to whose rank lies between that and the one of `end`; None where they lead there through another."""
        limits = sorted((self.rank[group[0].id], self.rank[end[0].id]))
        found, waiting = dict[str, list[Node]](), [group]
        while waiting:
            now = waiting.pop()
            for each in {self.groups[n.id][0].id: self.groups[n.id] for node in now for n in step(node)}.values():
                if each is end and now is not group:
                    return None
                if limits[0] < self.rank[each[0].id] < limits[1] and each[0].id not in found:
                    found[each[0].id] = each
                    waiting.append(each)
        return list(found.values())

    def merge(self, one: list[Node], other: list[Node], both: list[Node], before: list[list[Node]]) -> None:
        """before: the groups that `other` reads from, of those between. They get the lowest of all ranks, and those that read from `one` the highest."""
        after = self.between(one, other, self.behind_of) or []
        moved = [one, other, *before, *after]
        ranks = sorted(self.rank[group[0].id] for group in moved)
        order = [sorted(groups, key=lambda g: self.rank[g[0].id]) for groups in (before, after)]
        self.groups |= dict.fromkeys((n.id for n in both), both)
        for rank, group in zip(ranks, [*order[0], both, *order[1]], strict=False):
            self.rank[group[0].id] = rank

    def source(self, value: str) -> Node | None:
        """The node that makes a value, or what it is a reshape of; None for inputs."""
        made = self.maker.get(value)
        while made is not None and self.views(made):
            made = self.maker.get(str(made.operands[0]))
        return made

    def views(self, node: Node) -> bool:
        """Is it a reshape of what is computed? Those are in no group."""
        return node.name == "qc.reshape" and isinstance(node.operands[0], str)

    def is_a_kernel(self, nodes: Sequence[Node]) -> bool:
        """Is it within limits, and can it hold in registers what lies inside?"""
        inside, outside, constants, copies = {n.id for n in nodes}, set[str](), 0, Counter[str]()
        held: Collection[str] = ()
        conversions = sum(n.name in CONVERSIONS for n in nodes)
        if conversions > _CONVERSIONS:
            return False
        if any(n.name == "legalized" and reduces(n.function) for n in nodes):
            rows = self.rows(nodes)
            if rows is None:
                return False
            held = rows
        for node in reversed(nodes):
            now = max(copies[node.id], 1)
            for number, operand in enumerate(node.operands):
                if not isinstance(operand, str):
                    constants += 1
                elif (made := self.source(operand)) is None or made.id not in inside:
                    outside.add(operand)
                elif made.id not in held:
                    if not self.in_registers(node, made, len(nodes)):
                        return False
                    guarded = node.name == "legalized" and operand_reads(node.function)[number] == "guarded"
                    copies[made.id] = copies[made.id] + now if guarded else max(copies[made.id], now)
        return copies.total() <= _COPIES and len(outside) + constants + len(self.written(nodes)) <= _POINTERS

    def in_registers(self, node: Node, made: Node, operations: int) -> bool:
        """May an operand that `made` computes be computed where it is read?"""
        elements = math.prod(self.layouts[node.id].shape)
        return elements <= math.prod(self.layouts[made.id].shape) or elements * operations <= _REPEATED

    def written(self, nodes: Sequence[Node]) -> list[str]:
        """What others read, or the network hands out."""
        inside = {n.id for n in nodes}
        return [n.id for n in nodes if self.read_outside(n.id, inside)]

    def read_outside(self, value: str, inside: Collection[str]) -> bool:
        if value in self.outputs:
            return True
        return any(self.read_outside(n.id, inside) if n.name == "qc.reshape" else n.id not in inside for n in self.readers[value])

    def one(self, nodes: Sequence[Node]) -> Node:
        """A node for all of them. Reshapes of what they make are parts too."""
        inside, parts, operands = {n.id for n in nodes}, list(nodes), dict[str, None]()
        for node in nodes:
            for operand in _values(node):
                made = self.source(operand)
                if made is None or made.id not in inside:
                    operands[operand] = None
                while made is not None and made.id in inside and operand != made.id:
                    view = self.maker[operand]
                    parts += [view] if view not in parts else []
                    operand = str(view.operands[0])
        parts.sort(key=lambda n: self.place[n.id])
        outputs = self.written(nodes)
        return Node(outputs[0], "fused", list(operands), {}, outputs, parts=parts, inside={n.id: self.layouts[n.id] for n in parts})

    def result(self) -> list[Node]:
        made: list[Node] = []
        for node in self.nodes:
            group = self.groups[node.id]
            if len(group) > 1 or (node.id in self.joinable and node.name == "legalized"):
                made += [self.one(group)] if node is group[0] else []
            elif node.name != "qc.reshape" or self.is_read(node):
                made.append(node)
        return self.ordered(made)

    def is_read(self, view: Node) -> bool:
        """Does anybody read a reshape but the kernel that computes what it is of?"""
        source = self.source(view.id)
        return self.read_outside(view.id, {n.id for n in self.groups[source.id]} if source is not None else ())

    def ordered(self, nodes: Sequence[Node]) -> list[Node]:
        """Each as early as what it reads and the given order allow."""
        number = {value: i for i, node in enumerate(nodes) for value in node.written}
        awaited = [{number[o] for o in _values(node) if o in number} for node in nodes]
        behind: list[list[int]] = [[] for _ in nodes]
        for i, before in enumerate(awaited):
            for j in before:
                behind[j].append(i)
        ready, found = [i for i, before in enumerate(awaited) if not before], list[Node]()
        heapq.heapify(ready)
        while ready:
            i = heapq.heappop(ready)
            found.append(nodes[i])
            for j in behind[i]:
                awaited[j].discard(i)
                if not awaited[j]:
                    heapq.heappush(ready, j)
        assert len(found) == len(nodes), "a value goes from a kernel through others and back"
        return found
