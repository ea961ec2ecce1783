"""What a model file says about its own quantization: the parameters that quantization-aware training, or another tool, chose.

The importer takes QuantizeLinear and DequantizeLinear out of the network and leaves this behind, as the attribute `qc.trained` of the module. A value
named here ends its group, because the model rounds it to 8 bits there; the plan takes its parameters as they are. Every pass that renames a value or lets
it vanish takes along what is stated of it; `sequence.run` fails when it didn't. `realize` and `select_float` leave it behind: it has been heard.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import tvm
from tvm import relax

from qcompiler.numerics.spec import QParams
from qcompiler.passes.graph import Graph, arguments, const_value, is_const, relax_op

ATTRIBUTE = "qc.trained"
EXACT, INTEGER, CALIBRATED = "exact", "integer", "calibrated"  # the parts of the attribute that converters of single operators add to


@dataclass
class Trained:
    """values: value id -> parameters. Of operators, by the id of their result: weights (float64 [O] scales), biases (float64 [O], exact multiples of
    input scale * weight scale), constants (parameters of the constant operand of an add, sub or mul), integer (the file states their weights in integers,
    with scales that have a kernel or not). calibrated: values that the file rounds to 8 bits under a scale that it finds when it runs. exact: value id ->
    why; values of the network's own quantization arithmetic: float32, whatever is asked. notes: what could not be taken over, and why.
    requantize: what the file leaves in float may be quantized too."""

    values: dict[str, QParams] = field(default_factory=dict)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    biases: dict[str, np.ndarray] = field(default_factory=dict)
    constants: dict[str, QParams] = field(default_factory=dict)
    integer: set[str] = field(default_factory=set)
    calibrated: set[str] = field(default_factory=set)
    exact: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    requantize: bool = False

    def __bool__(self) -> bool:
        return self.quantized or bool(self.exact or self.notes)

    @property
    def quantized(self) -> bool:
        """Does the file say which operators are computed on integers?"""
        return bool(self.values or self.integer or self.constants)

    @property
    def keeps_float(self) -> bool:
        """Does what the file leaves in float stay float?"""
        return self.quantized and not self.requantize

    @staticmethod
    def of(attrs: Mapping[str, Any]) -> Trained:
        """From a module's attributes; empty for a module without any."""
        found = attrs.get(ATTRIBUTE, {})

        def params(name: str) -> dict[str, QParams]:
            return {k: QParams(float(s), int(z)) for k, (s, z) in found.get(name, {}).items()}

        def arrays(name: str) -> dict[str, np.ndarray]:
            return {k: np.asarray(v, np.float64) for k, v in found.get(name, {}).items()}

        def names(name: str) -> set[str]:
            return {str(n) for n in found.get(name, [])}

        exact = {str(k): str(v) for k, v in found.get(EXACT, {}).items()}
        notes = [str(n) for n in found.get("notes", [])]
        return Trained(
            params("values"), arrays("weights"), arrays("biases"), params("constants"), names(INTEGER), names(CALIBRATED), exact, notes,
            bool(found.get("requantize", False)),
        )  # fmt: skip

    def attribute(self) -> dict[str, Any]:
        """As plain Python, for `ATTRIBUTE`."""
        document: dict[str, Any] = {name: {k: [p.scale, p.zero_point] for k, p in getattr(self, name).items()} for name in ("values", "constants")}
        document |= {name: {k: [float(x) for x in v] for k, v in getattr(self, name).items()} for name in ("weights", "biases")}
        document |= {name: dict.fromkeys(sorted(getattr(self, name)), "") for name in (INTEGER, CALIBRATED)}
        return document | {EXACT: dict(self.exact), "notes": list(self.notes), "requantize": self.requantize}

    def names(self) -> set[str]:
        """Every value id that something is stated of."""
        return {name for f in fields(self) if f.name not in ("notes", "requantize") for name in getattr(self, f.name)}

    def only(self, names: set[str]) -> Trained:
        """What is stated of these values."""
        kept: dict[str, Any] = {}
        for part in fields(self):
            old = getattr(self, part.name)
            kept[part.name] = {k: v for k, v in old.items() if k in names} if isinstance(old, dict) else old & names if isinstance(old, set) else old
        return Trained(**kept)

    def without(self, names: set[str]) -> Trained:
        return self.only(self.names() - names) if names & self.names() else self

    def renamed(self, names: Mapping[str, str]) -> Trained:
        """What was stated of a value is stated of the one that holds its elements now. Raises AssertionError where that one has other parameters."""
        moved = {k: v for k, v in names.items() if k in self.names()}
        if not moved:
            return self
        parts: dict[str, Any] = {"constants": {k: v for k, v in self.constants.items() if k not in moved}}  # of an operator that is gone
        for old, new in moved.items():
            if old in self.values:
                assert self.values.get(new, self.values[old]) == self.values[old], f"'{old}' and '{new}' are one value, rounded in two ways"
        for part in ("values", "weights", "biases", "exact"):
            found = getattr(self, part)
            parts[part] = {moved[k]: v for k, v in found.items() if k in moved} | {k: v for k, v in found.items() if k not in moved}
        for part in ("integer", "calibrated"):
            parts[part] = {moved.get(n, n) for n in getattr(self, part)}
        return replace(self, **parts)

    def folded(self, members: list[str], factors: np.ndarray) -> Trained:
        """After an operator (the first of `members`) took in multiplications by `factors` [O] and additions; the last of `members` is its result now."""
        first, last = members[0], members[-1]
        rest = self.without(set(members))
        weights = self.weights.get(first)
        if weights is not None and weights.shape == factors.shape and factors.all():
            rest = replace(rest, weights=rest.weights | {last: weights * np.abs(factors)})
        return replace(rest, integer=rest.integer | {last}) if first in self.integer else rest


def lost(module: tvm.IRModule) -> list[str]:
    """The values of which the model file states something, and which a module does not have."""
    return sorted(Trained.of(Graph.of(module).attrs).names() - _ids(module))


def settled(module: tvm.IRModule, variables: Mapping[str, str]) -> tvm.IRModule:
    """A module as an importer wrote it, with what is stated of tensors of the file said of the variables that hold them; of those that nothing needs, nothing.

    variables: tensor of the file -> variable."""
    trained, ids = Trained.of(Graph.of(module).attrs), _ids(module)
    if not trained:
        return module
    moved = {n: variables[n] for n in trained.names() - ids if variables.get(n) in ids}
    return tvm.IRModule({"main": module["main"].with_attr(ATTRIBUTE, trained.renamed(moved).only(ids).attribute())})


def _ids(module: tvm.IRModule) -> set[str]:
    graph = Graph.of(module)
    return {str(p.name) for p in graph.inputs} | {name for name, _ in graph.bindings}


def in_eight_bits(graph: Graph) -> dict[str, QParams | None]:
    """value id -> its parameters, for values that the model file rounds to 8 bits, and those that only hold elements of such a value; None: calibrated.

    In a QDQ module also what `relax.dequantize` yields.
    """
    trained = Trained.of(graph.attrs)
    found: dict[str, QParams | None] = {**dict.fromkeys(trained.calibrated), **trained.values}
    for name, expr in graph.bindings:
        if name in found:
            continue
        if relax_op(expr) == "relax.dequantize" and not is_const(expr.args[0]):
            scale, zero_point = (const_value(a) for a in expr.args[1:3])
            found[name] = QParams(float(scale.reshape(())), int(zero_point.reshape(())))
        elif _moves(expr):
            operands = [a for a in arguments(expr) if isinstance(a, relax.Var)]
            params = [found.get(str(a.name)) for a in operands]
            known = len(operands) == len(arguments(expr)) and all(str(a.name) in found for a in operands)
            if known and (len(operands) == 1 or (params[0] is not None and all(p == params[0] for p in params))):
                found[name] = params[0]
    return found


def _moves(expr: Any) -> bool:
    """Are all elements of the result elements of the operands, or 0?"""
    op = relax_op(expr)
    if op == "relax.nn.pad":
        return str(expr.attrs.pad_mode) == "constant" and float(expr.attrs.pad_value) == 0.0
    if op == "relax.image.resize2d":
        return str(expr.attrs.method) == "nearest_neighbor"
    return op in _MOVES or isinstance(expr, relax.TupleGetItem)


_MOVES = {f"relax.{op}" for op in ("reshape permute_dims squeeze expand_dims flatten strided_slice split concat nn.max_pool2d").split()}
