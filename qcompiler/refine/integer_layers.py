"""The layers of an integer module: its calls that have weights and a bias, with the real meaning of their numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm

from qcompiler.passes.graph import Graph, arguments, const_value, is_const, match_op, relax_op, shape_of
from qcompiler.passes.kinds import KINDS
from qcompiler.passes.realize import ACCUMULATED

_LAYERS = {kind.operator for kind in KINDS.values() if kind.weighted}


@dataclass
class IntegerLayer:
    """A convolution or dense call of the integer module. unit: real value of one accumulator step, float64[O].

    group: of the float module, to which it belongs; the call "<id>~accumulated" is the part of one before a float activation.
    residual: (value id, zero point, real value of one step), where the call adds one in front of all that isn't linear. x_scale: real value of one step of
    the input. is_last: no other layer is behind it.
    """

    id: str
    group: str
    kind: str
    x: str
    x_scale: float
    weight: np.ndarray
    bias: np.ndarray
    unit: np.ndarray
    attrs: dict[str, Any]
    shape: tuple[int, ...]
    is_last: bool
    residual: tuple[str, int, float] | None = None


def integer_layers(module: tvm.IRModule) -> list[IntegerLayer]:
    """The calls of an integer module that have a bias, in order, with the real meaning of their numbers."""
    graph = Graph.of(module)
    scales: dict[str, Any] = graph.attrs.get("qc.params", {})
    fronts = _before_layers(graph)
    layers = []
    for name, expr in graph.bindings:
        op = match_op(expr)
        if op is None or op[0] not in _LAYERS:
            continue
        kind, tensors, attrs = op[0].removeprefix("qc."), op[1], op[2]
        weight, bias, multiplier = (const_value(t) for t in tensors[1:4])
        bent, multiplier = multiplier.ndim > 1, multiplier.reshape(-1, len(weight))[0]
        step = 1.0 if attrs.get("out_dtype") == "float32" else float(scales[name][0])
        residual = None
        if len(tensors) > 4:
            step /= 2.0 ** attrs["residual_shift"]
            if not bent or attrs.get("bends_sum"):
                residual = (str(tensors[4].name), int(attrs["residual_zero_point"]), attrs["residual_multiplier"] * step)
        unit = multiplier.astype(np.float64) * step
        x = str(tensors[0].name)
        source, what = graph.naming.split(name)
        group = source if what == ACCUMULATED else name
        layers.append(IntegerLayer(name, group, kind, x, float(scales[x][0]), weight, bias, unit, attrs, shape_of(expr), name not in fronts, residual))
    return layers


def _before_layers(graph: Graph) -> set[str]:
    """The values that some convolution or matrix product is computed from."""
    found: set[str] = set()
    for name, expr in reversed(graph.bindings):
        op = match_op(expr)
        called = op[0] if op else relax_op(expr) or ""
        if name in found or any(kind in called for kind in ("conv", "dense", "matmul")):
            found |= {str(getattr(v, "tuple_value", v).name) for v in arguments(expr) if not is_const(v)}
    return found
