"""`QuantPlan`: for every value how it is stored, for every operator whether it is computed in 8 bits, and why. Saved, printed, compared.

Decisions only: `qcompiler.plan.planner` makes them, `passes/insert_qdq.py` carries them out.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tvm

from qcompiler.base.errors import PlanError
from qcompiler.base.files import parse_json, read_regular, replacing
from qcompiler.base.text import count_text
from qcompiler.numerics.spec import QParams
from qcompiler.passes.graph import Graph
from qcompiler.passes.groups import Group, find_groups
from qcompiler.plan.weights import quantize_weight

FORMAT = 1


@dataclass(frozen=True)
class Quantized:
    """Parameters of its own. observer: which one proposed the range. sqnr: estimated, in dB (inf for an exact value)."""

    params: QParams
    observer: str
    sqnr: float
    reason: str


@dataclass(frozen=True)
class Shared:
    """The parameters of value `source`, because one operator reads or writes both under one quantization (concat)."""

    source: str
    reason: str


@dataclass(frozen=True)
class Derived:
    """The parameters of value `source`, because it holds a selection of, or lies between, its values (pooling, reshape, slice, resize,
    ...)."""

    source: str
    reason: str


@dataclass(frozen=True)
class Fixed:
    """Parameters that follow from the operator's range of values, or that the model file states, whatever the data. sqnr: estimated, in dB; None without
    data."""

    params: QParams
    sqnr: float | None
    reason: str


@dataclass(frozen=True)
class Float:
    """Stays float32."""

    reason: str


Edge = Quantized | Shared | Derived | Fixed | Float
_KINDS = {"quantized": Quantized, "shared": Shared, "derived": Derived, "fixed": Fixed, "float": Float}


NO_ROOM = (1.0, 1.0)


@dataclass(frozen=True)
class Proposals:
    """The ranges that compete for one value. params: by observer, that with the least estimated error first. members: the values that are stored so
    (several in front of a concatenation). low, high: the least and greatest value seen. bound: what it can't exceed (a clamp), inf for none.
    room: what the ranges' ends were multiplied by, so that other samples fit in. size: how many numbers a sample has, all members together. whole: is the
    widest of the ranges the only one?"""

    params: Mapping[str, QParams]
    members: tuple[str, ...]
    low: float
    high: float
    bound: float = math.inf
    room: tuple[float, float] = NO_ROOM
    size: float = 1.0
    whole: bool = False

    def with_room(self, below: float, above: float) -> Proposals:
        """All ranges so many times as far below and above zero."""

        def wider(params: QParams) -> QParams:
            low, high = params.range
            return QParams.from_range(below * low, max(high, min(above * high, self.bound)))

        return self if (below, above) == NO_ROOM else replace(self, params={k: wider(p) for k, p in self.params.items()}, room=(below, above))

    def only_widest(self) -> Proposals:
        """Without competition: the range that clips least."""
        return replace(self, params=dict([max(self.params.items(), key=lambda pair: pair[1].scale)]), whole=True)

    def only_first(self) -> Proposals:
        """Without competition."""
        return replace(self, params=dict(itertools.islice(self.params.items(), 1)))


@dataclass(frozen=True)
class Judged:
    """The range that a value gets. reason: why, for people."""

    params: QParams
    observer: str
    reason: str


@dataclass
class QuantPlan:
    """edges: by value id. reasons: group id -> why it is computed in float32 (absent: in int8). scales: group id -> float64[O].
    constants: group id -> parameters of an elementwise operator's constant operand, where the model file states them or several shapes share them.

    notes: things a user should know (a value that was always zero, say). `table` is the digest of the calibration table it was made from.
    """

    preset: str
    table: str = ""
    edges: dict[str, Edge] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    scales: dict[str, np.ndarray] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    constants: dict[str, QParams] = field(default_factory=dict)
    weights: dict[str, np.ndarray] = field(default_factory=dict, repr=False)  # the float weights that `scales` are for; not saved
    proposals: dict[str, Proposals] = field(default_factory=dict, repr=False)  # by value: the ranges that competed; not saved

    def params(self, value_id: str) -> QParams | None:
        """How a value is stored in 8 bits; None when it stays float32. Raises PlanError for an unknown id or a circle of Shared and
        Derived."""
        edge = self.edges[self.source(value_id)]
        return None if isinstance(edge, (Float, Shared, Derived)) else edge.params

    def with_ranges(self, ranges: Mapping[str, Judged]) -> QuantPlan:
        """The plan with other ranges of values that have parameters of their own."""
        own = {v: replace(edge, params=ranges[v].params) for v, edge in self.edges.items() if v in ranges and isinstance(edge, Quantized)}
        return replace(self, edges={**self.edges, **own})

    def source(self, value_id: str) -> str:
        """The value with whose parameters a value is stored: itself where it has its own. Errors as `params`."""
        seen = [value_id]
        while True:
            edge = self.edges.get(seen[-1])
            if edge is None:
                raise PlanError(f"the plan has no row for value '{seen[-1]}'" + (f" (reached from '{value_id}')" if len(seen) > 1 else ""))
            if not isinstance(edge, (Shared, Derived)):
                return seen[-1]
            if edge.source in seen:
                raise PlanError(f"the plan's rows go round in a circle: {' -> '.join([*seen, edge.source])}")
            seen.append(edge.source)

    def weight(self, group_id: str) -> tuple[np.ndarray, np.ndarray]:
        """(int8 weights as `Group.weight` has them, float64 scales [O]) of a convolution or dense group. Raises PlanError for any other."""
        if group_id not in self.scales:
            raise PlanError(f"the plan has no weight scales for operator '{group_id}'")
        if group_id not in self.weights:
            raise PlanError(f"the plan was loaded without its model, so it has no weights for operator '{group_id}'; use QuantPlan.load(path, module)")
        return quantize_weight(self.weights[group_id], self.scales[group_id]), self.scales[group_id]

    def reason(self, group_id: str) -> str | None:
        """Why a group is computed in float32; None when it is int8."""
        return self.reasons.get(group_id)

    def constant(self, group_id: str) -> QParams | None:
        """How the constant operand of an elementwise operator is stored, where that is stated; None: by its own range."""
        return self.constants.get(group_id)

    @property
    def digest(self) -> str:
        """SHA-256 (hexadecimal) of what the plan decides."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    # -- files --------------------------------------------------------------------------------------------------------------------------

    def to_json(self) -> str:
        """The plan as JSON text, one row per line; equal plans give equal text."""
        rows = [f"    {json.dumps(k)}: {json.dumps(_encode(e))}" for k, e in self.edges.items()]
        scales = [f"    {json.dumps(k)}: {json.dumps(s.tolist())}" for k, s in self.scales.items()]
        head = {"format": FORMAT, "preset": self.preset, "table": self.table, "notes": self.notes, "float": self.reasons}
        if self.constants:
            head["constants"] = {k: [p.scale, p.zero_point, *([] if p.dtype == "int8" else [p.dtype])] for k, p in self.constants.items()}
        parts = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in head.items()]
        parts += [f'  "{name}": {{\n' + ",\n".join(lines) + "\n  }" for name, lines in (("edges", rows), ("scales", scales))]
        return "{\n" + ",\n".join(parts) + "\n}\n"

    def save(self, path: str | Path) -> None:
        """Write the plan to `path`, beside it first and then renamed. Raises OutputError."""
        with replacing(path) as temporary:
            temporary.write_text(self.to_json())

    @staticmethod
    def load(path: str | Path, module: tvm.IRModule | None = None) -> QuantPlan:
        """The plan in a file; with the canonical float `module` it is validated, and knows its weights.

        Raises PlanError for a file that is missing, malformed, or of another model.
        """
        try:
            document = parse_json(read_regular(path))
            if document["format"] != FORMAT:
                raise PlanError(f"{path}: format {document['format']} is not supported (this version reads {FORMAT}); make the plan again")
            plan = QuantPlan(
                str(document["preset"]),
                str(document["table"]),
                {str(k): _decode(row) for k, row in document["edges"].items()},
                {str(k): str(v) for k, v in document["float"].items()},
                {str(k): np.asarray(v, np.float64) for k, v in document["scales"].items()},
                [str(n) for n in document["notes"]],
                {str(k): QParams(float(s), int(z), *map(str, more)) for k, (s, z, *more) in document.get("constants", {}).items()},
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise PlanError(f"{path}: can't be read as a quantization plan ({type(error).__name__}: {error})") from error
        if module is not None:
            groups = find_groups(module)
            plan.weights = {g.id: g.weight for g in groups if g.id in plan.scales and g.weight is not None}
            plan.validate(groups, [str(p.name) for p in Graph.of(module).inputs])
        return plan

    # -- checks -------------------------------------------------------------------------------------------------------------------------

    def validate(self, groups: Sequence[Group], inputs: Sequence[str]) -> None:
        """Raise PlanError, naming operator and value, where the plan contradicts itself or the model's groups and inputs."""
        known = {*inputs, *(g.id for g in groups)}
        for value in known | set(self.edges):
            if value not in known:
                raise PlanError(f"the plan has a row for value '{value}', which the model does not have; it was made for another model")
            params = self.params(value)
            if params is not None and not (math.isfinite(params.scale) and params.scale > 0 and -128 <= params.zero_point <= 127):
                raise PlanError(
                    f"value '{value}': scale {params.scale} and zero point {params.zero_point} are not usable; supported: scale > 0, zero point in [-128, 127]"
                )
        for unknown in set(self.scales) - {g.id for g in groups}:
            raise PlanError(f"the plan has weight scales for operator '{unknown}', which the model does not have; it was made for another model")
        for group in groups:
            if group.reason is not None and group.id not in self.reasons:
                raise PlanError(f"operator '{group.id}' is planned in 8 bits, but {group.reason}; it can only stay float")
            if group.id not in self.reasons:
                self._validate_int8(group)

    def _validate_int8(self, group: Group) -> None:
        where = f"{group.kind} '{group.id}' is planned in 8 bits, but"
        output = self.params(group.id)
        if output is None and not group.traits.accumulates:
            raise PlanError(f"{where} its output stays float32; give it parameters, or a reason to keep the operator in float")
        for value in group.operands:
            params = self.params(value)
            if params is None:
                raise PlanError(f"{where} its input '{value}' stays float32; give it parameters, or a reason to keep the operator in float")
            if params.dtype == "int16" and not (group.traits.reads_wide or value == group.residual):
                raise PlanError(f"{where} its input '{value}' has 16 bits, and {group.kind} reads 8; give it an 8-bit copy, or a reason to keep it in float")
            if group.traits.keeps and not group.traits.joins and params != output:
                raise PlanError(
                    f"{where} its input '{value}' has scale {params.scale} and zero point {params.zero_point}, unlike its output; {group.kind} keeps them"
                )
        if group.traits.weighted:
            assert group.weight is not None
            scale = self.scales.get(group.id)
            if scale is None or scale.shape != group.weight.shape[:1] or not (np.isfinite(scale).all() and (scale > 0).all()):
                raise PlanError(f"{where} it lacks {group.weight.shape[0]} positive weight scales, one per output channel")

    # -- text ---------------------------------------------------------------------------------------------------------------------------

    COLUMNS: ClassVar = ("value", "operator", "stored as", "scale", "zero point", "range", "SQNR dB", "why")

    def rows(self, groups: Sequence[Group] = ()) -> list[tuple[str, ...]]:
        """One row per value in order, under `COLUMNS`: its decision, range, estimated SQNR and reason. `groups` adds operators."""
        kinds = {g.id: g.kind for g in groups}
        rows: list[tuple[str, ...]] = []
        for value, edge in self.edges.items():
            params = self.params(value)
            operator = kinds.get(value, "") + (" (float32)" if value in self.reasons and kinds.get(value) != "float" else "")
            sqnr = getattr(edge, "sqnr", None)
            numbers = ("", "", "") if params is None else (f"{params.scale:.4g}", str(params.zero_point), _range(params))
            why = edge.reason + (f"; computed in float32: {self.reasons[value]}" if value in self.reasons and self.reasons[value] != edge.reason else "")
            stored = type(edge).__name__.lower() if params is None else f"{params.dtype} {type(edge).__name__.lower()}"
            rows.append((value, operator, stored, *numbers, "" if sqnr is None else f"{sqnr:.1f}", why))
        return rows

    def explain(self, groups: Sequence[Group] = (), halves: Mapping[str, Sequence[str]] = {}) -> str:
        """The plan as a text table of `rows`. halves: as `count_operators` has them."""
        rows = [self.COLUMNS, *self.rows(groups)]
        widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]) - 1)]
        lines = ["  ".join([*(c.ljust(w) for c, w in zip(r, widths, strict=False)), r[-1]]).rstrip() for r in rows]
        summary = [f"preset {self.preset}: {count_text(count_operators(groups, self.reasons, halves))}"] if groups else [f"preset {self.preset}"]
        return "\n".join([*summary, *(f"note: {n}" for n in self.notes), *lines]) + "\n"


def count_operators(groups: Sequence[Group], reasons: Collection[str], halves: Mapping[str, Sequence[str]] = {}) -> dict[str, int]:
    """Of a network's operators, how many compute in integers ("int8"; "int16", where there are any: those that read their operand in halves) and in float32
    ("float"): the count that every command states. reasons: ids of those that stay float. halves: {value: its upper and its lower half}
    (`passes/halves.py`); what halves values, and the first of two products, is no operator of its own."""
    uppers, lowers = ({pair[i] for pair in halves.values()} for i in (0, 1))
    whole = [g for g in groups if g.id not in uppers | lowers and not (g.traits.weighted and g.inputs[0] in uppers)]
    floats = sum(g.id in reasons for g in whole)
    sixteen = sum(g.traits.weighted and g.inputs[0] in lowers and g.id not in reasons for g in whole)
    return {"int8": len(whole) - floats - sixteen, **({"int16": sixteen} if sixteen else {}), "float": floats}


def _range(params: QParams) -> str:
    return "[{:.4g}, {:.4g}]".format(*params.range)


def _encode(edge: Edge) -> dict[str, Any]:
    row: dict[str, Any] = {"kind": type(edge).__name__.lower()}
    for name, value in vars(edge).items():
        if isinstance(value, QParams):
            row |= {"scale": value.scale, "zero_point": value.zero_point, **({} if value.dtype == "int8" else {"dtype": value.dtype})}
        else:
            row[name] = "inf" if value == math.inf else value
    return row


def _decode(row: Mapping[str, Any]) -> Edge:
    kind = _KINDS[row["kind"]]
    fields = {k: v for k, v in row.items() if k not in ("kind", "scale", "zero_point", "dtype")}
    if "scale" in row:
        fields["params"] = QParams(float(row["scale"]), int(row["zero_point"]), row.get("dtype", "int8"))
    if row.get("sqnr") is not None:
        fields["sqnr"] = float(row["sqnr"])
    edge: Edge = kind(**fields)
    return edge
