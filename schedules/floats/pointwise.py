"""`qc.f32.pointwise`: one function of one or two float tensors that broadcast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script.ir_builder import tirx as T

from qcompiler.base.targets import Target
from qcompiler.schedules.builder import Emitter, make_kernel, splat, view
from qcompiler.schedules.floats import math as floats
from qcompiler.schedules.floats.math import f32
from qcompiler.schedules.portable.base import portable
from qcompiler.schedules.portable.elementwise import constants_of, tasks_of
from qcompiler.schedules.portable.nest import elementwise
from qcompiler.schedules.table import Kernel, OpCall

LANES = 16

# A clamp hands on NaN: the bound comes first, as `max(a, b)` is `a > b ? a : b`.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "copy": lambda n, x: x,
    "add": lambda n, x, y: x + y,
    "subtract": lambda n, x, y: x - y,
    "multiply": lambda n, x, y: x * y,
    "divide": lambda n, x, y: x / y,
    "maximum": lambda n, x, y: T.max(x, y),
    "minimum": lambda n, x, y: T.min(x, y),
    "relu": lambda n, x: T.max(f32(0.0, n), x),
    "abs": lambda n, x: T.max(x, f32(0.0, n) - x),
    "negative": lambda n, x: x * f32(-1.0, n),
    "square": lambda n, x: x * x,
    "cube": lambda n, x: x * x * x,
    "sqrt": lambda n, x: floats.root(x, n),
    "rsqrt": lambda n, x: f32(1.0, n) / floats.root(x, n),
    "exp": lambda n, x: floats.exp(x, n),
    "sigmoid": lambda n, x: floats.sigmoid(x, n),
    "tanh": lambda n, x: floats.tanh(x, n),
    "erf": lambda n, x: floats.erf(x, n),
    "gelu": lambda n, x: floats.gelu(x, n),
    "gelu_tanh": lambda n, x: floats.gelu_tanh(x, n),
    "silu": lambda n, x: floats.silu(x, n),
}
_COSTLY = ("exp", "sigmoid", "tanh", "erf", "gelu", "gelu_tanh", "silu")


def pointwise(op: OpCall, target: Target, row: str) -> Kernel:
    """attrs["function"]: a name of `FUNCTIONS`, or "clip" with bounds low and high, or "leakyrelu" with alpha."""
    name = str(op.attrs["function"])

    def emit(k: Emitter) -> None:
        k.width = LANES
        low, high, alpha = (k.f32_or_none(op.attrs.get(key)) for key in ("low", "high", "alpha"))

        def compute(x: list[Any], n: int) -> Any:
            if name == "clip":
                return T.max(splat(low, n), T.min(splat(high, n), x[0]))
            if name == "leakyrelu":
                return T.Select(x[0] < f32(0.0, n), x[0] * splat(alpha, n), x[0])
            return FUNCTIONS[name](n, *[T.bind(v) for v in x])

        elementwise(k, [v.broadcast(op.output.shape) for v in k.operands()], view(k.output, op.output), compute)

    return make_kernel(row, op, target, emit, tasks=tasks_of(op, 8_000 if name in _COSTLY else 50_000), arrays=constants_of(op))


def _check(op: OpCall) -> str | None:
    if any(str(o.dtype) != "float32" for o in op.operands) or op.output.dtype != "float32":
        return "operands must be float32."
    return None if op.attrs["function"] in (*FUNCTIONS, "clip", "leakyrelu") else f"function '{op.attrs['function']}' is unknown."


portable("qc.f32.pointwise", pointwise, check=_check)
