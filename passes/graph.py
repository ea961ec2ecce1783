"""The one way passes read and write Relax: a flat list of named bindings.

A module here is one Relax function `main` with a single dataflow block and no control flow. Each binding's variable is named by its
*value id*: the name of the tensor in the source model that holds the same value (see docs/architecture.md). Passes read a `Graph`, and write a
new module with a `GraphBuilder`; a rewrite that keeps a value keeps its name.

Our own operators are `R.call_pure_packed("qc.<op>", tensors..., attributes)`; what each means is defined by `qcompiler.numerics.operators`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import relax

from qcompiler.base.memory import is_aligned
from qcompiler.base.value_ids import Naming

ANY_TYPE = ("qc.cumulative", "qc.top_k", "qc.scatter", "qc.bitcast")  # operators of ours on any element type, which importers emit where TVM has no kernel
_CALL_PURE_PACKED = tvm.ir.Op.get("relax.call_pure_packed")


def tensor_type(shape: Iterable[int], dtype: str) -> Any:
    """The Relax type of a static tensor."""
    return relax.TensorType(tuple(int(d) for d in shape), dtype)


def shape_of(expr: Any) -> tuple[int, ...]:
    """Static shape of a Relax expression whose type is a tensor."""
    return tuple(int(d) for d in expr.ty.shape.values[:])  # a slice is a list at once: iterating asks TVM for the length at each element


def dtype_of(expr: Any) -> str:
    return str(expr.ty.dtype)


def is_const(expr: Any) -> bool:
    return isinstance(expr, tvm.ir.GenericConst)


def const_value(expr: Any) -> np.ndarray:
    """The array of a Relax constant: its own memory, read-only."""
    view: np.ndarray = np.from_dlpack(expr.value)[...]
    view.flags.writeable = False
    return view


def const(array: np.ndarray | np.generic) -> Any:
    """A Relax constant. The memory of an array that is read-only and aligned is shared with it, any other is copied."""
    array = np.asarray(array, order="C")
    shared = array.view() if not array.flags.writeable and array.nbytes and is_aligned(array) else None
    if shared is not None:
        try:
            shared.flags.writeable = True  # numpy gives no other away; refused where the memory itself is read-only
        except ValueError:
            shared = None
    return relax.const(tvm.runtime.tensor(array) if shared is None else tvm.runtime.from_dlpack(shared))


def plain(value: Any) -> Any:
    """A TVM attribute value as plain Python (ints, floats, strings, bools, None, lists, dicts)."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping) or hasattr(value, "items"):
        return {str(k): plain(v) for k, v in value.items()}
    if hasattr(value, "value"):  # IntImm, FloatImm
        return value.value
    return [plain(v) for v in value]


def make_op(name: str, tensors: Iterable[Any], attrs: Mapping[str, Any], shape: Iterable[int], dtype: str) -> Any:
    """A call of the operator `name` ("qc.conv2d", ...) that yields one tensor of `shape` and `dtype`.

    `attrs` holds plain Python values only; lists may nest.
    """
    ty = tensor_type(shape, dtype)
    return tvm.ir.Call(_CALL_PURE_PACKED, [relax.ExternFunc(name), *tensors], dict(attrs), [ty], ret_ty=ty)


def match_op(expr: Any) -> tuple[str, list[Any], dict[str, Any]] | None:
    """(operator name, tensor arguments, attributes) of a call made by `make_op`; None for any other expression."""
    if not (isinstance(expr, tvm.ir.Call) and expr.op == _CALL_PURE_PACKED):
        return None
    attrs = {} if expr.attrs is None else {str(k): plain(v) for k, v in dict(expr.attrs).items()}
    return str(expr.args[0].global_symbol), list(expr.args[1:]), attrs


def relax_op(expr: Any) -> str | None:
    """The name of the Relax operator that `expr` calls ("relax.nn.conv2d"), or None."""
    return str(expr.op.name) if isinstance(expr, tvm.ir.Call) and isinstance(expr.op, tvm.ir.Op) else None


def slice_ranges(expr: Any) -> list[range] | None:
    """The places along each axis that a `relax.strided_slice` takes; None where they are computed at run time."""
    if not all(hasattr(bounds, "fields") for bounds in expr.args[1:]):
        return None
    found = [range(d) for d in shape_of(expr.args[0])]
    axes, begin, end, *rest = ([int(plain(v)) for v in bounds.fields] for bounds in expr.args[1:])
    for axis, *bounds in zip(axes, begin, end, rest[0] if rest else [1] * len(axes), strict=True):
        found[axis] = found[axis][slice(*bounds)]
    return found


@dataclass
class Graph:
    """A module read as named bindings, in execution order. Variables are compared by identity (`same_as`) or by name."""

    inputs: list[Any]
    bindings: list[tuple[str, Any]]  # (value id, expression over vars and constants)
    outputs: list[tuple[str, Any]]  # (output name, var)
    attrs: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(module: tvm.IRModule) -> Graph:
        """Raises AssertionError when the module is not of the form this file describes."""
        function = module["main"]
        blocks = function.body.blocks
        assert len(blocks) <= 1, "one dataflow block expected"
        bindings = [(str(b.var.name), b.value) for b in blocks[0].bindings] if len(blocks) else []
        variables = {str(b.var.name): b.var for b in blocks[0].bindings} if len(blocks) else {}
        assert len(variables) == len(bindings), "value ids must be unique"
        body = function.body.body
        results = list(body.fields) if isinstance(body, relax.Tuple) else [body]
        attrs = {str(k): plain(v) for k, v in dict(function.attrs).items() if str(k).startswith("qc.")} if function.attrs else {}
        names = attrs.pop("qc.outputs", [str(r.name) for r in results])
        return Graph(list(function.params), bindings, list(zip(names, results, strict=True)), attrs)

    @property
    def naming(self) -> Naming:
        return Naming.of(self.attrs)

    def values(self) -> dict[str, Any]:
        """value id -> expression, for bindings (not for inputs)."""
        return dict(self.bindings)

    def consumers(self) -> dict[str, list[str]]:
        """value id -> ids of the bindings that read it, once per use; outputs count as the consumer "<output>"."""
        uses: dict[str, list[str]] = {name: [] for name in [*(str(p.name) for p in self.inputs), *(n for n, _ in self.bindings)]}
        for name, expr in self.bindings:
            for arg in arguments(expr):
                if isinstance(arg, relax.Var):
                    uses[str(arg.name)].append(name)
        for _, var in self.outputs:
            uses[str(var.name)].append("<output>")
        return uses


def arguments(expr: Any) -> list[Any]:
    """The tensor-valued arguments of an expression, tuples flattened, the callee left out."""
    if isinstance(expr, relax.Var):
        return [expr]
    if isinstance(expr, relax.TupleGetItem):
        return [expr.tuple_value]
    if isinstance(expr, relax.Tuple):
        return list(expr.fields)
    if isinstance(expr, tvm.ir.Call):
        flat: list[Any] = []
        for arg in expr.args[:]:
            flat += list(arg.fields) if isinstance(arg, relax.Tuple) else [arg]
        flat = [a for a in flat if isinstance(a, (relax.Var, relax.TupleGetItem)) or is_const(a)]  # not shapes, bounds, callees
        return flat
    return []


class GraphBuilder:
    """Writes a module of the form `Graph` reads. `emit` infers the type, so a wrong rewrite fails where it is made."""

    def __init__(self, attrs: Mapping[str, Any] | None = None) -> None:
        self._inputs: list[Any] = []
        self._bindings: list[Any] = []
        self._names: set[str] = set()
        self._reserved: set[str] = set()
        self._attrs = dict(attrs or {})
        self.naming = Naming.of(self._attrs)
        self._normalizer = relax.BlockBuilder()

    def input(self, name: str, shape: Iterable[int], dtype: str) -> Any:
        assert name not in self._names, f"value id {name!r} is taken"
        self._names.add(name)
        var = relax.Var(name, tensor_type(shape, dtype))
        self._inputs.append(var)
        return var

    def reserve(self, names: Iterable[str]) -> None:
        """Names that `fresh` never hands out: those of bindings still to be emitted."""
        self._reserved |= set(names)

    def fresh(self, name: str) -> str:
        """`name`, or the first free name beside it."""
        candidate, count = name, 0
        while candidate in self._names or candidate in self._reserved:
            count += 1
            candidate = self.naming.made(name, count)
        return candidate

    def made(self, id: str, what: str) -> str:
        """The first free name for `what` beside the value `id`."""
        return self.fresh(self.naming.made(id, what))

    def state(self, attribute: str, value: Any) -> None:
        """Set an attribute of the module."""
        self._attrs[attribute] = value

    def annotate(self, attribute: str, part: str, name: str, text: str) -> None:
        """Say something of a value: the module's `attribute`, a dictionary, gets {part: {name: text}}."""
        self._attrs.setdefault(attribute, {}).setdefault(part, {})[name] = text

    def note(self, attribute: str, text: str) -> None:
        """Add to the list `notes` of the module's `attribute`, a dictionary."""
        self._attrs.setdefault(attribute, {}).setdefault("notes", []).append(text)

    def emit(self, name: str, expr: Any) -> Any:
        """Bind `expr` to the value id `name` and return its variable."""
        assert name not in self._names, f"value id {name!r} is taken"
        self._names.add(name)
        expr = self._typed(expr)
        var = relax.DataflowVar(name, expr.ty)
        self._bindings.append(relax.VarBinding(var, expr))
        return var

    def _typed(self, expr: Any) -> Any:
        typed = isinstance(expr, relax.Var) or (isinstance(expr, tvm.ir.Call) and type(expr.ty) is not tvm.ir.Type)
        return expr if typed else self._normalizer.normalize(expr)

    def finish(self, outputs: list[tuple[str, Any]]) -> tvm.IRModule:
        """The module that returns `outputs` ((name, var) pairs, in order); bindings no output needs are dropped."""
        needed, kept = {str(v.name) for _, v in outputs}, []
        for binding in reversed(self._bindings):
            if str(binding.var.name) in needed:
                kept.append(binding)
                needed |= {str(a.name) for a in arguments(binding.value) if isinstance(a, relax.Var)}
        kept.reverse()
        returned = {str(v.name) for _, v in outputs}
        replaced: dict[str, Any] = {}
        bindings = []
        for binding in kept:  # what leaves the block must be a plain Var, and so be read as one
            name, expr = str(binding.var.name), binding.value
            if any(isinstance(a, relax.Var) and str(a.name) in replaced for a in arguments(expr)):
                expr = self._typed(substitute(expr, lambda v: replaced.get(str(v.name), v)))
            elif name not in returned:
                bindings.append(binding)
                continue
            var = replaced[name] = relax.Var(name, binding.var.ty) if name in returned else relax.DataflowVar(name, binding.var.ty)
            bindings.append(relax.VarBinding(var, expr))
        results = [replaced.get(str(v.name), v) for _, v in outputs]
        result = self._typed(relax.Tuple(results))
        body = relax.SeqExpr([relax.DataflowBlock(bindings)], result)
        function = relax.Function(self._inputs, self._normalizer.normalize(body), relax.TupleType([r.ty for r in results]))
        function = function.with_attr("global_symbol", "main").with_attr("qc.outputs", [n for n, _ in outputs])
        for key, value in self._attrs.items():
            function = function.with_attr(key, value)
        return tvm.IRModule({"main": function})


def substitute(expr: Any, replace: Callable[[Any], Any]) -> Any:
    """`expr` with `replace` applied to each variable it reads directly. A call of variables of the same types as before keeps its type; any other is
    inferred again by `GraphBuilder.emit`, which for a convolution takes longer than all else that a pass does with it."""
    if isinstance(expr, relax.Var):
        return replace(expr)
    if isinstance(expr, relax.Tuple):
        return relax.Tuple([substitute(f, replace) for f in expr.fields])
    if isinstance(expr, relax.TupleGetItem):
        return relax.TupleGetItem(substitute(expr.tuple_value, replace), expr.index)
    if isinstance(expr, tvm.ir.Call):
        before = expr.args[:]
        after = [substitute(a, replace) for a in before]
        alike = all(new is old or (isinstance(old, relax.Var) and tvm_ffi.structural_equal(new.ty, old.ty)) for old, new in zip(before, after, strict=True))
        result = expr.ty_args[0] if expr.op == _CALL_PURE_PACKED else expr.ty if alike else None
        return tvm.ir.Call(expr.op, after, expr.attrs, expr.ty_args, ret_ty=result)
    return expr


def rebuilt(graph: Graph, names: Collection[str], replace: Callable[[GraphBuilder, str, Any, Any], Any]) -> tvm.IRModule:
    """The module with the bindings `names` made anew. replace(builder, name, the expression with its new operands, the old one): the variable that takes its
    place."""
    builder = GraphBuilder(graph.attrs)
    builder.reserve(name for name, _ in graph.bindings)
    env = {str(p.name): builder.input(str(p.name), shape_of(p), dtype_of(p)) for p in graph.inputs}
    for name, old in graph.bindings:
        expr = substitute(old, lambda v: env[str(v.name)])
        env[name] = replace(builder, name, expr, old) if name in names else builder.emit(name, expr)
    return builder.finish([(name, env[str(v.name)]) for name, v in graph.outputs])
