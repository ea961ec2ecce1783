"""Recurrent layers: what every kernel row of `qc.recurrence` and `qc.f32.recurrence` shares.

A task has rows of the batch of its own, and takes their steps one after the other:

    accumulators of all gates = bias + W . (state of the step before)         dot steps, as convolutions have them, over packed weights
    element by element: gates, cell, state, result                            vectors along the hidden state

State, cell, accumulators and the vector that the product reads lie in scratch, an area per row of the batch. A product that reads 16 bits of the state
(`wide`) takes two such vectors, h = 256 * upper + lower + 128: those of the upper one start from a 256th of the accumulators of the lower one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.numerics.recurrence import GATES
from qcompiler.schedules.builder import Emitter, load, loops, make_kernel, share, store
from qcompiler.schedules.table import Kernel, Layout, OpCall

TILE = 8  # accumulators of a product's inner loop


class Step(Protocol):
    """Dot steps, as an `Isa` has them: `group` elements of the state, for `lanes` rows of weights."""

    @property
    def lanes(self) -> int: ...
    @property
    def group(self) -> int: ...
    @property
    def input_dtype(self) -> str: ...
    @property
    def storage_offset(self) -> int: ...
    def pack_weights(self, groups: np.ndarray) -> np.ndarray: ...
    def missing(self, groups: np.ndarray) -> np.ndarray: ...
    def weights(self, buffer: Any, index: Any) -> list[Any]: ...
    def activation(self, buffer: Any, index: Any, valid: int) -> list[Any]: ...
    def dot(self, acc: Any, x: list[Any], w: list[Any]) -> Any: ...


class Geometry:
    """Sizes of a layer, and where things lie in the scratch of one row of the batch (in words of 32 bits)."""

    def __init__(self, op: OpCall, lanes: int, group: int, vector_bytes: int, tile: int = TILE) -> None:
        self.steps, self.batch = (int(d) for d in op.operands[0].shape[:2])
        self.hidden, self.gates = op.operands[1].shape[1], GATES[op.attrs["cell"]]
        self.lanes, self.group, self.tile = lanes, group, tile
        self.padded = -(-self.hidden // lanes) * lanes  # rows of weights per gate
        self.columns = -(-self.hidden // group) * group
        self.halves = 2 if op.attrs.get("wide") else 1
        self.half = -(-self.columns * vector_bytes // 64) * 16
        vector = self.halves * self.half
        self.state, self.cell, self.sums = 0, self.padded, 2 * self.padded
        self.vectors = [-(-(self.sums + self.gates * self.padded) // 16) * 16]
        self.vectors.append(self.vectors[0] + vector)
        self.words = self.vectors[1] + vector

    def tiles(self, first: int, last: int) -> list[tuple[int, int, int]]:
        """(block, count, size): runs of tiles of `size` blocks of `lanes` rows, for gates [first, last)."""
        block, end, found = first * self.padded // self.lanes, last * self.padded // self.lanes, []
        for size in (min(self.tile, end - block), (end - block) % min(self.tile, end - block)):
            if size:
                count = (end - block) // size
                found.append((block, count, size))
                block += count * size
        return found

    def products(self, op: OpCall) -> list[tuple[int, int]]:
        """The runs of gates that are multiplied with one vector: a GRU whose reset gate acts on the state has two."""
        return [(0, 2), (2, 3)] if op.attrs["cell"] == "gru" and not op.attrs["linear_before_reset"] else [(0, self.gates)]


def padded_rows(g: Geometry, array: np.ndarray) -> np.ndarray:
    """[G * H, ...] with the rows of each gate padded by zeros."""
    split = array.reshape(g.gates, g.hidden, *array.shape[1:])
    return np.pad(split, [(0, 0), (0, g.padded - g.hidden), *[(0, 0)] * (array.ndim - 1)]).reshape(g.gates * g.padded, *array.shape[1:])


def packed(op: OpCall, g: Geometry, step: Step) -> tuple[np.ndarray, np.ndarray]:
    """(weights tile by tile, group by group, block by block; what accumulators start from, and behind that those of lower halves)."""
    weight, bias = padded_rows(g, np.asarray(op.operands[1])), padded_rows(g, np.asarray(op.operands[2]))
    weight = np.pad(weight, [(0, 0), (0, g.columns - g.hidden)])
    groups = weight.reshape(-1, g.lanes, g.columns // g.group, g.group).transpose(0, 2, 1, 3)  # block, step, lane, element
    parts = []
    for first, last in g.products(op):
        for block, count, size in g.tiles(first, last):
            tile = groups[block : block + count * size].reshape(count, size, *groups.shape[1:])
            parts.append(step.pack_weights(tile.transpose(0, 2, 1, 3, 4)).reshape(-1))
    if bias.dtype.kind == "i":
        rest = step.missing(groups).sum(axis=1).reshape(-1) - step.storage_offset * weight.astype(np.int64).sum(axis=1)
        starts = [bias + rest, 128 * weight.astype(np.int64).sum(axis=1) + rest][: g.halves]
        bias = ((np.concatenate(starts) + 2**31) % 2**32 - 2**31).astype(np.int32)
    return np.concatenate(parts), bias


class Layer(ABC):
    """A layer while its kernel is written: cells in terms of the arithmetic that subclasses have. j: an index along the hidden state; n: a number of lanes."""

    def __init__(self, k: Emitter, geometry: Geometry, step: Step, weight: Any, bias: Any, dtype: str) -> None:
        self.k, self.g, self.step, self.dtype, self.weight, self.bias = k, geometry, step, dtype, weight, bias
        self.attrs = k.op.attrs
        self.words = T.decl_buffer((max(geometry.batch * geometry.words, 1),), dtype, data=k.scratch.data)
        scale = 4 // np.dtype(step.input_dtype).itemsize
        self.bytes = T.decl_buffer((max(geometry.batch * geometry.words * scale, 1),), step.input_dtype, data=k.scratch.data)
        self.scale = scale
        self.area: Any = None  # of this row of the batch, in words
        self.place: Any = None  # of its projection at this step

    # -- arithmetic ---------------------------------------------------------------------------------------------------------------------

    @abstractmethod
    def initial(self, operand: int, index: Any, cell: bool, n: int) -> Any:
        """A state, or a cell, that the network hands in."""

    @abstractmethod
    def vector_values(self, state: Any, n: int) -> list[Any]:
        """A state as the product reads it: one number, or an upper and a lower half."""

    @abstractmethod
    def carried(self, acc: Any, n: int) -> Any:
        """What the accumulators of lower halves add to those of upper ones."""

    @abstractmethod
    def input(self, gate: int, j: Any, n: int) -> Any:
        """The projection of a gate."""

    @abstractmethod
    def term(self, gate: int, j: Any, n: int, reset: bool = False) -> Any:
        """What the product adds to a gate."""

    @abstractmethod
    def function(self, which: int, x: Any, n: int, bounded: bool = True) -> Any:
        """An activation. bounded: clipped before, where the model says so."""

    @abstractmethod
    def product(self, a: Any, b: Any, n: int) -> Any:
        """Of two states or gates."""

    @abstractmethod
    def updated(self, forget: Any, cell: Any, input: Any, new: Any, n: int) -> Any:
        """forget * cell + input * new."""

    @abstractmethod
    def cell_argument(self, cell: Any, n: int) -> Any:
        """A cell as its function takes it."""

    @abstractmethod
    def write(self, index: Any, state: Any, cell: bool, n: int) -> None:
        """To the result."""

    # -- memory -------------------------------------------------------------------------------------------------------------------------

    def held(self, offset: int, j: Any, n: int) -> Any:
        return T.bind(load(self.words, self.area + offset + j, n))

    def hold(self, offset: int, j: Any, value: Any, n: int) -> None:
        store(self.words, self.area + offset + j, value, n)

    def publish(self, which: int, j: Any, state: Any, n: int) -> None:
        """A state as the operand of the next product."""
        for half, value in enumerate(self.vector_values(state, n)):
            store(self.bytes, (self.area + self.g.vectors[which] + half * self.g.half) * self.scale + j, value, n)

    def each(self, body: Callable[[Any, int], None]) -> None:
        """`body(j, lanes)` for disjoint vectors that cover the hidden state."""
        hidden, lanes = self.g.hidden, min(self.g.lanes, 1 << (self.g.hidden.bit_length() - 1))
        whole = hidden // lanes
        with loops(whole) as (i,):
            body(T.bind(i * lanes) if whole > 1 else T.int32(0), lanes)
        if hidden % lanes:
            with loops((whole * lanes, hidden)) as (i,):
                body(i, 1)

    # -- the product --------------------------------------------------------------------------------------------------------------------

    def multiply(self, first: int, last: int, which: int) -> None:
        """Accumulators of gates [first, last) from vector `which`."""
        g, step, unit = self.g, self.step, self.g.lanes * self.g.group
        sources = [T.bind((self.area + g.vectors[which] + half * g.half) * self.scale) for half in range(g.halves)]
        groups = g.columns // g.group
        for block, count, size in g.tiles(first, last):
            with loops(count) as (tile,):
                row, base = T.bind((block + tile * size) * g.lanes), T.bind((block + tile * size) * (groups * unit))
                accs = [T.alloc_buffer((g.lanes,), self.dtype) for _ in range(size)]
                for half in reversed(range(g.halves)):
                    for i, acc in enumerate(accs):
                        start = load(self.bias, row + half * g.gates * g.padded + i * g.lanes, g.lanes)
                        store(acc, 0, start if half == g.halves - 1 else start + self.carried(load(acc, 0, g.lanes), g.lanes), g.lanes)
                    with loops(groups) as (c,):
                        x = step.activation(self.bytes, sources[half] + c * g.group, g.group)
                        for i, acc in enumerate(accs):
                            w = step.weights(self.weight, base + (c * size + i) * unit)
                            store(acc, 0, step.dot(load(acc, 0, g.lanes), x, w), g.lanes)
                for i, acc in enumerate(accs):
                    store(self.words, self.area + g.sums + row + i * g.lanes, load(acc, 0, g.lanes), g.lanes)

    # -- cells --------------------------------------------------------------------------------------------------------------------------

    def gate(self, which: int, gate: int, j: Any, n: int) -> Any:
        """A gate behind its function, by way of memory: TVM takes minutes over one expression of a whole cell."""
        value = self.function(which, T.bind(self.input(gate, j, n) + self.term(gate, j, n)), n)
        self.hold(self.g.sums + gate * self.g.padded, j, value, n)
        return self.held(self.g.sums + gate * self.g.padded, j, n)

    def advance(self, write: Callable[[Any, Any, int], None]) -> None:
        """One step; `write(j, state, lanes)` takes its result."""
        g = self.g
        reset_first = len(g.products(self.k.op)) == 2
        self.multiply(*g.products(self.k.op)[0], 0)
        if reset_first:
            self.each(lambda j, n: self.publish(1, j, self.product(self.gate(0, 1, j, n), self.held(g.state, j, n), n), n))
            self.multiply(2, 3, 1)

        def element(j: Any, n: int) -> None:
            state = T.bind(self.new_state(j, n, reset_first))
            self.hold(g.state, j, state, n)
            self.publish(0, j, state, n)
            write(j, state, n)

        self.each(element)

    def new_state(self, j: Any, n: int, reset_first: bool) -> Any:
        g, cell = self.g, self.attrs["cell"]
        if cell == "rnn":
            return self.gate(0, 0, j, n)
        if cell == "gru":
            z = self.gate(0, 0, j, n)
            term = self.term(2, j, n) if reset_first else self.product(self.gate(0, 1, j, n), self.term(2, j, n, reset=True), n)
            new = self.function(1, T.bind(self.input(2, j, n) + term), n)
            return new + self.product(z, T.bind(self.held(g.state, j, n) - new), n)
        i, o, f = (self.gate(0, gate, j, n) for gate in range(3))
        self.hold(g.cell, j, self.updated(f, self.held(g.cell, j, n), i, self.gate(1, 3, j, n), n), n)
        argument = self.cell_argument(self.held(g.cell, j, n), n)
        return self.product(o, self.function(2, argument, n, bounded=False), n)

    def run(self) -> None:
        g, steps = self.g, self.g.steps
        # operands behind the projection, weights and what belongs to them: initial state, initial cell, lengths
        with self.rows() as b:
            self.area = T.bind(b * g.words)
            length = T.bind(T.max(T.int32(0), T.min(T.int32(steps), self.lengths()[b])))

            def start(j: Any, n: int) -> None:
                state = T.bind(self.initial(-3, b * g.hidden + j, False, n))
                self.hold(g.state, j, state, n)
                self.publish(0, j, state, n)
                if self.attrs["cell"] == "lstm":
                    self.hold(g.cell, j, self.initial(-2, b * g.hidden + j, True, n), n)

            self.each(start)
            with T.serial(0, length) as s:
                t = T.bind(length - 1 - s) if self.attrs["reverse"] else s
                row = T.bind(t * g.batch + b)
                self.place = T.bind(row * (g.gates * g.hidden))
                self.advance(lambda j, state, n: self.write(row * g.hidden + j, state, False, n) if self.attrs["sequence"] else None)
            if self.attrs["sequence"]:
                with T.serial(length, steps) as t:
                    row = T.bind(t * g.batch + b)
                    self.each(lambda j, n: self.write(row * g.hidden + j, self.zero(n), False, n))
            for i, offset in enumerate((g.state, g.cell)[: self.attrs["finals"]]):
                last = T.bind(((steps if self.attrs["sequence"] else 0) + i) * g.batch + b)
                self.each(lambda j, n, last=last, offset=offset, i=i: self.write(last * g.hidden + j, self.held(offset, j, n), i == 1, n))  # type: ignore[misc]

    def zero(self, n: int) -> Any:
        zero = tirx.const(0, self.dtype)
        return zero if n == 1 else T.broadcast(zero, n)

    def lengths(self) -> Any:
        return self.k.operands()[-1].buffer

    @contextmanager
    def rows(self) -> Iterator[Any]:
        """The rows of the batch that are this task's, or this thread's."""
        if self.k.gpu:
            from qcompiler.schedules.portable.threads import each

            with each(self.k, self.g.batch) as (b,):
                yield b
        else:
            with loops(share(self.k, self.g.batch)) as (b,):
                yield b


def recurrence_kernel(op: OpCall, target: Target, row: str, g: Geometry, arrays: list[np.ndarray], make: Callable[[Emitter], Layer]) -> Kernel:
    """arrays: all constants, packed, in the order in which `make` reads them."""

    def emit(k: Emitter) -> None:
        make(k).run()

    macs = g.steps * g.batch * g.gates * g.hidden * g.hidden * g.halves
    return make_kernel(row, op, target, emit, tasks=min(g.batch, 64), arrays=arrays, macs=macs, threads=g.batch, scratch=4 * g.batch * g.words)


def check(op: OpCall, constants: int) -> str | None:
    """Why a layer has no kernel. constants: where the operands end that are made when a network is compiled."""
    fits = isinstance(op.operands[0], Layout) and all(isinstance(o, np.ndarray) for o in op.operands[1:constants])
    return None if fits else "the projection must be computed at run time, and the weights must be constants."
