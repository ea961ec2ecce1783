"""Operators that go element by element, several to a kernel: a thread per element of what is written, all that lies between in registers.

    func(x: Buffer, y: Buffer) of TVM's legalization, quantize, dequantize, reshape   -->   kernel(*operands, *constants, scalars, *results)

Each result is computed from the operands alone, so no thread waits for another: what two results have in common is computed twice where their shapes differ.
Products are rounded before they are added to (`__fmul_rn`): fused operators yield what they yield one by one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tvm_ffi
from tvm import tirx
from tvm.ir import Call, TensorLoad
from tvm.s_tir.stmt import SBlockRealize
from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.schedules.builder import BLOCK, Emitter, View, dense_strides, make_kernel, view
from qcompiler.schedules.cuda.base import local
from qcompiler.schedules.portable.elementwise import dequantized, quantized
from qcompiler.schedules.portable.nest import Compute
from qcompiler.schedules.portable.threads import each, unravel
from qcompiler.schedules.table import Kernel, Layout, OpCall

LARGEST = 2**31 - BLOCK  # elements: indices are int32, those of a last block's idle threads too
CONVERSIONS: dict[str, Callable[[Emitter], Compute]] = {"qc.quantize": lambda k: quantized(k)[0], "qc.dequantize": dequantized}
_SPATIAL = 0  # TVM's kind of a block iterator
_ROUNDED = {"float32": "__fmul_rn", "float64": "__dmul_rn"}


@dataclass(frozen=True)
class Nest:
    """`buffer[variables] = value` for all of its indices; a variable is None where the index can be 0 alone."""

    buffer: Any
    variables: tuple[Any, ...]
    value: Any
    others: tuple[Any, ...]  # variables of loops that run once


@dataclass(frozen=True)
class Part:
    """An operator. reads: for each operand, a number of the kernel's operands, or, behind them, of the parts. function: the PrimFunc of a legalized one."""

    call: OpCall
    reads: tuple[int, ...]
    function: Any = None


@dataclass
class FusedCall(OpCall):
    """All of them as one call of what comes from outside. results: numbers of the parts that are written."""

    parts: Sequence[Part] = ()
    results: Sequence[int] = ()

    @property
    def written(self) -> list[Layout]:
        return [self.parts[i].call.output for i in self.results]


@functools.lru_cache(1024)
def nests(function: Any) -> tuple[Nest, ...] | None:
    """What a legalized function computes, its result last; None where it has several results, reduces, or does anything else than store each element once."""
    body = function.body.block.body
    found = [_nest(stage) for stage in (body.seq if isinstance(body, tirx.SeqStmt) else [body])]
    whole = [nest for nest in found if nest is not None]
    made = [nest.buffer for nest in whole]
    once = len(whole) == len(found) and all(sum(b.same_as(m) for m in made) == 1 for b in made)
    own = len(function.body.block.alloc_buffers) + 1 == len(made)
    return tuple(whole) if once and own and made[-1].same_as(function.params[-1]) else None


def _nest(stage: Any) -> Nest | None:
    loops = []
    while isinstance(stage, tirx.For):
        loops.append(stage)
        stage = stage.body
    if not isinstance(stage, SBlockRealize) or not isinstance(stage.block.body, tirx.BufferStore) or stage.block.init is not None:
        return None
    block, store = stage.block, stage.block.body
    if any(int(v.iter_type) != _SPATIAL for v in block.iter_vars) or not _certain(stage.predicate):
        return None
    bound = [v.var for v in block.iter_vars]
    places = [next((i for i, b in enumerate(bound) if index.same_as(b)), None) for index in store.indices]
    named = [p for p in places if p is not None]
    single = all(p is not None or int(d) == 1 for p, d in zip(places, store.buffer.shape, strict=True))
    rest = [i for i in range(len(bound)) if i not in named]
    if len(set(named)) < len(named) or not single or any(int(block.iter_vars[i].dom.extent) != 1 for i in rest):
        return None
    return Nest(store.buffer, tuple(None if p is None else bound[p] for p in places), store.value, tuple(bound[i] for i in rest))


def _certain(condition: Any) -> bool:
    return isinstance(condition, tirx.IntImm) and bool(int(condition))


@functools.lru_cache(1024)
def _loads(function: Any) -> tuple[Any, ...] | None:
    """Of each operand: is it read inside of its shape, whatever a condition says? None: see `nests`."""
    found = nests(function)
    if found is None:
        return None
    operands = list(function.params)[:-1]
    safe = [True] * len(operands)
    for nest in found:
        branches: list[Any] = []
        tvm_ffi.structural_walk(nest.value, [(Call, branches.append), (tirx.Select, branches.append)], order="post")
        conditional = any(isinstance(b, tirx.Select) or str(getattr(b.op, "name", "")) == "prim.if_then_else" for b in branches)

        def visit(load: Any, conditional: bool = conditional) -> None:
            plain = all(isinstance(i, tirx.Var | tirx.IntImm) for i in load.indices)
            for number, operand in enumerate(operands):
                if load.source.same_as(operand) and conditional and not plain:
                    safe[number] = False

        tvm_ffi.structural_walk(nest.value, [(TensorLoad, visit)], order="post")
    return tuple(safe)


def goes_by_elements(function: Any) -> bool:
    """Does a legalized function compute each element of its one result by itself?"""
    return _loads(function) is not None


def reads_inside(function: Any, operand: int) -> bool:
    """May an operand be computed in registers wherever the function reads it? Not where a condition keeps it from reading outside of its shape."""
    return bool((_loads(function) or ())[operand])


def fused_kernel(call: FusedCall, target: Target) -> Kernel:
    """A thread for each element of the largest result."""

    def emit(k: Emitter) -> None:
        sources = k.operands()
        conversions = [CONVERSIONS[p.call.name](replace(k, op=p.call)) if p.call.name in CONVERSIONS else None for p in call.parts]
        for shape in dict.fromkeys(layout.shape for layout in call.written):
            with each(k, *shape) as index:
                values = _Values(call, sources, conversions)
                for number, layout, output in zip(call.results, call.written, k.outputs, strict=True):
                    if layout.shape == shape:
                        T.buffer_store(output, values.of(len(call.operands) + number, index), [T.int32(0) + view(output, layout).at(index)])

    largest = max(math.prod(layout.shape) for layout in call.written)
    arrays = [o for o in call.operands if isinstance(o, np.ndarray)]
    return make_kernel("cuda/fused", call, target, emit, threads=max(largest, 1), arrays=arrays)


class _Values:
    """Values of one thread, each computed once for each place where it is read."""

    def __init__(self, call: FusedCall, sources: Sequence[View], conversions: Sequence[Compute | None]) -> None:
        self.call, self.sources, self.parts = call, sources, list(zip(call.parts, conversions, strict=True))
        self.known: dict[tuple[int, int], list[tuple[list[Any], Any]]] = {}  # number, and stage of a part --> (index, value)
        self.places: list[tuple[Any, Any]] = []  # (index, where it is held)

    def of(self, number: int, index: Sequence[Any]) -> Any:
        """Of an operand, or of a part."""
        if number < len(self.call.operands):
            source = self.sources[number]
            return self.once((number, 0), index, lambda: source.buffer[T.int32(0) + source.at(index)])
        part, compute = self.parts[number - len(self.call.operands)]
        if part.call.name == "qc.reshape":
            return self.of(part.reads[0], self.reshaped(index, part.call.output.shape, part.call.tensors[0].shape))
        if compute is not None:
            axes = part.call.attrs.get("axes") or range(len(index))
            moved = dict(zip(axes, index, strict=True))
            return self.once((number, 0), index, lambda: compute([self.of(part.reads[0], [moved[a] for a in range(len(index))])], 1))
        made = nests(part.function)
        assert made is not None

        def buffer(which: Any, at: Sequence[Any]) -> Any:
            for operand, parameter in zip(part.reads, part.function.params, strict=False):
                if which.same_as(parameter):
                    return self.of(operand, at)
            stage = next(i for i, nest in enumerate(made) if nest.buffer.same_as(which))
            return self.once((number, stage), at, lambda: self.element(made[stage], at, buffer))

        return buffer(made[-1].buffer, index)

    def element(self, nest: Nest, index: Sequence[Any], buffer: Callable[[Any, Sequence[Any]], Any]) -> Any:
        variables = [(v, i) for v, i in zip(nest.variables, index, strict=True) if v is not None] + [(v, 0) for v in nest.others]

        def variable(var: Any) -> Any:
            at = next((i for v, i in variables if var.same_as(v)), None)
            return var if at is None else tirx.const(at, str(var.ty)) if isinstance(at, int) else T.Cast(str(var.ty), at)

        def loaded(load: Any) -> Any:
            return buffer(load.source, [self.place(i) for i in load.indices])

        return tvm_ffi.structural_map(nest.value, [(tirx.Var, variable), (TensorLoad, loaded)])

    def once(self, what: tuple[int, int], index: Sequence[Any], value: Callable[[], Any]) -> Any:
        for at, found in self.known.get(what, []):
            if all(_same(a, b) for a, b in zip(at, index, strict=True)):
                return found
        made = _held(rounded(value()))
        self.known.setdefault(what, []).append((list(index), made))
        return made

    def place(self, index: Any) -> Any:
        """An index as an int, or as one and the same int32 wherever it is equal."""
        narrow = _narrow(index)
        if isinstance(narrow, int | tirx.Var):
            return narrow
        for expression, held in self.places:
            if narrow.same_as(held) or tvm_ffi.structural_equal(expression, narrow):
                return held
        self.places.append((narrow, _held(narrow)))
        return self.places[-1][1]

    def reshaped(self, index: Sequence[Any], shape: Sequence[int], source: Sequence[int]) -> list[Any]:
        """The index into `source` of an element of the same tensor as `shape`."""
        kept = [i for i, d in zip(index, shape, strict=True) if d != 1]
        if [d for d in shape if d != 1] == [d for d in source if d != 1]:
            along = iter(kept)
            return [0 if d == 1 else next(along) for d in source]
        flat = self.place(View(None, "", tuple(shape), dense_strides(shape)).at(index))
        return [self.place(i) for i in unravel(flat, source)]


def _held(value: Any) -> Any:
    """A value in a register. TVM's simplifier, in a pass of the code generator, puts what is bound to variables in their places: code would double with each
    value that is read twice, and that pass would never end."""
    register = local(1, str(value.ty))
    T.buffer_store(register, value, [0])
    return register[0]


def rounded(value: Any) -> Any:
    """The same with products that no compiler contracts with a sum."""

    def product(node: Any) -> Any:
        name = _ROUNDED.get(str(node.ty))
        return T.call_pure_extern(str(node.ty), name, node.a, node.b) if name else node

    return tvm_ffi.structural_map(value, [(tirx.Mul, product)])


def _same(a: Any, b: Any) -> bool:
    """Are these one index: an int, or a variable?"""
    return a == b if isinstance(a, int) and isinstance(b, int) else not isinstance(a, int) and not isinstance(b, int) and bool(a.same_as(b))


def _narrow(index: Any) -> Any:
    """An index in int32, as an int where it is one."""
    if isinstance(index, int):
        return index
    if isinstance(index, tirx.IntImm):
        return int(index)
    if isinstance(index, tirx.Cast) and str(index.ty) == "int64":
        return _narrow(index.value)
    for kind, combine in _ARITHMETIC.items():
        if isinstance(index, kind):
            return combine(_narrow(index.a), _narrow(index.b))
    return index if str(index.ty) == "int32" else T.Cast("int32", index)


_ARITHMETIC: dict[Any, Callable[[Any, Any], Any]] = {tirx.Add: lambda a, b: a + b, tirx.Sub: lambda a, b: a - b, tirx.Mul: lambda a, b: a * b}
