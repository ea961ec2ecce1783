"""Recurrent layers: docs/numerics.md, section 12. Rows for integers differ in the dot step alone; what float rows share is here too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.numerics.recurrence import (
    CELL_BITS,
    CELL_LIMIT,
    GATE_BITS,
    MAX_HIDDEN,
    PIECE_BITS,
    RESET_LIMIT,
    STATE_BITS,
    STATE_LIMIT,
    TERM_LIMIT,
)
from qcompiler.schedules.builder import Emitter, Requantize, cast, load, rounded, splat, store, to_int, vector_bytes
from qcompiler.schedules.recurrence import Geometry, Layer, Step, check, packed, padded_rows, recurrence_kernel
from qcompiler.schedules.table import Kernel, Need, OpCall, register


@dataclass(frozen=True)
class PlainStep:
    """One element of the state times a vector of weights, in any vector code."""

    lanes: int
    group: int = 1
    input_dtype: str = "int8"
    storage_offset: int = 0

    def pack_weights(self, groups: np.ndarray) -> np.ndarray:
        return groups.reshape(*groups.shape[:-2], -1)

    def missing(self, groups: np.ndarray) -> np.ndarray:
        return np.zeros(groups.shape[:-1], np.int64)

    def weights(self, buffer: Any, index: Any) -> list[Any]:
        return [cast("int32", load(buffer, index, self.lanes), self.lanes)]

    def activation(self, buffer: Any, index: Any, valid: int) -> list[Any]:
        return [splat(T.bind(T.Cast("int32", buffer[index])), self.lanes)]

    def dot(self, acc: Any, x: list[Any], w: list[Any]) -> Any:
        return acc + x[0] * w[0]


def _clip(value: Any, limit: int, n: int) -> Any:
    return T.max(T.min(value, splat(T.int32(limit), n)), splat(T.int32(-limit), n))


def _shifted(value: Any, bits: int, n: int) -> Any:
    """value * 2^-bits, rounded to nearest, ties up."""
    return T.shift_right(value + splat(T.int32(1 << (bits - 1)), n), splat(T.int32(bits), n))


class IntegerLayer(Layer):
    """The arithmetic of `qc.recurrence`."""

    def __init__(self, k: Emitter, geometry: Geometry, step: Step) -> None:
        super().__init__(k, geometry, step, k.arrays[0], k.arrays[1], "int32")
        self.multiplier, self.table = k.arrays[2], k.arrays[3]
        self.p_multiplier, self.limit = k.f32(self.attrs["p_multiplier"]), k.i32(self.attrs["limit"])
        self.real = k.op.output.dtype == "float32"
        self.end = None if self.real else Requantize.of(k, self.attrs)
        self.unit = k.f32(2.0**-STATE_BITS if self.real else self.attrs["multiplier"])
        self.projection = k.operands()[0].buffer
        self.projection_offset = 128 if k.op.operands[0].dtype == "uint8" else 0

    def initial(self, operand: int, index: Any, cell: bool, n: int) -> Any:
        value = load(self.k.operands()[operand].buffer, index, n)
        bits, limit = (CELL_BITS, CELL_LIMIT) if cell else (STATE_BITS, STATE_LIMIT)
        return to_int(self.k, value * splat(tirx.const(2.0**bits, "float32"), n), -limit, limit, n)

    def vector_values(self, state: Any, n: int) -> list[Any]:
        bits, offset = STATE_BITS - 7, splat(T.int32(self.step.storage_offset), n)
        if self.g.halves == 1:
            bytes = [T.max(T.min(_shifted(state, bits, n), splat(T.int32(127), n)), splat(T.int32(-128), n))]
        else:
            lower = T.bitwise_and(state, splat(T.int32((1 << bits) - 1), n)) - splat(T.int32(1 << (bits - 1)), n)
            bytes = [T.shift_right(state, splat(T.int32(bits), n)), lower]
        return [cast(self.step.input_dtype, byte + offset, n) for byte in bytes]

    def carried(self, acc: Any, n: int) -> Any:
        return _shifted(acc, STATE_BITS - 7, n)

    def input(self, gate: int, j: Any, n: int) -> Any:
        stored = cast("int32", load(self.projection, self.place + gate * self.g.hidden + j, n), n)
        if self.projection_offset:
            stored = stored - splat(T.int32(self.projection_offset), n)
        return to_int(self.k, cast("float32", stored, n) * splat(self.p_multiplier, n), -TERM_LIMIT, TERM_LIMIT, n)

    def term(self, gate: int, j: Any, n: int, reset: bool = False) -> Any:
        at = T.bind(j + gate * self.g.padded)
        limit = RESET_LIMIT if reset else TERM_LIMIT
        acc = load(self.words, self.area + self.g.sums + at, n)
        return T.bind(to_int(self.k, cast("float32", acc, n) * load(self.multiplier, at, n), -limit, limit, n))

    def function(self, which: int, x: Any, n: int, bounded: bool = True) -> Any:
        limit = splat(self.limit, n) if bounded else splat(T.int32(STATE_LIMIT), n)
        least = splat(T.int32(0), n) - limit
        place = T.bind(T.max(T.min(x, limit), least) + splat(T.int32(2**15), n))
        part = T.bitwise_and(place, splat(T.int32(2**PIECE_BITS - 1), n))
        entries = 1 << (16 - PIECE_BITS)
        index = T.bind(T.shift_right(place, splat(T.int32(PIECE_BITS), n)) + splat(T.int32(which * entries), n))
        word = T.bind(self.table[index])
        entry = T.shift_right(word, splat(T.int32(16), n))
        slope = T.shift_right(T.shift_left(word, splat(T.int32(16), n)), splat(T.int32(16), n))
        return T.bind(entry + _shifted(slope * part, PIECE_BITS, n))

    def product(self, a: Any, b: Any, n: int) -> Any:
        return T.bind(_shifted(a * b, STATE_BITS, n))

    def updated(self, forget: Any, cell: Any, input: Any, new: Any, n: int) -> Any:
        share = cast("float32", forget, n) * splat(tirx.const(2.0**-STATE_BITS, "float32"), n)
        kept = T.bind(rounded(self.k, cast("float32", cell, n) * share, n))
        return _clip(kept + _shifted(input * new, 2 * STATE_BITS - CELL_BITS, n), CELL_LIMIT, n)

    def cell_argument(self, cell: Any, n: int) -> Any:
        return T.bind(_shifted(cell, CELL_BITS - GATE_BITS, n))

    def write(self, index: Any, state: Any, cell: bool, n: int) -> None:
        if self.end is not None:
            value = self.end(state, splat(self.unit, n), n)
        else:
            unit = splat(tirx.const(2.0**-CELL_BITS, "float32"), n) if cell else splat(self.unit, n)
            value = cast("float32", state, n) * unit
        store(self.k.output, index, value, n)


class FloatLayer(Layer):
    """The arithmetic of `qc.f32.recurrence`. functions: activation -> (lanes, x, alpha, beta) -> its value."""

    functions: ClassVar[Mapping[str, Callable[[int, Any, Any, Any], Any]]]

    def __init__(self, k: Emitter, geometry: Geometry, step: Step) -> None:
        super().__init__(k, geometry, step, k.arrays[0], k.arrays[1], "float32")
        self.projection = k.operands()[0].buffer
        self.clip = None if self.attrs.get("clip") is None else float(self.attrs["clip"])

    def initial(self, operand: int, index: Any, cell: bool, n: int) -> Any:
        return load(self.k.operands()[operand].buffer, index, n)

    def vector_values(self, state: Any, n: int) -> list[Any]:
        return [state]

    def carried(self, acc: Any, n: int) -> Any:
        raise AssertionError("real numbers have no halves")

    def input(self, gate: int, j: Any, n: int) -> Any:
        return load(self.projection, self.place + gate * self.g.hidden + j, n)

    def term(self, gate: int, j: Any, n: int, reset: bool = False) -> Any:
        return load(self.words, self.area + self.g.sums + gate * self.g.padded + j, n)

    def function(self, which: int, x: Any, n: int, bounded: bool = True) -> Any:
        if self.clip is not None and bounded:
            x = T.bind(T.max(T.min(x, _real(self.clip, n)), _real(-self.clip, n)))
        alpha, beta = (_real(float(self.attrs[name][which]), n) for name in ("alpha", "beta"))
        return T.bind(self.functions[self.attrs["activations"][which]](n, x, alpha, beta))

    def product(self, a: Any, b: Any, n: int) -> Any:
        return a * b

    def updated(self, forget: Any, cell: Any, input: Any, new: Any, n: int) -> Any:
        return forget * cell + input * new

    def cell_argument(self, cell: Any, n: int) -> Any:
        return cell

    def write(self, index: Any, state: Any, cell: bool, n: int) -> None:
        store(self.k.output, index, state, n)


def _real(value: float, n: int) -> Any:
    return splat(tirx.const(value, "float32"), n)


def table_words(tables: np.ndarray) -> np.ndarray:
    """int32 [F * 1024]: an entry in the upper half of a word, and how far the next one lies above it in the lower."""
    wide = tables.astype(np.int64)
    slopes = np.diff(wide, axis=1)
    assert np.abs(slopes).max(initial=0) < 2**15
    return ((wide[:, :-1] << 16) | (slopes & 0xFFFF)).astype(np.uint32).view(np.int32).reshape(-1)


def integer_kernel(op: OpCall, target: Target, row: str, step: Step) -> Kernel:
    g = Geometry(op, step.lanes, step.group, 1)
    weight, bias = packed(op, g, step)
    rest = [np.asarray(o) for o in op.operands[5:] if isinstance(o, np.ndarray)]
    arrays = [weight, bias, padded_rows(g, np.asarray(op.operands[3])), table_words(np.asarray(op.operands[4])), *rest]
    return recurrence_kernel(op, target, row, g, arrays, lambda k: IntegerLayer(k, g, step))


def check_integer(op: OpCall) -> str | None:
    """Why a layer has no integer kernel."""
    return check(op, 5) or (f"more than {MAX_HIDDEN} hidden elements." if op.operands[1].shape[1] > MAX_HIDDEN else None)


@dataclass
class RecurrenceRow:
    """Recurrent layers by the dot step of one ISA; None: by plain vector code, for every target."""

    name: str
    isa: str
    step: Step | None = None
    own_channels: bool = False

    def refuse(self, op: OpCall, target: Target) -> str | None:
        return check_integer(op)

    def needs(self, op: OpCall, target: Target) -> list[Need]:
        return [Need(dense=True) for _ in op.tensors]

    def space(self, op: OpCall, target: Target) -> dict[str, list[Any]]:
        return {}

    def default(self, op: OpCall, target: Target) -> dict[str, Any]:
        return {}

    def build(self, op: OpCall, params: Mapping[str, Any], target: Target) -> Kernel:
        return integer_kernel(op, target, self.name, self.step or PlainStep(max(1, vector_bytes(target) // 4)))


register("qc.recurrence", RecurrenceRow("any/recurrence", "any"))
