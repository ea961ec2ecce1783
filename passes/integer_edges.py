"""Integers that a quantized file takes or hands out enter and leave as they are: no float arithmetic at its edges.

    q = qc.quantize((float(x i8) - z) * s)                            -->   q = qc.enter(x)             x uint8: the same number less 128
    y = int8(clip(round(qc.dequantize(q) / s) + z))  handed out       -->   y = qc.leave(q)             uint8 likewise

Between two 8-bit values any such chain has 256 answers. They are computed here as the chain does; where they are not the integers themselves (two scales),
a qc.lut stands between. Follows `fuse_edges`: transposes are part of qc.quantize and qc.dequantize. The attribute `qc.params` gets scale and zero point of
the edges.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import relax

from qcompiler.numerics import operators as numerics
from qcompiler.passes.graph import Graph, GraphBuilder, const, const_value, dtype_of, is_const, make_op, match_op, plain, relax_op, shape_of, substitute

Array = np.ndarray
_BYTES = ("int8", "uint8")
_CHAIN: dict[str, Callable[[Array, Array], Array]] = {
    "relax.add": np.add,
    "relax.subtract": np.subtract,
    "relax.multiply": np.multiply,
    "relax.divide": np.divide,
}


def integer_edges(module: tvm.IRModule) -> tvm.IRModule:
    graph = Graph.of(module)
    return _Edges(graph).run() if any(dtype_of(v) in _BYTES for v in (*graph.inputs, *(v for _, v in graph.outputs))) else module


class _Edges:
    def __init__(self, graph: Graph) -> None:
        self.graph, self.exprs = graph, graph.values()
        self.entrances = {str(p.name): dtype_of(p) for p in graph.inputs if dtype_of(p) in _BYTES}
        self.handed = {str(v.name) for _, v in graph.outputs if dtype_of(v) in _BYTES}
        self.builder = GraphBuilder(graph.attrs)
        self.builder.reserve(name for name, _ in graph.bindings)
        self.params: dict[str, Any] = dict(graph.attrs.get("qc.params", {}))
        self.env: dict[str, Any] = {}

    def run(self) -> tvm.IRModule:
        for p in self.graph.inputs:
            self.env[str(p.name)] = self.builder.input(str(p.name), shape_of(p), dtype_of(p))
        for name, expr in self.graph.bindings:
            made = self.entered(name, expr)
            made = self.left(name, expr) if made is None else made
            self.env[name] = self.builder.emit(name, substitute(expr, lambda v: self.env[str(v.name)])) if made is None else made
        self.builder.state("qc.params", self.params)
        return self.builder.finish([(name, self.env[str(v.name)]) for name, v in self.graph.outputs])

    def entered(self, name: str, expr: Any) -> Any | None:
        """A `qc.quantize` of an integer input, without the arithmetic between."""
        op = match_op(expr)
        if op is None or op[0] != "qc.quantize" or dtype_of(expr) != "int8" or (chain := self.chain(op[1][0])) is None or match_op(chain[0]) is not None:
            return None
        source, values = chain
        raw, attrs = str(source.name), {k: v for k, v in op[2].items() if k != "axes"}
        table = numerics.quantize(values, **attrs)
        same = bool((table == _STEPS).all())
        entrance = make_op("qc.enter", [self.env[raw]], {"dtype": dtype_of(source), **_moved(op[2])}, shape_of(expr), "int8")
        entered = self.builder.emit(name if same else self.builder.made(name, "entered"), entrance)
        if same:
            self.params.setdefault(raw, [attrs["scale"], attrs["zero_point"] + (128 if dtype_of(source) == "uint8" else 0)])
        return entered if same else self.builder.emit(name, make_op("qc.lut", [entered, const(table)], {}, shape_of(expr), "int8"))

    def left(self, name: str, expr: Any) -> Any | None:
        """An output that is rounded to integers from a `qc.dequantize`, without the arithmetic between."""
        if name not in self.handed or relax_op(expr) != "relax.astype" or (chain := self.chain(expr.args[0])) is None or match_op(chain[0]) is None:
            return None
        kind = dtype_of(expr)
        _, (stored,), attrs = match_op(chain[0]) or ("", [None], {})
        table, last = _canonical(chain[1].astype(kind)), self.env[str(stored.name)]
        if not (table == _STEPS).all():
            last = self.builder.emit(self.builder.made(name, "stored"), make_op("qc.lut", [last, const(table)], {}, shape_of(stored), "int8"))
        else:
            self.params.setdefault(name, [attrs["scale"], attrs["zero_point"] + (128 if kind == "uint8" else 0)])
        return self.builder.emit(name, make_op("qc.leave", [last], {"dtype": kind, **_moved(attrs)}, shape_of(expr), kind))

    def chain(self, var: Any) -> tuple[Any, Array] | None:
        """(an integer input or a `qc.dequantize`, float32 [256]: what `var` is for each of its numbers, from the least on); None for any other value."""
        steps: list[Callable[[Array], Array]] = []
        while isinstance(var, relax.Var) and (expr := self.exprs.get(str(var.name))) is not None:
            op, kind = match_op(expr), relax_op(expr)
            if op is not None:
                if op[0] != "qc.dequantize" or dtype_of(op[1][0]) != "int8":
                    return None
                real = {k: v for k, v in op[2].items() if k != "axes"}
                before = self.rounded(op[1][0]) if "axes" not in op[2] else None
                found = (expr, _STEPS) if before is None else before
                return found[0], _through(numerics.dequantize(found[1], **real), steps)
            if kind == "relax.astype" and dtype_of(expr) == "float32" and str(getattr(expr.args[0], "name", "")) in self.entrances:
                source = expr.args[0]
                return source, _through((_STEPS.astype(np.int16) + (128 if dtype_of(source) == "uint8" else 0)).astype(np.float32), steps)
            step = _step(expr)
            if step is None:
                return None
            steps.append(step)
            var = expr.args[0]
        return None

    def rounded(self, var: Any) -> tuple[Any, Array] | None:
        """`chain` of a value that a `qc.quantize` at the end of another chain rounds, int8 [256]: a file may state several scales one behind the other."""
        op = match_op(self.exprs.get(str(var.name)))
        if op is None or op[0] != "qc.quantize" or "axes" in op[2] or (chain := self.chain(op[1][0])) is None:
            return None
        return chain[0], numerics.quantize(chain[1], **op[2])


_STEPS = np.arange(-128, 128).astype(np.int8)


def _step(expr: Any) -> Callable[[Array], Array] | None:
    """An elementwise operator of one float32 tensor and numbers."""
    kind = relax_op(expr)
    if dtype_of(expr) != "float32":
        return None
    if kind in _CHAIN and is_const(expr.args[1]) and (number := const_value(expr.args[1])).size == 1 and number.dtype == np.float32:
        return lambda x: _CHAIN[kind](x, number.reshape(()))
    if kind == "relax.round":
        return np.rint
    if kind == "relax.clip":
        low, high = (np.float32(float(plain(a.value))) for a in expr.args[1:])
        return lambda x: np.clip(x, low, high)
    return None


def _through(values: Array, steps: list[Callable[[Array], Array]]) -> Array:
    for step in reversed(steps):
        values = step(values)
    return values


def _canonical(values: Array) -> Array:
    """int8, or uint8 less 128."""
    return values if values.dtype == np.int8 else (values.astype(np.int16) - 128).astype(np.int8)


def _moved(attrs: dict[str, Any]) -> dict[str, Any]:
    axes = attrs.get("axes")
    return {} if axes is None or list(axes) == sorted(axes) else {"axes": list(axes)}
