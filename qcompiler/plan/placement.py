"""Placement: which groups are computed in 8 bits, and which values are ever stored so. Structure alone decides; no data is needed.

    Placer(module, target).place(keep_float) -> Placement

1. Operators without an int8 kernel stay float, and those that the caller wants in float.
2. So does what only carries float values on to float operators or outputs: the last convolution or dense layer hands its int32 accumulator
   out as float32, and reshapes, concatenations and small activations behind it stay float too.
3. So do light operators whose operands are all float32 anyway.

A value that the model file itself rounds to 8 bits is stored so. What such a file leaves in float stays float, unless asked otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass

import tvm

from qcompiler import schedules
from qcompiler.base.targets import Target
from qcompiler.passes.graph import Graph, dtype_of
from qcompiler.passes.groups import STREAMS, Group, find_groups, values_in_sixteen
from qcompiler.passes.trained import Trained, in_eight_bits
from qcompiler.schedules.table import KERNELS

CARRIES = "it carries float32 values to float32 operators or outputs"
LEFT = "the model file leaves it in float"
LAST_STATES = "it takes last states out of a recurrent layer's result, which are float32"
_TAIL_ELEMENTS = 1 << 14  # a light operator up to this size at the end of the network stays float: cheap, and its output is what users see


@dataclass(frozen=True)
class Placement:
    """reasons: group id -> why it is computed in float32 (absent: in integers). stored: the values that are stored as integers, in order; wide: those of
    them in 16 bits."""

    reasons: dict[str, str]
    stored: tuple[str, ...]
    wide: frozenset[str] = frozenset()


class Placer:
    """A canonical float module as placement sees it. readers: value id -> the groups that read it, network inputs first, then in order of
    execution; made_by: group id -> group."""

    def __init__(self, module: tvm.IRModule, target: Target) -> None:
        schedules.load(target)
        self.groups = find_groups(module)
        self.made_by = {g.id: g for g in self.groups}
        graph = Graph.of(module)
        inputs, trained = graph.inputs, Trained.of(graph.attrs)
        self._trained = trained.values
        self._wide = values_in_sixteen(graph.attrs)
        self.readers: dict[str, list[Group]] = {v: [] for v in [*(str(p.name) for p in inputs), *self.made_by]}
        for group in self.groups:
            for value in dict.fromkeys(group.operands):
                self.readers.setdefault(value, []).append(group)
        self._dtypes = {str(p.name): dtype_of(p) for p in inputs}
        self._impossible = {g.id: reason for g in self.groups if (reason := _impossible(g, target)) is not None}
        if STREAMS not in graph.attrs:
            self._impossible |= {
                g.id: f"'{g.kind}' is computed in integers beside 16-bit streams only" for g in self.groups if g.traits.alone and g.reason is None
            }
        states = {g.id for g in self.groups if g.attrs.get("finals")}
        self._impossible |= {g.id: LAST_STATES for g in self.groups if g.traits.moves and not states.isdisjoint(g.inputs)}
        if trained.keeps_float:
            eight = in_eight_bits(graph)
            for group in self.groups:
                if group.id not in self._impossible and not _in_integers(group, trained, eight):
                    carries = group.traits.moves and not any(v in eight for v in group.operands)
                    self._impossible[group.id] = CARRIES if carries else LEFT

    def place(self, keep_float: Mapping[str, str] = {}) -> Placement:
        """keep_float: group id -> why it shall stay float, beside what must."""
        reasons = {g.id: self._impossible.get(g.id) or keep_float[g.id] for g in self.groups if g.id in self._impossible or g.id in keep_float}
        wanted: set[str] = set()  # values that only float operators, outputs, and what carries them there, read
        for value in reversed(self.readers):
            if value not in self._trained and all(g.id in reasons or (g.id in wanted and _carries(g)) for g in self.readers[value]):
                wanted.add(value)
        floating = {value for value, dtype in self._dtypes.items() if value in wanted or dtype != "float32"}  # values at hand in float
        for group in self.groups:
            at_hand = [v in floating for v in group.operands]
            if group.id in reasons or (group.traits.accumulates and group.id in wanted):
                floating.add(group.id)
            elif group.id in wanted and (group.traits.restates or (group.traits.moves and any(at_hand))):
                reasons[group.id] = CARRIES
                floating.add(group.id)
            elif group.traits.light and at_hand and all(at_hand):
                reasons[group.id] = "its operands are float32"
                floating.add(group.id)
        stored = tuple(v for v in self.readers if self._is_stored(v, reasons))
        wide = set() if self._wide is None else {v for v in stored if v in self._wide or self._is_seen(v, reasons)}
        wide |= {v for g in self.groups if g.traits.wants_wide and g.id not in reasons for v in g.operands if v not in self._trained}
        return Placement(reasons, stored, frozenset(wide))

    def _is_seen(self, value: str, reasons: Mapping[str, str]) -> bool:
        """Is the value the result of a normalization, a sum, a product or the like that only float operators and outputs read? Nothing asks for 8 bits then."""
        maker = self.made_by.get(value)
        wide = maker is not None and maker.traits.writes_wide and not maker.traits.keeps and maker.id not in reasons
        return wide and value not in self._trained and all(g.id in reasons for g in self.readers[value])

    def _is_stored(self, value: str, reasons: Mapping[str, str]) -> bool:
        """Is the value ever int8: read by an int8 operator, or made by one that can't hand out float32?"""
        maker = self.made_by.get(value)
        made = maker is not None and maker.id not in reasons and not maker.traits.accumulates
        return value in self._trained or made or any(g.id not in reasons for g in self.readers[value])


def _impossible(group: Group, target: Target) -> str | None:
    """Why a group can't be int8: no such operator, or no kernel on this target."""
    if group.reason:
        return group.reason
    if group.traits.edge:
        return "the model itself quantizes here"
    operator, allowed = group.traits.operator, {*target.rows, "any"}
    if operator is None or any(row.isa in allowed for row in KERNELS.get(operator, [])):
        return None
    return f"no kernel row implements {operator} on target {target.name}"


def _in_integers(group: Group, trained: Trained, eight: Container[str]) -> bool:
    """Does the model file compute `group` on integers: on operands and constants that it rounds, to a result that it rounds, or that an accumulator or a
    selection of elements hands out as it is? eight: the values that hold what the file rounds to 8 bits."""
    if not all(v in eight for v in group.operands):
        return False
    if group.traits.weighted:
        return not trained.integer.isdisjoint(group.members)
    if group.traits.elementwise and group.weight is not None and trained.constants.keys().isdisjoint(group.members):
        return False
    return group.id in eight or group.traits.accumulates


def _carries(group: Group) -> bool:
    """May `group` stay float when its output is wanted in float?"""
    return group.traits.moves or group.traits.restates or (group.traits.light and math.prod(group.shape) <= _TAIL_ELEMENTS)
