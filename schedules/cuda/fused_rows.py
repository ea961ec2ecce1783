"""Fused operators of which some reduce: a group of threads has a row, which is what one sum or maximum is of, and all that belongs to it.

    softmax                       rows: maximum --> exponentials, their sum --> quotients
    dequantize, layer_norm, quantize
    mean, subtract, multiply      of which the mean is written too

What a row has once (a mean) is held in a register of each of its threads; what it has for each element is computed from the operands. Elements of a short row
stay in registers from one sum to the next; those of a long one are computed anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import tvm.ir
import tvm.sym
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.schedules.builder import Emitter, View, dense_strides, make_kernel, view, when
from qcompiler.schedules.cuda.base import local
from qcompiler.schedules.cuda.fused import FusedCall, Stage, Values, conversions_of, elements_kernel, held, reshaped, rounded
from qcompiler.schedules.cuda.nests import Nest, loads, replaced
from qcompiler.schedules.cuda.rows import WARP, barrier
from qcompiler.schedules.portable.threads import unravel
from qcompiler.schedules.table import Kernel

LEAST_BLOCK, MOST_THREADS, KEPT = 128, 512, 4  # threads of a block; of a row; elements that a thread keeps in registers
DEEPEST = 8  # reductions one behind the other
SPREAD, LONG = 64, 2**13  # so many rows, or of fewer elements, keep a GPU busy

Index = Sequence[Any]


def fused_kernel(call: FusedCall, target: Target) -> Kernel:
    """One kernel of all parts. They are such that `rows_of` finds rows, if any reduces."""
    rows = rows_of(call) if call.reduces else None
    assert rows is not None or not call.reduces
    return elements_kernel(call, target) if rows is None else rows_kernel(call, rows, target)


@dataclass
class Rows:
    """A tensor whose elements are those of all rows. axes: its extents, and which of them count rows. levels: of what a row has once, in an order in which it
    can be computed: how many reductions lie one behind the other up to it."""

    axes: list[tuple[int, bool]]
    levels: dict[Stage, int] = field(default_factory=dict)

    def extents(self, of_rows: bool) -> list[int]:
        return [extent for extent, counts in self.axes if counts is of_rows]

    @property
    def number(self) -> int:
        return math.prod(self.extents(True))

    @property
    def length(self) -> int:
        return math.prod(self.extents(False))

    @property
    def busy(self) -> bool:
        """Do they keep a GPU busy, with elements computed along with sums?"""
        return self.number >= SPREAD or self.length <= LONG

    @property
    def adjacent(self) -> bool:
        """Are a row's elements neighbours in memory, or else the rows?"""
        return not next((counts for extent, counts in reversed(self.axes) if extent > 1), False)

    @property
    def threads(self) -> int:
        """Of a row."""
        wanted = 1 << (-(-self.length // KEPT) - 1).bit_length()
        return min(wanted, MOST_THREADS if self.adjacent else LEAST_BLOCK * 4 // WARP)

    @property
    def block(self) -> int:
        return max(self.threads, LEAST_BLOCK) if self.adjacent else WARP * self.threads

    @property
    def steps(self) -> int:
        """Elements of a thread."""
        return -(-self.length // self.threads)


def rows_of(call: FusedCall) -> Rows | None:
    """The rows that all parts agree on: each value of a row is read in that row alone, and each result has an element per element of the rows, or per row."""
    try:
        return _Agreement(call).rows
    except _Disagreement:
        return None


class _Disagreement(Exception):
    pass


def _frame(nest: Nest) -> list[tuple[int, bool]] | None:
    """The axes of a tensor that a reduction reads whole, each of its elements for one row."""
    assert nest.reduction is not None
    spatial = [(v, d, True) for v, d in zip(nest.variables, nest.shape, strict=True) if v is not None]
    domain = [*spatial, *((v, d, False) for v, d in nest.reduction.variables)]
    for load in loads(nest.value):
        found = [next((each for each in domain if index.same_as(each[0])), None) for index in load.indices]
        axes = [(1, False) if each is None else each[1:] for each in found]
        whole = [int(d) for d in load.source.shape] == [extent for extent, _ in axes]
        if (
            whole
            and math.prod(e for e, _ in axes) == math.prod(e for _, e, _ in domain)
            and len({id(e) for e in found if e}) == sum(e is not None for e in found)
        ):
            return axes
    return None


class _Agreement:
    """Follows symbolic indices from what is written, and from what is reduced, to what is held."""

    def __init__(self, call: FusedCall) -> None:
        self.call, self.analyzer = call, tvm.sym.Analyzer()
        first = len(call.operands)
        stages = [((n, s), nest) for n, part in enumerate(call.parts, first) for s, nest in enumerate(part.nests)]
        frames = [_frame(nest) for _, nest in stages if nest.reduction]
        axes = next((frame for frame in frames if frame is not None), None)
        if axes is None:
            raise _Disagreement
        self.rows = rows = Rows(axes)
        if rows.length < 2:
            raise _Disagreement
        self.variables = [tirx.Var(f"i{n}", "int64") for n in range(len(axes))]
        for variable, (extent, _) in zip(self.variables, axes, strict=True):
            self.analyzer.bind(variable, tvm.ir.Range(0, extent))
        self.row = self.flat(self.position(True), rows.extents(True)) + tirx.const(0, "int64")
        self.seen: set[tuple[Any, ...]] = set()
        self.names: dict[str, Any] = {}
        self.depth = self.depths()
        for what in rows.levels:
            self.follow_row(what)
        for number in call.results:
            if call.last(first + number) not in rows.levels:
                index = result_index(call, first + number, lambda shape: self.spread(self.variables, [e for e, _ in rows.axes], shape))
                self.follow(call.last(first + number), index)

    def depths(self) -> dict[Stage, int]:
        """How many reductions lie one behind the other up to each stage behind any; those of what a row has once are its levels."""
        found: dict[Stage, int] = {}
        for number, part in enumerate(self.call.parts, len(self.call.operands)):
            for stage, nest in enumerate(part.nests or [None]):
                what = number, stage
                sources = [source for source, _ in self.call.reads(what)] if nest else [self.call.last(part.reads[0])]
                depth = max(found.get(source, 0) for source in sources) if sources else 0
                single = math.prod(stage_shape(self.call, what)) == self.rows.number
                if nest and nest.reduction:
                    if not single:
                        raise _Disagreement
                    depth += 1
                if depth:
                    found[what] = depth
                    if single and part.call.name != "qc.reshape":
                        self.rows.levels[what] = depth
        if max(found.values()) > DEEPEST:
            raise _Disagreement
        return found

    def position(self, of_rows: bool) -> list[Any]:
        return [v for v, (_, counts) in zip(self.variables, self.rows.axes, strict=True) if counts is of_rows]

    def flat(self, index: Index, shape: Sequence[int]) -> Any:
        return View(None, "", tuple(shape), dense_strides(shape)).at(index)

    def divided(self, flat: Any, shape: Sequence[int]) -> list[Any]:
        strides = dense_strides(shape)
        return [self.named(self.analyzer.simplify(tirx.floormod(tirx.floordiv(flat, s), d))) if d > 1 else 0 for s, d in zip(strides, shape, strict=True)]

    def spread(self, index: Index, shape: Sequence[int], into: Sequence[int]) -> list[Any]:
        if math.prod(shape) != math.prod(into):
            raise _Disagreement
        return reshaped(index, shape, into, lambda flat: self.divided(flat, into))

    def follow_row(self, what: Stage) -> None:
        """What it is computed from."""
        index = self.spread(self.position(True), self.rows.extents(True), stage_shape(self.call, what))
        nest = reducing(self.call, what)
        extents = [extent for _, extent in nest.reduction.variables] if nest and nest.reduction else []
        self.compute(what, index, self.spread(self.position(False), self.rows.extents(False), extents) if extents else [])

    def follow(self, what: Stage, index: Index) -> None:
        if what not in self.depth:
            return
        part = self.call.part(what[0])
        if part.call.name == "qc.reshape":
            self.follow(self.call.last(part.reads[0]), self.spread(index, part.call.output.shape, part.call.tensors[0].shape))
            return
        key = what, *(i if isinstance(i, int) else id(i) for i in index)
        if key in self.seen:
            return
        self.seen.add(key)
        if what not in self.rows.levels:
            self.compute(what, index)
        elif not self.analyzer.can_prove(self.flat(index, stage_shape(self.call, what)) - self.row == tirx.const(0, "int64")):
            raise _Disagreement

    def compute(self, what: Stage, index: Index, reduced: Index = ()) -> None:
        """Follow what is read for an element of a stage."""
        part = self.call.part(what[0])
        if not part.nests:
            self.follow(self.call.last(part.reads[0]), part.moved(index))
            return
        variables = part.nests[what[1]].at(index, reduced)
        for source, at in self.call.reads(what):
            if source in self.depth:
                self.follow(source, [self.place(i, variables) for i in at])

    def place(self, index: Any, variables: Sequence[tuple[Any, Any]]) -> Any:
        """An index in symbols of rows and elements: the same object wherever it is the same."""
        if isinstance(index, tirx.Var):
            return next(i for v, i in variables if index.same_as(v))
        return index if isinstance(index, int) else self.named(self.analyzer.simplify(replaced(index, variables, lambda nested: nested)))

    def named(self, index: Any) -> Any:
        same = next((v for v in self.variables if index.same_as(v)), None)
        return int(index) if isinstance(index, tirx.IntImm) else self.names.setdefault(str(index), index) if same is None else same


def result_index(call: FusedCall, number: int, spread: Callable[[tuple[int, ...]], Index]) -> Index:
    """Where the element of a result lies. spread: the same in a tensor of another shape; a conversion permutes it."""
    part = call.part(number)
    if part.nests:
        return spread(part.call.output.shape)
    index = spread(part.call.tensors[0].shape)
    return [index[a] for a in part.call.attrs.get("axes") or range(len(index))]


def rows_kernel(call: FusedCall, rows: Rows, target: Target) -> Kernel:
    """Level by level: a loop over the elements for all of its reductions, then what follows from them for the whole row; at last a loop that writes."""
    of_block = rows.block // rows.threads

    def emit(k: Emitter) -> None:
        values = Values(k, call, conversions_of(k, call))
        group, part = (T.truncdiv, T.truncmod) if rows.adjacent else (T.truncmod, T.truncdiv)
        by = rows.threads if rows.adjacent else WARP
        mine, part = T.bind(k.group * of_block + group(k.thread, by)), T.bind(part(k.thread, by))
        own = None if rows.number % of_block == 0 else mine < rows.number
        row = mine if own is None else T.bind(T.min(mine, rows.number - 1))
        position, of_rows, of_elements = [values.place(i) for i in unravel(row, rows.extents(True))], rows.extents(True), rows.extents(False)

        def element(step: Any) -> tuple[Index, Any]:
            """Where it lies in its row, and whether there is one: threads behind the end go along with the last."""
            number = T.bind(step * rows.threads + part)
            there = None if rows.length % rows.threads == 0 else number < rows.length
            number = number if there is None else T.bind(T.min(number, rows.length - 1))
            return [values.place(i) for i in unravel(number, of_elements)], there

        kept = [element(step) for step in range(rows.steps)] if rows.steps <= KEPT else []

        def along(body: Callable[[Index, Any], None]) -> None:
            if kept:
                for each in kept:
                    body(*each)
            else:
                with T.serial(0, rows.steps) as step, values.scope():
                    body(*element(step))

        def index_of(what: Stage) -> Index:
            return values.reshaped(position, of_rows, stage_shape(call, what))

        def reduce(level: int) -> None:
            folds = {what: _Fold(k, rows, nest) for what in rows.levels if rows.levels[what] == level and (nest := reducing(call, what))}

            def add(index: Index, there: Any) -> None:
                for what, fold in folds.items():
                    extents = [extent for _, extent in fold.reduction.variables]
                    fold.add(held(rounded(values.computed(what, index_of(what), values.reshaped(index, of_elements, extents)))), there)

            along(add)
            values.held |= {what: fold.result(part) for what, fold in folds.items()}

        def write(index: Index, there: Any) -> None:
            along_axes = (iter(position), iter(index))
            whole = [next(along_axes[0] if counts else along_axes[1]) for _, counts in rows.axes]
            for number, layout, output in zip(call.results, call.written, k.outputs, strict=True):
                place = number + len(call.operands)
                if call.last(place) not in rows.levels:
                    at = result_index(call, place, lambda shape: values.reshaped(whole, [e for e, _ in rows.axes], shape))
                    value = values.of(place, at)
                    with when(there), when(own):
                        T.buffer_store(output, value, [T.int32(0) + view(output, layout).at(at)])

        for level in range(1, max(rows.levels.values()) + 1):
            reduce(level)
            for what in rows.levels:
                if rows.levels[what] == level and what not in values.held:
                    values.held[what] = held(rounded(values.computed(what, index_of(what))))
        if not all(call.last(n + len(call.operands)) in rows.levels for n in call.results):
            along(write)
        for number, layout, output in zip(call.results, call.written, k.outputs, strict=True):
            what = call.last(number + len(call.operands))
            if what in rows.levels:
                with when(part == 0 if rows.threads > 1 else None), when(own):
                    T.buffer_store(output, values.held[what], [T.int32(0) + view(output, layout).at(index_of(what))])

    threads = -(-rows.number // of_block) * rows.block
    return make_kernel("cuda/rows", call, target, emit, threads=threads, block=rows.block, arrays=call.arrays)


def stage_shape(call: FusedCall, what: Stage) -> tuple[int, ...]:
    part = call.part(what[0])
    return part.nests[what[1]].shape if part.nests else part.call.output.shape


def reducing(call: FusedCall, what: Stage) -> Nest | None:
    """The nest of a stage that reduces."""
    part = call.part(what[0])
    return part.nests[what[1]] if part.nests and part.nests[what[1]].reduction else None


class _Fold:
    """What the threads of a row `add`, joined: each thread's in the order of elements, those of lanes by halves, those of warps one after the other."""

    def __init__(self, k: Emitter, rows: Rows, nest: Nest) -> None:
        assert nest.reduction is not None
        self.k, self.rows, self.reduction, self.dtype = k, rows, nest.reduction, str(nest.buffer.dtype)
        self.mine = local(1, self.dtype)
        T.buffer_store(self.mine, self.reduction.start, [0])

    def joined(self, a: Any, b: Any) -> Any:
        return {"sum": lambda: a + b, "product": lambda: a * b, "max": lambda: T.max(a, b), "min": lambda: T.min(a, b)}[self.reduction.join]()

    def add(self, value: Any, there: Any) -> None:
        with when(there):
            T.buffer_store(self.mine, self.joined(self.mine[0], value), [0])

    def result(self, part: Any) -> Any:
        """All threads of the block must ask for it, once."""
        rows, thread, lanes = self.rows, self.k.thread, min(self.rows.threads, WARP) if self.rows.adjacent else 1
        while lanes > 1:
            lanes //= 2
            self.add(T.call_extern(self.dtype, "qc_other_lane", self.mine[0], T.int32(lanes)), None)
        holders = rows.threads // WARP if rows.adjacent else rows.threads
        if holders <= 1:
            return self.mine[0]
        shared = T.alloc_buffer((rows.block // WARP if rows.adjacent else rows.block,), self.dtype, scope="shared")
        if rows.adjacent:
            with when(T.bitwise_and(thread, T.int32(WARP - 1)) == 0):
                T.buffer_store(shared, self.mine[0], [T.shift_right(thread, T.int32(5))])
            first, step = T.truncdiv(thread, rows.threads) * holders, 1
        else:
            T.buffer_store(shared, self.mine[0], [thread])
            first, step = T.truncmod(thread, WARP), WARP
        barrier()
        first = T.bind(first)
        total = shared[first]
        for i in range(1, holders):
            total = self.joined(total, shared[first + i * step])
        return held(total)
