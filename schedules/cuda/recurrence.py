"""Recurrent layers on a GPU: a block takes a row of the batch, step by step; its threads share the gates, then the elements of the state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.schedules.builder import Emitter, make_kernel
from qcompiler.schedules.cuda.base import gpu_row, local
from qcompiler.schedules.cuda.rows import ROW_THREADS, along, barrier
from qcompiler.schedules.portable.recurrence import FloatLayer, IntegerLayer, PlainStep, check_integer, table_words
from qcompiler.schedules.recurrence import Geometry, Layer, check, packed, padded_rows
from qcompiler.schedules.table import Kernel, OpCall

ONE_TILE = 1 << 30  # weights lie element by element of the state: neighbouring threads read neighbouring ones


class Block(Layer):
    """How a block divides a layer's work: whatever one thread wrote, others read behind a barrier only."""

    def each(self, body: Callable[[Any, int], None]) -> None:
        along(self.k, self.g.hidden, lambda j: body(j, 1))
        barrier()

    def multiply(self, first: int, last: int, which: int) -> None:
        g = self.g
        rows = (last - first) * g.padded
        sources = [T.bind((self.area + g.vectors[which] + half * g.half) * self.scale) for half in range(g.halves)]

        def sums(row: Any) -> None:
            acc, at = local(1, self.dtype), T.bind(row + first * g.padded)
            for half in reversed(range(g.halves)):
                start = self.bias[at + half * g.gates * g.padded]
                T.buffer_store(acc, start if half == g.halves - 1 else start + self.carried(acc[0], 1), [0])
                with T.serial(0, g.hidden) as c:
                    x, w = self.step.activation(self.bytes, sources[half] + c, 1), self.step.weights(self.weight, first * g.padded * g.hidden + c * rows + row)
                    T.buffer_store(acc, self.step.dot(acc[0], x, w), [0])
            T.buffer_store(self.words, acc[0], [self.area + g.sums + at])

        along(self.k, rows, sums)
        barrier()

    @contextmanager
    def rows(self) -> Iterator[Any]:
        yield self.k.group


class IntegerBlock(Block, IntegerLayer):
    pass


class FloatStep(PlainStep):
    def weights(self, buffer: Any, index: Any) -> list[Any]:
        return [buffer[index]]

    def activation(self, buffer: Any, index: Any, valid: int) -> list[Any]:
        return [buffer[index]]


def _sigmoid(x: Any) -> Any:
    return T.float32(1) / (T.float32(1) + T.exp(-x))


class FloatBlock(Block, FloatLayer):
    functions: ClassVar[Mapping[str, Callable[[int, Any, Any, Any], Any]]] = {  # lanes, x, alpha, beta
        "Sigmoid": lambda n, x, a, b: _sigmoid(x),
        "Tanh": lambda n, x, a, b: T.tanh(x),
        "Relu": lambda n, x, a, b: T.max(x, T.float32(0)),
        "HardSigmoid": lambda n, x, a, b: T.max(T.min(a * x + b, T.float32(1)), T.float32(0)),
        "LeakyRelu": lambda n, x, a, b: T.Select(x < T.float32(0), a * x, x),
        "Affine": lambda n, x, a, b: a * x + b,
        "ScaledTanh": lambda n, x, a, b: a * T.tanh(b * x),
        "Softsign": lambda n, x, a, b: x / (T.float32(1) + T.max(x, -x)),
    }


def recurrence(op: OpCall, target: Target, row: str) -> Kernel:
    """`qc.recurrence`."""
    step = PlainStep(1)
    g = Geometry(op, 1, 1, 1, ONE_TILE)
    weight, bias = packed(op, g, step)
    rest = [np.asarray(o) for o in op.operands[5:] if isinstance(o, np.ndarray)]
    arrays = [weight, bias, padded_rows(g, np.asarray(op.operands[3])), table_words(np.asarray(op.operands[4])), *rest]
    return _kernel(op, target, row, g, arrays, lambda k: IntegerBlock(k, g, step))


def float_recurrence(op: OpCall, target: Target, row: str) -> Kernel:
    """`qc.f32.recurrence`."""
    step = FloatStep(1, input_dtype="float32")
    g = Geometry(op, 1, 1, 4, ONE_TILE)
    weight, bias = packed(op, g, step)
    arrays = [weight, bias, *(np.asarray(o) for o in op.operands[3:] if isinstance(o, np.ndarray))]
    return _kernel(op, target, row, g, arrays, lambda k: FloatBlock(k, g, step))


def _kernel(op: OpCall, target: Target, row: str, g: Geometry, arrays: list[np.ndarray], make: Callable[[Emitter], Layer]) -> Kernel:
    return make_kernel(row, op, target, lambda k: make(k).run(), arrays=arrays, threads=g.batch * ROW_THREADS, block=ROW_THREADS, scratch=4 * g.batch * g.words)


gpu_row("qc.recurrence", recurrence, check_integer)
gpu_row("qc.f32.recurrence", float_recurrence, lambda op: check(op, 3))
