"""One network at several shapes: loaded at each, checked to be one network, and one plan for all.

A plan is made at one shape. Its rows are by value id, and so are replaced weights; they hold at another shape when every operator that has weights has
the same there, and every operator that the plan does not know only moves data, whose parameters follow from what it reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qcompiler.base.debug import Dump, no_dump
from qcompiler.base.errors import ModelError
from qcompiler.base.shape_table import Row
from qcompiler.importers.model import FloatModel, load
from qcompiler.importers.origin import AnyModel, origin_of
from qcompiler.numerics.spec import QParams
from qcompiler.passes.groups import Group, find_groups
from qcompiler.plan.quant_plan import Derived, Float, QuantPlan
from qcompiler.runtime.shapes import Fitting, spelled


def load_all(
    model: AnyModel,
    rows: Sequence[Row],
    requantize: bool = False,
    dump: Dump = no_dump,
    input_values: Mapping[str, Any] | None = None,
    state: Mapping[str, str] | None = None,
) -> tuple[FloatModel, ...]:
    """The network at every row of shapes. Raises ModelError where it can't have one of them, or is another network there."""
    origin = origin_of(model)
    models = tuple(load(origin, row or None, requantize, dump if number == 0 else no_dump, input_values, state) for number, row in enumerate(rows))
    known: dict[str, int] = {}
    for number, found in enumerate(models):
        check_alike(models[0], found)
        if (shape := shape_of(found)) in known:
            raise ModelError(f"{origin.where}: rows {known[shape] + 1} and {number + 1} of the input shapes are the same: {shape}")
        known[shape] = number
    return models


def fitting_of(models: Sequence[FloatModel], rules: Mapping[str, Any]) -> Fitting:
    """What chooses among the shapes of the float network, in the order of `models`. rules: how inputs are padded."""
    first, *others = ({kind: [vars(port) for port in getattr(m, kind)] for kind in ("inputs", "outputs")} for m in models)
    return Fitting({**first, "shapes": others, "padding": rules})


def shape_of(model: FloatModel) -> str:
    """Its input shapes, for people."""
    return spelled({i.name: i.shape for i in model.inputs})


def check_alike(first: FloatModel, other: FloatModel) -> None:
    """Raises ModelError where the plan of one would not do for the other."""

    def refuse(what: str) -> ModelError:
        return ModelError(
            f"{first.origin.where}: at {shape_of(other)} it is another network than at {shape_of(first)}: {what}. "
            "Several shapes share one plan and one copy of the weights; compile a library for each"
        )

    for kind in ("inputs", "outputs"):
        mine, theirs = ([(p.name, p.dtype, len(p.shape)) for p in getattr(m, kind)] for m in (first, other))
        if mine != theirs:
            raise refuse(f"its {kind} are {theirs} and {mine}")
    for name in first.state:
        here, there = (next(list(i.shape) for i in m.inputs if i.name == name) for m in (first, other))
        if here != there:
            raise refuse(f"the state '{name}', which the next call takes, is {there} and {here}")
    groups = {g.id: g for g in find_groups(first.module)}
    for group in find_groups(other.module):
        known = groups.get(group.id)
        if known is None:
            if not group.traits.moves and group.reason is None:
                raise refuse(f"{group.kind} '{group.id}' is there only")
            continue
        if known.kind != group.kind and not (_rearranges(known) and _rearranges(group)):
            raise refuse(f"'{group.id}' is {group.kind} and {known.kind}")
        for what, own, its in (("weights", known.weight, group.weight), ("bias", known.bias, group.bias)):
            if group.traits.weighted and not _equal(own, its):
                raise refuse(f"the {what} of {group.kind} '{group.id}' differ")


def _rearranges(group: Group) -> bool:
    """Does it move one tensor's numbers, and no others? A transpose is a reshape where the axes that it swaps have length 1."""
    return group.traits.moves and not (group.traits.joins or group.traits.pads)


def _equal(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is b or (a is not None and b is not None and np.array_equal(a, b, equal_nan=True))


def common_constants(plan: QuantPlan, models: Sequence[FloatModel]) -> dict[str, QParams]:
    """group id -> parameters for the constant operand of an elementwise operator that is not the same at all shapes (places of tokens, cut to the length):
    what a token gets must not depend on how long the rest is."""
    found: dict[str, list[np.ndarray]] = {}
    for group in (g for m in models for g in find_groups(m.module)):
        if group.traits.elementwise and group.weight is not None and group.id not in plan.constants and group.id not in plan.reasons:
            found.setdefault(group.id, []).append(group.weight)
    common = {}
    for group_id, arrays in found.items():
        params = plan.params(group_id)
        if params is not None and not all(np.array_equal(arrays[0], a, equal_nan=True) for a in arrays):
            common[group_id] = QParams.from_range(min(float(a.min()) for a in arrays), max(float(a.max()) for a in arrays), dtype=params.dtype)
    return common


def plan_for(plan: QuantPlan, model: FloatModel) -> QuantPlan:
    """The plan with rows for the operators that only this shape has."""
    edges, reasons = dict(plan.edges), dict(plan.reasons)
    for group in find_groups(model.module):
        if group.id not in edges:
            source = edges.get(group.inputs[0]) if group.inputs else None
            if group.reason is not None or source is None or isinstance(source, Float):
                edges[group.id] = Float("what it moves is float32")
                reasons[group.id] = group.reason or "what it moves is float32"
            else:
                edges[group.id] = Derived(group.inputs[0], "moves data at this shape alone")
    return dataclasses.replace(plan, edges=edges, reasons=reasons)
