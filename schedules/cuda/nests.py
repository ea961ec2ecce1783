"""What the loop nests of TVM's legalization compute: `buffer[variables] = value`, or the same with a sum or maximum over further variables."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tvm.ir
import tvm.sym
import tvm_ffi
from tvm import tirx
from tvm.ir import Call, TensorLoad
from tvm.s_tir.stmt import SBlockRealize

_SPATIAL, _REDUCTION = 0, 2  # TVM's kinds of block iterators
_JOINS: Mapping[Any, str] = {tirx.Add: "sum", tirx.Mul: "product", tirx.Max: "max", tirx.Min: "min"}
_STARTS = {"sum": 0, "product": 1}
_NUMBERS = ("float32", "float64", "int32", "int64")  # that lanes of a warp hand each other


@dataclass(frozen=True)
class Reduction:
    """How the values of a nest become one. variables: with their extents."""

    variables: tuple[tuple[Any, int], ...]
    join: str  # "sum", "product", "max", "min"
    start: Any


@dataclass(frozen=True)
class Nest:
    """`buffer[variables] = value` for all of its indices; a variable is None where the index can be 0 alone."""

    store: Any  # of the value; what a map is handed must have another owner, or it is mapped in place
    variables: tuple[Any, ...]
    others: tuple[Any, ...]  # variables of loops that run once
    reduction: Reduction | None = None

    @property
    def buffer(self) -> Any:
        return self.store.buffer

    @property
    def value(self) -> Any:
        return self.store.value

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(d) for d in self.buffer.shape)

    @property
    def extents(self) -> list[tuple[Any, int]]:
        """Of all its variables."""
        spatial = [(v, d) for v, d in zip(self.variables, self.shape, strict=True) if v is not None]
        return [*spatial, *((v, 1) for v in self.others), *(self.reduction.variables if self.reduction else ())]

    def at(self, index: Sequence[Any], reduced: Sequence[Any] = ()) -> list[tuple[Any, Any]]:
        """(variable, what it is) for an element, or for what a reduction joins for one."""
        places = [(v, i) for v, i in zip(self.variables, index, strict=True) if v is not None] + [(v, 0) for v in self.others]
        return places + ([(v, i) for (v, _), i in zip(self.reduction.variables, reduced, strict=True)] if self.reduction else [])

    def inside(self, load: Any) -> bool:
        """Is it sure to be read inside of its shape, whatever a condition says?"""
        analyzer = _analyzer(self.extents)
        bounds = [analyzer.const_int_bound(i) for i in load.indices]
        return all(b.min_value >= 0 and b.max_value < int(d) for b, d in zip(bounds, load.source.shape, strict=True))

    def guards(self, value: Any) -> bool:
        """Does an expression keep what it reads inside by a choice?"""
        parts = choice(value)
        return parts is not None and not all(self.inside(load) for branch in parts[1:] for load in loads(branch))

    def certain(self, value: Any) -> bool:
        """Are those choices outermost, where a branch can make them, so that nothing else is conditional?"""
        if self.guards(value):
            condition, *branches = choice(value) or ()
            return self.certain(condition) and all(self.certain(branch) for branch in branches)
        return all(self.inside(load) for branch in _branches(value) for load in loads(branch))


@functools.lru_cache(1024)
def nests(function: Any) -> tuple[Nest, ...] | None:
    """What a legalized function computes, its result last; None where it has several results, does anything else than compute each element once, or reads
    under a condition in a way that no branch can follow."""
    body = function.body.block.body
    found = [_nests(stage) for stage in (body.seq if isinstance(body, tirx.SeqStmt) else [body])]
    whole = [nest for several in found for nest in several or ()]
    made = [nest.buffer for nest in whole]
    sure = None not in found and all(nest.certain(nest.value) for nest in whole)
    once = all(sum(b.same_as(m) for m in made) == 1 for b in made)
    own = len(function.body.block.alloc_buffers) + 1 == len(made)
    return tuple(whole) if sure and once and own and made[-1].same_as(function.params[-1]) else None


def reduces(function: Any) -> bool:
    """Is any of its nests a reduction?"""
    return any(nest.reduction for nest in nests(function) or ())


def loads(value: Any) -> list[Any]:
    """All that an expression reads."""
    found: list[Any] = []
    tvm_ffi.structural_walk(value, [(TensorLoad, found.append)], order="post")
    return found


def choice(value: Any) -> Sequence[Any] | None:
    """(condition, value where it holds, value where not) of an expression that evaluates only one of the two."""
    return list(value.args) if isinstance(value, Call) and str(getattr(value.op, "name", "")) == "prim.if_then_else" else None


@functools.lru_cache(1024)
def reads(function: Any) -> tuple[tuple[tuple[int | None, int, tuple[Any, ...]], ...], ...]:
    """What each nest of a function reads: (operand, or None), the nest that makes it otherwise, and the index: of ints, variables and expressions."""
    made, operands = [nest.buffer for nest in nests(function) or ()], list(function.params)[:-1]

    def place(buffer: Any, among: Sequence[Any]) -> int | None:
        return next((i for i, b in enumerate(among) if buffer.same_as(b)), None)

    def read(load: Any) -> tuple[int | None, int, tuple[Any, ...]]:
        return place(load.source, operands), place(load.source, made) or 0, tuple(int(i) if isinstance(i, tirx.IntImm) else i for i in load.indices)

    return tuple(tuple(map(read, loads(nest.value))) for nest in nests(function) or ())


@functools.lru_cache(1024)
def operand_reads(function: Any) -> tuple[str, ...]:
    """How each operand is read: "plain", at an index of the result; "moved", anywhere else; "guarded", under a condition without which it would be outside."""
    kinds = []
    for operand in list(function.params)[:-1]:
        found = {"plain"}
        for nest in nests(function) or ():
            for load in loads(nest.value):
                if load.source.same_as(operand):
                    found.add("plain" if _plain(load) and nest.inside(load) else "moved" if not nest.guards(nest.value) else "guarded")
        kinds.append(max(found, key=("plain", "moved", "guarded").index))
    return tuple(kinds)


def _plain(load: Any) -> bool:
    return all(isinstance(i, tirx.Var | tirx.IntImm) for i in load.indices)


def _analyzer(extents: Sequence[tuple[Any, int]]) -> Any:
    analyzer = tvm.sym.Analyzer()
    for variable, extent in extents:
        analyzer.bind(variable, tvm.ir.Range(0, extent))
    return analyzer


def _branches(value: Any) -> list[Any]:
    """What an expression computes under conditions."""
    found: list[Any] = []
    tvm_ffi.structural_walk(value, [(tirx.Select, lambda s: found.extend([s.true_value, s.false_value]))], order="post")
    tvm_ffi.structural_walk(value, [(Call, lambda c: found.extend((choice(c) or [])[1:]))], order="post")
    return found


def _nests(stage: Any) -> list[Nest] | None:
    while isinstance(stage, tirx.For):
        stage = stage.body
    if not isinstance(stage, SBlockRealize) or not (isinstance(stage.predicate, tirx.IntImm) and int(stage.predicate)):
        return None
    block, stores = stage.block, _stores(stage.block.body)
    starts = {} if block.init is None else {s.buffer: s.value for s in _stores(block.init) or []}
    kinds = {int(v.iter_type) for v in block.iter_vars}
    if not stores or not kinds <= {_SPATIAL, _REDUCTION} or len(starts) != (len(stores) if _REDUCTION in kinds else 0):
        return None
    made = [_nest(block, store, starts.get(store.buffer)) for store in stores]
    return None if None in made else [nest for nest in made if nest is not None]


def _stores(body: Any) -> list[Any] | None:
    """Its stores, with what is bound before them in its place; None where it does anything else."""
    bound: list[tuple[Any, Any]] = []
    found = []
    for each in body.seq if isinstance(body, tirx.SeqStmt) else [body]:
        if isinstance(each, tirx.Bind):
            bound.append((each.var, _replaced(each.value, bound)))
        elif isinstance(each, tirx.BufferStore):
            found.append(tirx.BufferStore(each.buffer, _replaced(each.value, bound), each.indices))
        else:
            return None
    return found


def _replaced(value: Any, bound: Sequence[tuple[Any, Any]]) -> Any:
    return tvm_ffi.structural_map(value, [(tirx.Var, lambda var: next((v for b, v in bound if var.same_as(b)), var))])


def _nest(block: Any, store: Any, start: Any) -> Nest | None:
    kinds: dict[int, list[tuple[Any, int]]] = {_SPATIAL: [], _REDUCTION: []}
    for v in block.iter_vars:
        kinds[int(v.iter_type)].append((v.var, int(v.dom.extent)))
    analyzer = _analyzer([*kinds[_SPATIAL], *kinds[_REDUCTION]])
    spatial = kinds[_SPATIAL]
    places = [next((i for i, (b, _) in enumerate(spatial) if index.same_as(b)), None) for index in store.indices]
    named = [p for p in places if p is not None]
    single = all(p is not None or int(d) == 1 for p, d in zip(places, store.buffer.shape, strict=True))
    rest = [v for i, v in enumerate(spatial) if i not in named]
    if len(set(named)) < len(named) or not single or any(extent != 1 for _, extent in rest):
        return None

    def simple(load: Any) -> Any:
        return load if _plain(load) else tirx.BufferLoad(load.source, [analyzer.simplify(i) for i in load.indices])

    value, reduction = tvm_ffi.structural_map(store.value, [(TensorLoad, simple)]), None
    if kinds[_REDUCTION]:
        join, added = _JOINS.get(type(value)), getattr(value, "b", None)
        own = [load.source.same_as(store.buffer) for load in loads(value)]
        first = isinstance(getattr(value, "a", None), TensorLoad) and value.a.source.same_as(store.buffer)
        if join is None or not first or sum(own) != 1 or str(store.buffer.dtype) not in _NUMBERS or start.value != _STARTS.get(join, start.value):
            return None
        value, reduction = added, Reduction(tuple(kinds[_REDUCTION]), join, start)
    kept = tirx.BufferStore(store.buffer, value, store.indices)
    return Nest(kept, tuple(None if p is None else spatial[p][0] for p in places), tuple(v for v, _ in rest), reduction)


def replaced(value: Any, variables: Sequence[tuple[Any, Any]], loaded: Callable[[Any], Any]) -> Any:
    """An expression with other variables (ints are constants then), and what `loaded` makes of what it reads."""

    def variable(var: Any) -> Any:
        at = next((i for v, i in variables if var.same_as(v)), None)
        if at is None:
            return var
        return tirx.const(at, str(var.ty)) if isinstance(at, int) else at if str(at.ty) == str(var.ty) else tirx.Cast(str(var.ty), at)

    return tvm_ffi.structural_map(value, [(tirx.Var, variable), (TensorLoad, loaded)])
