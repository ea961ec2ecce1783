"""Plan: which operators are computed in 8 bits, and under which scale each value is stored.

    decide(model, calibration table, target, preset, keep_float) -> QuantPlan

1. `placement.py` decides which operators stay float, those that `unsuited.py` finds in the data among them, and which values are stored in 8 bits.
2. Values that one operator must see under one scale form a class: the two sides of pooling, resize and data movement; the operands
   of a concatenation.
3. A class takes the parameters that the model file states (quantization-aware training), fixed ones where an operator's range is known
   in advance (sigmoid, tanh, softmax), else, of all ranges that observers propose, the one with the least estimated error, relative to
   each sample's power, on the histogram of the class.
4. Weights are int8 per output channel, with the file's scales, or else with the clipping that costs least (`weights.py`).

Without calibration data (an empty table) every class must have parameters by 3.
"""

from __future__ import annotations

import fnmatch
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tvm

from qcompiler.base.errors import PlanError, closest
from qcompiler.base.targets import Target
from qcompiler.calibration.histogram import Histogram
from qcompiler.calibration.observers import OBSERVERS, relative_error, sqnr_db
from qcompiler.calibration.table import CalibrationTable
from qcompiler.numerics.spec import QParams
from qcompiler.passes.graph import Graph, relax_op
from qcompiler.passes.groups import SIXTEEN, Group, find_groups, values_in_sixteen
from qcompiler.passes.halves import HALVES
from qcompiler.passes.trained import Trained
from qcompiler.plan.placement import Placer
from qcompiler.plan.quant_plan import Derived, Edge, Fixed, Float, Judged, Proposals, Quantized, QuantPlan, Shared
from qcompiler.plan.recipes import Recipe, recipe
from qcompiler.plan.statistics import Statistics
from qcompiler.plan.unsuited import Unsuited
from qcompiler.plan.weights import choose_scales

_FIXED = {  # values in [0, 1) in steps of 1/256; [0, 1] where 1 itself is common; [-1, 1) in steps of 1/128, with 0 exact
    "sigmoid": (QParams(1 / 256, -128), "a sigmoid lies in [0, 1)"),
    "softmax": (QParams(1 / 256, -128), "a softmax lies in [0, 1)"),
    "hard_sigmoid": (QParams.from_range(0.0, 1.0), "a hard sigmoid lies in [0, 1]"),
    "tanh": (QParams(1 / 128, 0), "a hyperbolic tangent lies in [-1, 1)"),
    "recurrence": (QParams(1 / 128, 0), "a hidden state lies in [-1, 1)"),
}
_MIN_GAIN = 0.01  # an observer displaces a simpler one when it lowers the error by more than this fraction
_WIDE_MARGIN = 2.0  # of a 16-bit range beyond what was seen: one bit of sixteen against saturation
_TINY = 2.0**-64  # a range below it is taken as zero: products of its scale would leave float32


def decide(
    model: Any,
    table: CalibrationTable,
    target: Target,
    preset: str | Recipe = "default",
    keep_float: Mapping[str, str] = {},
    ranges: Mapping[str, Judged] = {},
) -> QuantPlan:
    """The plan for a `FloatModel` or its canonical float module. keep_float: group id -> why it shall stay float, beside what must.
    ranges: for values of the plan's `proposals`, what was chosen instead of the least estimated error.

    Raises PlanError for an unknown preset, or when the table lacks a value that must be quantized (it was made for another model).
    """
    return _Planner(model if isinstance(model, tvm.IRModule) else model.module, table, target, recipe(preset), keep_float, ranges).run()


def named_groups(model: Any, names: Iterable[str]) -> list[str]:
    """The groups of a `FloatModel` that compute what `names` name: values, or nodes of the model file, by name, by a pattern of names (`/encoder/*`), or by
    the type of the file's operator (`op:Softmax`). In order of execution.

    A node that was folded into the next one (a convolution into its BatchNorm) stands for the group of that one, a recurrent one for all that it became.
    Raises PlanError for a name that the model does not have, and for a pattern or a type that nothing in it has.
    """
    groups = find_groups(model.module)
    owner = {member: g.id for g in groups for member in g.members}
    values = {node: value for value, (node, _) in reversed(model.sources.items())} | {v: v for v in [*model.sources, *owner]}
    recurrent = {model.source(g.id)[0] for g in groups if g.kind == "recurrence"}
    wanted: set[str] = set()
    for name in names:
        found = set[str]()
        named = front = {values[n] for n in _matching(name, model, values)}
        while front:
            found |= {owner[v] for v in front if v in owner}
            front = {reader for v in front if v not in owner for reader in model.readers.get(v, ())}
        whole = recurrent & {model.source(v)[0] for v in found | named}
        found |= {g.id for g in groups if model.source(g.id)[0] in whole}
        if not found:
            raise PlanError(f"'{name}' is no operator of the compiled network: it was computed in advance")
        wanted |= found
    return [g.id for g in groups if g.id in wanted]


def _matching(name: str, model: Any, values: Mapping[str, str]) -> list[str]:
    """The names, of `values`, that a name, a pattern or an operator type stands for."""
    if name in values:
        return [name]
    if name.startswith("op:"):
        kinds = sorted({kind for _, kind in model.sources.values()})
        if name[3:] not in kinds:
            raise PlanError(f"the model has no operator '{name[3:]}'.{closest(name[3:], kinds)} It has: {', '.join(kinds)}")
        return [value for value, (_, kind) in model.sources.items() if kind == name[3:]]
    if found := [value for value in values if fnmatch.fnmatchcase(value, name)]:
        return found
    raise PlanError(f"no layer is named '{name}'.{closest(name, list(values))} Layers have the names of the model file's nodes or values")


def observed_ids(model: Any) -> list[str]:
    """The values whose statistics a plan may need: what groups with an int8 form read and write."""
    module = model if isinstance(model, tvm.IRModule) else model.module
    wanted = {v: None for g in find_groups(module) if g.reason is None for v in (*g.operands, *(g.plain if g.kind == "recurrence" else ()), g.id)}
    return list(wanted)


def choose_params(histogram: Histogram, proposed: Mapping[str, QParams]) -> tuple[QParams, str, float]:
    """(parameters, observer, estimated SQNR in dB) of the range with the least error, simpler observers first among near equals."""
    best: tuple[float, QParams, str] | None = None
    for name, params in proposed.items():
        error = relative_error(histogram, params)
        if best is None or error < best[0] * (1 - _MIN_GAIN):
            best = (error, params, name)
    assert best is not None
    return best[1], best[2], sqnr_db(histogram, best[1])


def propose(histogram: Histogram, observers: Iterable[str]) -> dict[str, QParams]:
    """Parameters by observer, in the order given."""
    return {name: QParams.from_range(*OBSERVERS[name](histogram)) for name in observers}


def _differ(a: QParams, b: QParams) -> bool:
    """By so much that it may matter?"""
    return abs(a.scale - b.scale) > 0.03 * b.scale or abs(a.zero_point - b.zero_point) > 1


def _clipping(histogram: Histogram, params: QParams) -> str:
    """What of the values seen lies more than a step outside of the range, for people; empty when nothing does."""
    low, high = params.range
    edges = histogram.edges
    outside = int(histogram.counts[(edges[1:] < low - params.scale) | (edges[:-1] > high + params.scale)].sum())
    return f", clips {100 * outside / histogram.total:.2g} % of them" if outside else ""


class _Planner:
    def __init__(
        self, module: tvm.IRModule, table: CalibrationTable, target: Target, recipe: Recipe, keep_float: Mapping[str, str], ranges: Mapping[str, Judged]
    ) -> None:
        self.table, self.ranges = table, ranges
        graph, self.placer = Graph.of(module), Placer(module, target)
        self.exprs, self.trained = graph.values(), Trained.of(graph.attrs)
        self.halves = {half: (value, i == 0) for value, pair in graph.attrs.get(HALVES, {}).items() for i, half in enumerate(pair)}
        self.sixteen: Mapping[str, str] = graph.attrs.get(SIXTEEN, {})
        self.statistics = Statistics(table, self.placer.made_by)
        self.unsuited = Unsuited(self.placer, self.statistics, self.trained, values_in_sixteen(graph.attrs) or frozenset())
        self.missing: list[str] = []  # values that have neither statistics nor parameters of their own
        self.groups, self.made_by, self.readers = self.placer.groups, self.placer.made_by, self.placer.readers
        self.keep_float = keep_float
        self.recipe = recipe
        self.plan = QuantPlan(recipe.preset, table.digest)
        self.wide: frozenset[str] = frozenset()  # values in 16 bits
        self.classes: dict[str, set[str]] = {}  # value -> the values that share its quantization

    def run(self) -> QuantPlan:
        kept = {**self.unsuited.unbounded(), **self.unsuited.steep(), **self.keep_float}
        placement = self.placer.place(kept)
        if parted := self.unsuited.parted(placement.reasons):
            placement = self.placer.place({**kept, **parted})
        self.plan.reasons = placement.reasons
        self.plan.edges = dict.fromkeys(self.readers, Float(""))  # keeps the order of execution
        self.wide = placement.wide
        self.unite(placement.stored)
        for value in self.readers:
            if value not in self.classes:
                self.plan.edges[value] = Float(self.float_edge_reason(value))
        done: set[str] = set()
        for value in placement.stored:
            if value not in done:
                done |= self.classes[value]
                self.quantize_class(self.classes[value])
        for group in self.groups:
            if group.traits.weighted and group.id not in self.plan.reasons:
                assert group.weight is not None
                self.plan.scales[group.id], self.plan.weights[group.id] = self.weight_scales(group), group.weight
            elif group.traits.elementwise and group.id not in self.plan.reasons:
                found = next((self.trained.constants[m] for m in group.members if m in self.trained.constants), None)
                if found is not None:
                    self.plan.constants[group.id] = found
        if self.missing:
            names = ", ".join(f"'{v}'" for v in self.missing[:5]) + (f" and {len(self.missing) - 5} more" if len(self.missing) > 5 else "")
            raise PlanError(f"calibration data is needed: the model file states no ranges for {names}; give typical inputs")
        self.plan.notes += self.trained.notes
        self.plan.validate(self.groups, [v for v in self.readers if v not in self.made_by])
        return self.plan

    def weight_scales(self, group: Group) -> np.ndarray:
        """The model file's, where every weight is a multiple of its scale."""
        assert group.weight is not None
        trained = next((self.trained.weights[m] for m in group.members if m in self.trained.weights), None)
        if trained is not None and trained.shape == group.weight.shape[:1]:
            steps = group.weight / trained.reshape(-1, *[1] * (group.weight.ndim - 1))
            if np.abs(steps - np.rint(steps)).max(initial=0.0) < 1e-3:
                return trained
        if trained is not None:
            self.plan.notes.append(f"operator '{group.id}': its weights were changed after they were rounded; their scales are chosen anew")
        x, weight, ratios = self.plan.params(group.inputs[0]), group.weight, self.recipe.ratios
        found = self.statistics.once((ratios, weight.shape, hashlib.sha256(np.ascontiguousarray(weight).data).digest()), lambda: choose_scales(weight, ratios))
        return found.with_bias(group.bias, None if x is None else x.scale).scale

    def float_edge_reason(self, value: str) -> str:
        maker = self.made_by.get(value)
        if maker is None:
            return "network input read by float32 operators only" if self.readers[value] else "network input that nothing reads"
        if value in self.plan.reasons:
            return self.plan.reasons[value]
        whom = "float32 operators read it only" if self.readers[value] else "network output"
        return f"{whom}: computed in float32 from the int32 accumulator"

    # -- classes of one quantization ----------------------------------------------------------------------------------------------------

    def unite(self, stored: Sequence[str]) -> None:
        self.classes = {v: {v} for v in stored}
        same = [g for g in self.groups if self.copies(g)]
        for group in same:
            if not group.traits.joins:
                self.join(group.id, group.inputs[0])
        for group in same:
            if group.traits.joins:
                for value in dict.fromkeys(group.inputs):
                    if self.gains(value, group):
                        self.join(group.id, value)

    def join(self, a: str, b: str) -> None:
        union = self.classes[a] | self.classes[b]
        for value in union:
            self.classes[value] = union

    def gains(self, value: str, concat: Group) -> bool:
        """Should an operand take over its concat's quantization? Always when nobody else reads it. A value with other readers keeps its own
        (and the concat reads it through a table) when its range is less than half of the concat's: sharing would cost it more than a
        bit. Parameters that the model file states are kept as they are; where all operands have the same, they are the concat's too."""
        before, after = self.stated(self.classes[value]), self.stated(self.classes[concat.id])
        if (value in self.wide) != (concat.id in self.wide):
            return False
        if before and after:
            return before == after
        if before:
            return all(self.stated(self.classes[v]) == before for v in concat.inputs)
        if not self.table.values:
            return True
        if len(self.readers[value]) == 1:
            return True
        own, joint = self.histogram(self.classes[value]), self.statistics.of(concat.id)
        return max(own.high, 0) - min(own.low, 0) >= 0.5 * (max(joint.high, 0) - min(joint.low, 0))

    def stated(self, members: set[str]) -> set[QParams]:
        """The parameters that the model file states for values of a class."""
        return {self.trained.values[v] for v in members if v in self.trained.values}

    def roots(self, members: set[str]) -> list[str]:
        """The members of a class that aren't copies of other members."""
        return [v for v in self.readers if v in members and (v not in self.made_by or not self.copies(self.made_by[v]))]

    def copies(self, group: Group) -> bool:
        return group.traits.keeps and group.id not in self.plan.reasons

    def histogram(self, members: set[str]) -> Histogram:
        """All values of a class together."""
        joint = Histogram()
        for value in self.parts(members):
            joint = joint.merged(self.statistics.of(value))
        return joint

    def parts(self, members: set[str]) -> list[str]:
        """The values that all values of a class come from: its roots, and concatenations whose operands keep scales of their own."""
        joined = [v for v in members if v in self.made_by and self.made_by[v].traits.joins and not set(self.made_by[v].inputs) <= members]
        return self.roots(members) + sorted(joined)

    def proposed(self, members: set[str], histogram: Histogram) -> dict[str, QParams]:
        """What the recipe's observers propose."""
        return self.statistics.once((self.recipe.observers, histogram.digest), lambda: propose(histogram, self.recipe.observers))

    # -- parameters ---------------------------------------------------------------------------------------------------------------------

    def quantize_class(self, members: set[str]) -> None:
        """Rows for all members: the leader has parameters, the others name where theirs come from."""
        concats = [v for v in self.readers if v in members and v in self.made_by and self.made_by[v].traits.joins and self.copies(self.made_by[v])]
        roots = self.roots(members)
        leader = concats[-1] if concats else roots[0]
        self.plan.edges[leader] = self.leading_edge(leader, roots, members)
        for value in members - {leader}:
            group = self.made_by.get(value)
            if group is None or not self.copies(group) or group.traits.joins:
                self.plan.edges[value] = Shared(leader, f"concatenated in '{leader}'")
            else:
                self.plan.edges[value] = Derived(group.inputs[0], f"{group.kind} keeps its input's quantization")

    def leading_edge(self, leader: str, roots: list[str], members: set[str]) -> Edge:
        stated = [self.trained.values[v] for v in self.readers if v in members and v in self.trained.values]
        if stated:
            for value in {v for v in members if self.trained.values.get(v, stated[0]) != stated[0]}:
                self.plan.notes.append(f"value '{value}' takes the parameters of '{leader}', not those in the model file: its operator keeps quantization")
            return Fixed(stated[0], sqnr_db(self.histogram(members), stated[0]) if self.table.values else None, "stated in the model file")
        if not self.table.values:
            self.missing.append(leader)
            return Float("no range")
        if leader in self.halves and (whole := self.plan.params(self.halves[leader][0])) is not None and whole.dtype == "int16":
            value, upper = self.halves[leader]
            if upper:
                return Fixed(QParams(whole.scale * 256, 0), math.inf, f"the upper half of '{value}', in steps of 256")
            return Fixed(QParams(whole.scale, 0), math.inf, f"the lower half of '{value}', what its upper half leaves")
        histogram, fixed = self.histogram(members), {self.fixed(v) for v in roots}
        if members & self.wide and fixed == {"recurrence"}:
            params = QParams(_WIDE_MARGIN * 2.0**-15, 0, "int16")
            return Fixed(params, sqnr_db(histogram, params), f"16 bits for {_WIDE_MARGIN:g} times (-1, 1), where a hidden state lies: {self.why_wide(members)}")
        if members & self.wide:
            reach = _WIDE_MARGIN * max(-histogram.low, histogram.high)
            params = QParams.from_range(-reach, reach, dtype="int16") if reach > _TINY else QParams(1.0, 0, "int16")
            return Quantized(
                params,
                "min-max",
                sqnr_db(histogram, params),
                f"16 bits for {_WIDE_MARGIN:g} times what was seen: {self.why_wide(members)}",
            )
        if len(fixed) == 1 and (name := fixed.pop()) is not None:
            params, reason = _FIXED[name]
            return Fixed(params, sqnr_db(histogram, params), reason)
        if max(-histogram.low, histogram.high) < _TINY:
            self.plan.notes.append(f"value '{leader}' was always zero in the calibration data; it is stored with scale 1 and zero point 0")
            return Quantized(QParams(1.0, 0), "none", math.inf, "always zero in the calibration data")
        proposed = self.proposed(members, histogram)
        params, observer, sqnr = choose_params(histogram, proposed)
        params, padded = self.with_padding(params, members)
        others = [v for v in roots if v != leader]
        why = "least estimated error" if len(self.recipe.observers) > 1 else "everything seen"
        bound = max((math.inf if (g := self.made_by.get(v)) is None or g.high is None else g.high for v in members), default=math.inf)
        competing = {observer: params}
        for name, other in proposed.items():
            if all(_differ(other, p) for p in competing.values()):
                competing[name] = self.with_padding(other, members)[0]
        size = histogram.total / max(self.table.samples, 1)
        self.plan.proposals[leader] = Proposals(competing, tuple(roots), histogram.low, histogram.high, bound, size=size)
        if (judged := self.ranges.get(leader)) is not None:
            params, observer, sqnr, why = judged.params, judged.observer, sqnr_db(histogram, judged.params), judged.reason
        why += f" on [{histogram.low:.4g}, {histogram.high:.4g}]" + (f" of {len(others)} values together" if others else "")
        return Quantized(params, observer, sqnr, why + padded + _clipping(histogram, params))

    def why_wide(self, members: set[str]) -> str:
        """What gives a class 16 bits, for people."""
        known = (self.sixteen[v] or "the product with an upper half" for v in self.readers if v in members and v in self.sixteen)
        return next(known, "part of a residual stream, read by a recurrent layer, or in float")

    def fixed(self, value: str) -> str | None:
        """The row of _FIXED for a value whose range its operator bounds."""
        group = self.made_by.get(value)
        if group is None:
            return None
        if group.kind == "recurrence":
            return group.kind if group.reason is None else None
        if group.reason is None and group.function is not None:
            return group.function.name if group.function.name in _FIXED else None
        return "softmax" if relax_op(self.exprs[value]) == "relax.nn.softmax" else None

    def with_padding(self, params: QParams, members: set[str]) -> tuple[QParams, str]:
        """Widen the range to the constants that pads put among the values, where they are of the values' magnitude. Others (the least
        float before a maximum, say) saturate at the end of the range."""
        low, high = params.range
        values = [float(self.made_by[v].attrs["value"]) for v in members if v in self.made_by and self.made_by[v].traits.pads and self.copies(self.made_by[v])]
        near = sorted({v for v in values if low - (high - low) <= v <= high + (high - low) and not low <= v <= high})
        if not near:
            return params, ""
        return QParams.from_range(min(low, *near), max(high, *near)), f", widened to padding with {', '.join(f'{v:g}' for v in near)}"
