"""Recurrent layers in float32. Sums run along the state, one element after the other, so that every target computes the same bits where it fuses alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.schedules.builder import load
from qcompiler.schedules.floats import math as floats
from qcompiler.schedules.floats.math import f32, fma
from qcompiler.schedules.floats.pointwise import LANES
from qcompiler.schedules.portable.base import portable
from qcompiler.schedules.portable.recurrence import FloatLayer, PlainStep
from qcompiler.schedules.recurrence import Geometry, check, packed, recurrence_kernel
from qcompiler.schedules.table import Kernel, OpCall

FUNCTIONS: dict[str, Callable[[int, Any, Any, Any], Any]] = {  # lanes, x, alpha, beta
    "Sigmoid": lambda n, x, a, b: floats.sigmoid(x, n),
    "Tanh": lambda n, x, a, b: floats.tanh(x, n),
    "Relu": lambda n, x, a, b: T.max(f32(0.0, n), x),
    "HardSigmoid": lambda n, x, a, b: T.max(f32(0.0, n), T.min(f32(1.0, n), fma(a, x, b, n))),
    "LeakyRelu": lambda n, x, a, b: T.Select(x < f32(0.0, n), a * x, x),
    "Affine": lambda n, x, a, b: fma(a, x, b, n),
    "ScaledTanh": lambda n, x, a, b: a * floats.tanh(T.bind(b * x), n),
    "Softsign": lambda n, x, a, b: x / (f32(1.0, n) + T.max(x, f32(0.0, n) - x)),
}


class FloatStep(PlainStep):
    """One element of the state times a vector of weights."""

    def weights(self, buffer: Any, index: Any) -> list[Any]:
        return [load(buffer, index, self.lanes)]

    def activation(self, buffer: Any, index: Any, valid: int) -> list[Any]:
        return [T.bind(load(buffer, index, self.lanes, stride=0))]

    def dot(self, acc: Any, x: list[Any], w: list[Any]) -> Any:
        return fma(x[0], w[0], acc, self.lanes)


class VectorLayer(FloatLayer):
    functions = FUNCTIONS


def recurrence(op: OpCall, target: Target, row: str) -> Kernel:
    step = FloatStep(LANES, input_dtype="float32")
    g = Geometry(op, step.lanes, step.group, 4)
    weight, bias = packed(op, g, step)
    arrays = [weight, bias, *(np.asarray(o) for o in op.operands[3:] if isinstance(o, np.ndarray))]
    return recurrence_kernel(op, target, row, g, arrays, lambda k: VectorLayer(k, g, step))


portable("qc.f32.recurrence", recurrence, check=lambda op: check(op, 3), dense=True)
