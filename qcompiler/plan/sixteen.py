"""Layers that a user wants in 16 bits (the option keep_16).

A convolution or dense layer reads its operand in halves then (`passes/halves.py`); a sum, a product, a mean or the like writes its result in 16 bits, and so
does a layer that adds a residual. What else reads such a value in 8 bits reads a copy; all layers with weights that read an operand do so in halves.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

from qcompiler.base.errors import PlanError
from qcompiler.passes.graph import Graph
from qcompiler.passes.groups import Group, find_groups
from qcompiler.passes.halves import divisible
from qcompiler.passes.sequence import RESIDUAL, run
from qcompiler.passes.streams import with_moved
from qcompiler.passes.trained import Trained
from qcompiler.plan.planner import named_groups

ASKED = "asked for (keep_16)"


def asked(model: Any, names: Iterable[str]) -> tuple[str, ...]:
    """The groups of a `FloatModel` that `names` name, as `named_groups` reads them, and that can compute in 16 bits. Raises PlanError for a name of which none
    can."""
    found: dict[str, None] = {}
    by_id = {g.id: g for g in find_groups(model.module)}
    stated = Trained.of(Graph.of(model.module).attrs).values.keys()
    for name in names:
        groups = [by_id[g] for g in named_groups(model, [name])]
        wider = {g.id: written_wide(g, by_id.values(), stated) for g in groups}
        written = {g for g, values in wider.items() if values}
        wide = run(RESIDUAL, model.module, dict.fromkeys((v for values in wider.values() for v in values), ASKED))
        read = {g.id for d in divisible(wide).values() for g in d.layers}
        able = [g.id for g in groups if g.id in written | read]
        if not able:
            raise PlanError(f"'{name}' can't be kept in 16 bits: {_obstacle(groups[0], stated)}. Give it to keep_float, or leave it in 8 bits")
        found |= dict.fromkeys(able)
    return tuple(found)


def written_wide(group: Group, groups: Iterable[Group], stated: Container[str]) -> list[str]:
    """What a group that is asked for writes in 16 bits: its result and what moves it on (last states go on in float32, of 16 bits); nothing where it can't, or
    is computed in halves instead."""
    if group.reason is not None or not group.traits.writes_wide or group.traits.keeps or (group.residual is None and group.traits.weighted):
        return []
    values = [group.id] if group.attrs.get("finals") else with_moved([group.id], groups)
    return [] if any(v in stated for v in values) else values


def _obstacle(group: Group, stated: Container[str]) -> str:
    if group.reason is not None:
        return f"{group.reason}, so it is computed in float32 anyway"
    if any(v in stated for v in (group.id, *group.operands)):
        return "the model file rounds it to 8 bits itself"
    if group.traits.residual:
        return f"its operand '{group.inputs[0]}' comes from, or also goes to, an operator with 8 bits only"
    return f"{group.kind} is an operator with 8 bits only; 16 are for convolutions (not transposed), dense layers, sums, products and means"
