"""Operators that go element by element, several to a kernel: a thread per element of what is written, all that lies between in registers.

    func(x: Buffer, y: Buffer) of TVM's legalization, quantize, dequantize, reshape   -->   kernel(*operands, *constants, scalars, *results)

Each result is computed from the operands alone, so no thread waits for another: what two results have in common is computed twice where their shapes differ.
Products are rounded before they are added to (`__fmul_rn`): fused operators yield what they yield one by one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tvm_ffi
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.schedules.builder import Emitter, View, dense_strides, make_kernel, view
from qcompiler.schedules.cuda.base import local
from qcompiler.schedules.cuda.nests import Nest, choice, nests, reads, replaced
from qcompiler.schedules.portable.elementwise import dequantized, quantized
from qcompiler.schedules.portable.nest import Compute
from qcompiler.schedules.portable.threads import each, unravel
from qcompiler.schedules.table import Kernel, Layout, OpCall

CONVERSIONS: dict[str, Callable[[Emitter], Compute]] = {"qc.quantize": lambda k: quantized(k)[0], "qc.dequantize": dequantized}
_ROUNDED = {"float32": "__fmul_rn", "float64": "__dmul_rn"}

Stage = tuple[int, int]  # a number of operands or parts, and which nest of a legalized one


@dataclass(frozen=True)
class Part:
    """An operator. reads: for each operand, a number of the kernel's operands, or, behind them, of the parts. function: the PrimFunc of a legalized one."""

    call: OpCall
    reads: tuple[int, ...]
    function: Any = None

    @functools.cached_property
    def nests(self) -> tuple[Nest, ...]:
        """Of a legalized one."""
        return (nests(self.function) if self.function is not None else None) or ()

    def moved(self, index: Sequence[Any]) -> list[Any]:
        """What a conversion reads for an element of its result."""
        there = dict(zip(self.call.attrs.get("axes") or range(len(index)), index, strict=True))
        return [there[a] for a in range(len(index))]


@dataclass
class FusedCall(OpCall):
    """All of them as one call of what comes from outside. results: numbers of the parts that are written."""

    parts: Sequence[Part] = ()
    results: Sequence[int] = ()

    @property
    def written(self) -> list[Layout]:
        return [self.parts[i].call.output for i in self.results]

    @property
    def arrays(self) -> list[np.ndarray]:
        return [o for o in self.operands if isinstance(o, np.ndarray)]

    @property
    def reduces(self) -> bool:
        return any(nest.reduction for part in self.parts for nest in part.nests)

    def part(self, number: int) -> Part:
        return self.parts[number - len(self.operands)]

    def last(self, number: int) -> Stage:
        """Of an operand or a part."""
        return number, max(len(self.part(number).nests) - 1, 0) if number >= len(self.operands) else 0

    def reads(self, what: Stage) -> list[tuple[Stage, tuple[Any, ...]]]:
        """What a nest of a part reads, and where."""
        part = self.part(what[0])
        found = reads(part.function)[what[1]]
        return [((what[0], stage) if operand is None else self.last(part.reads[operand]), index) for operand, stage, index in found]

    def source(self, number: int, buffer: Any) -> Stage:
        """What a nest of a part reads."""
        part = self.part(number)
        operand = next((n for n, p in zip(part.reads, part.function.params, strict=False) if buffer.same_as(p)), None)
        return (number, next(i for i, n in enumerate(part.nests) if n.buffer.same_as(buffer))) if operand is None else self.last(operand)


def elements_kernel(call: FusedCall, target: Target) -> Kernel:
    """A thread for each element of the largest result."""

    def emit(k: Emitter) -> None:
        conversions = conversions_of(k, call)
        for shape in dict.fromkeys(layout.shape for layout in call.written):
            with each(k, *shape) as index:
                values = Values(k, call, conversions)
                for number, layout, output in zip(call.results, call.written, k.outputs, strict=True):
                    if layout.shape == shape:
                        T.buffer_store(output, values.of(len(call.operands) + number, index), [T.int32(0) + view(output, layout).at(index)])

    largest = max(math.prod(layout.shape) for layout in call.written)
    return make_kernel("cuda/fused", call, target, emit, threads=max(largest, 1), arrays=call.arrays)


def conversions_of(k: Emitter, call: FusedCall) -> list[Compute | None]:
    """How parts that are conversions compute."""
    return [CONVERSIONS[p.call.name](replace(k, op=p.call)) if p.call.name in CONVERSIONS else None for p in call.parts]


class Values:
    """Values of one thread, each computed once for each place where it is read. held: of stages of parts, those that are the same wherever they are read."""

    def __init__(self, k: Emitter, call: FusedCall, conversions: Sequence[Compute | None]) -> None:
        self.call, self.sources, self.conversions = call, k.operands(), conversions
        self.known: dict[Stage, list[tuple[list[Any], Any]]] = {}  # (index, value)
        self.places: list[tuple[Any, Any]] = []  # (index, where it is held)
        self.held: dict[Stage, Any] = {}

    @contextmanager
    def scope(self) -> Iterator[None]:
        """What is computed in it is known in it alone."""
        known, places = {what: list(found) for what, found in self.known.items()}, list(self.places)
        yield
        self.known, self.places = known, places

    def of(self, number: int, index: Sequence[Any]) -> Any:
        """Of an operand, or of a part."""
        return self.stage(self.call.last(number), index)

    def stage(self, what: Stage, index: Sequence[Any]) -> Any:
        """Of an operand, or of what a part computes on its way."""
        if what in self.held:
            return self.held[what]
        number = what[0]
        if number < len(self.call.operands):
            source = self.sources[number]
            return self.once(what, index, lambda: source.buffer[T.int32(0) + source.at(index)])
        part = self.call.part(number)
        if part.call.name == "qc.reshape":
            return self.of(part.reads[0], self.reshaped(index, part.call.output.shape, part.call.tensors[0].shape))
        return self.once(what, index, lambda: self.computed(what, index))

    def computed(self, what: Stage, index: Sequence[Any], reduced: Sequence[Any] = ()) -> Any:
        """An element of a stage, or what a reduction joins. reduced: the index of its further variables."""
        number, stage = what
        part, compute = self.call.part(number), self.conversions[number - len(self.call.operands)]
        if compute is not None:
            return compute([self.of(part.reads[0], part.moved(index))], 1)
        nest = part.nests[stage]
        variables = nest.at(index, reduced)

        def loaded(load: Any) -> Any:
            return self.stage(self.call.source(number, load.source), [self.place(i) for i in load.indices])

        def value(expression: Any) -> Any:
            if not nest.guards(expression):
                return replaced(expression, variables, loaded)
            condition, *branches = choice(expression) or ()
            result, condition = local(1, str(expression.ty)), replaced(condition, variables, loaded)
            with T.If(condition):
                for branch, frame in zip(branches, (T.Then, T.Else), strict=True):
                    with frame(), self.scope():
                        T.buffer_store(result, rounded(value(branch)), [0])
            return result[0]

        return value(nest.value)

    def once(self, what: tuple[int, int], index: Sequence[Any], value: Callable[[], Any]) -> Any:
        for at, found in self.known.get(what, []):
            if all(_same(a, b) for a, b in zip(at, index, strict=True)):
                return found
        made = held(rounded(value()))
        self.known.setdefault(what, []).append((list(index), made))
        return made

    def place(self, index: Any) -> Any:
        """An index as an int, or as one and the same int32 wherever it is equal."""
        narrow = _narrow(index)
        if isinstance(narrow, int | tirx.Var):
            return narrow
        for expression, found in self.places:
            if narrow.same_as(found) or tvm_ffi.structural_equal(expression, narrow):
                return found
        self.places.append((narrow, held(narrow)))
        return self.places[-1][1]

    def reshaped(self, index: Sequence[Any], shape: Sequence[int], source: Sequence[int]) -> list[Any]:
        """The index into `source` of an element of the same tensor as `shape`."""
        return reshaped(index, shape, source, lambda flat: [self.place(i) for i in unravel(self.place(flat), source)])


def reshaped(index: Sequence[Any], shape: Sequence[int], source: Sequence[int], divided: Callable[[Any], list[Any]]) -> list[Any]:
    """The index into `source` of an element of the same tensor as `shape`. divided: a position in it as an index."""
    kept = [i for i, d in zip(index, shape, strict=True) if d != 1]
    if [d for d in shape if d != 1] == [d for d in source if d != 1]:
        along = iter(kept)
        return [0 if d == 1 else next(along) for d in source]
    return divided(View(None, "", tuple(shape), dense_strides(shape)).at(index))


def held(value: Any) -> Any:
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
