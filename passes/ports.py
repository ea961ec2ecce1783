"""A network's edges in the types that its user has: uint8 pixels, and int8 or uint8 numbers, in place of float32.

    q = qc.quantize(x f32)                          -->   q = qc.pixels(x u8, table)          a table per channel: what quantize makes of each pixel value
    relu(x f32)                                     -->   relu(qc.pixels(x u8, float table))  the very float32 numbers
    the same, resized and cropped inside            -->   qc.pixels(qc.resample(qc.resample(qc.slice(x u8))), table)
    q = qc.quantize(x f32)                          -->   q = qc.enter(x i8)                  where x has the same scale and zero point, else a qc.lut behind it
    y = qc.dequantize(q)  handed out                -->   qc.leave(q)                         other float32 outputs are quantized first

Follows INTEGER and REPLACE_OPERANDS: nothing inside the network changes. The attribute `qc.params` gets scale and zero point of every such input and output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax

from qcompiler.numerics import operators as numerics
from qcompiler.numerics.spec import QParams
from qcompiler.passes.graph import Graph, GraphBuilder, arguments, const, dtype_of, make_op, match_op, shape_of, substitute


@dataclass(frozen=True, eq=False)
class PixelPort:
    """An input of uint8 pixels [N, H, W, C]. values: float32 [C, 256], what channel c of the network reads for each pixel value; channels: the channel of a
    pixel that it is made from. axes: from [N, H, W, C] to the network's layout. source: (height, width) of the pixels where `resized` brings them to the
    network's: operators, attributes (of `qc.slice` along height and width alone), and the height and width that each leaves."""

    values: np.ndarray
    channels: tuple[int, ...]
    axes: tuple[int, ...]
    source: tuple[int, int] | None = None
    resized: Sequence[tuple[str, Mapping[str, Any], tuple[int, int]]] = ()


@dataclass(frozen=True)
class IntegerPort:
    """An input of int8, or an output of int8 or uint8, whose numbers q stand for `scale * (q - zero_point)`; in uint8 both are 128 greater. Of an output that
    is stored in 8 bits anyway, its own parameters hold."""

    params: QParams | None
    dtype: str = "int8"


def with_ports(module: tvm.IRModule, inputs: Mapping[str, PixelPort | IntegerPort], outputs: Mapping[str, IntegerPort]) -> tvm.IRModule:
    """The integer module with these inputs and outputs, by name."""
    return _Edges(module, inputs, outputs).run()


class _Edges:
    def __init__(self, module: tvm.IRModule, inputs: Mapping[str, PixelPort | IntegerPort], outputs: Mapping[str, IntegerPort]) -> None:
        self.graph, self.inputs, self.outputs = Graph.of(module), inputs, outputs
        self.builder = GraphBuilder(self.graph.attrs)
        self.builder.reserve(name for name, _ in self.graph.bindings)
        self.params: dict[str, Any] = dict(self.graph.attrs.get("qc.params", {}))
        self.env: dict[str, Any] = {}
        self.real: dict[str, Any] = {}  # float32 forms of inputs that have another type now

    def run(self) -> tvm.IRModule:
        for p in self.graph.inputs:
            self.env[str(p.name)] = self.input(str(p.name), shape_of(p), dtype_of(p))
        idle = self.idle()
        exprs = self.graph.values()
        for name, expr in self.graph.bindings:
            if name not in idle:
                stored = self.quantized(expr)
                self.env[name] = self.builder.emit(name, substitute(expr, self.read) if stored is None else stored)
        made = [(name, self.handed_out(name, var, exprs) if name in self.outputs else self.env[str(var.name)]) for name, var in self.graph.outputs]
        self.builder.state("qc.params", self.params)
        return self.builder.finish(made)

    def idle(self) -> set[str]:
        """Conversions to float32 that only such outputs read."""
        uses, exprs = self.graph.consumers(), self.graph.values()
        plain = {str(var.name) for name, var in self.graph.outputs if name not in self.outputs}
        handed = {str(var.name) for name, var in self.graph.outputs if name in self.outputs} - plain
        return {v for v in handed if set(uses[v]) == {"<output>"} and _bytes_behind(exprs.get(v)) is not None}

    # -- inputs -------------------------------------------------------------------------------------------------------------------------

    def input(self, name: str, shape: tuple[int, ...], dtype: str) -> Any:
        port = self.inputs.get(name)
        if isinstance(port, PixelPort):
            count, *size = (shape[port.axes.index(i)] for i in range(3))
            channels = len(set(port.channels))
            return self.resized(name, self.builder.input(name, (count, *(port.source or size), channels), "uint8"), port, count, channels)
        if isinstance(port, IntegerPort):
            assert port.params is not None
            self.params[name] = [port.params.scale, port.params.zero_point]
            return self.builder.input(name, shape, "int8")
        return self.builder.input(name, shape, dtype)

    def resized(self, name: str, pixels: Any, port: PixelPort, count: int, channels: int) -> Any:
        for number, (operator, attrs, size) in enumerate(port.resized):
            if operator == "qc.slice":
                attrs = {"begin": [0, *attrs["begin"], 0], "end": [count, *attrs["end"], channels], "strides": [1] * 4}
            call = make_op(operator, [pixels], dict(attrs), (count, *size, channels), "uint8")
            pixels = self.builder.emit(self.builder.made(name, f"resized{number}"), call)
        return pixels

    def quantized(self, expr: Any) -> Any | None:
        """The integers of a `qc.quantize` of an input that has another type now, straight from that."""
        op = match_op(expr)
        if op is None or op[0] != "qc.quantize" or str(getattr(op[1][0], "name", "")) not in self.inputs:
            return None
        name, attrs = str(op[1][0].name), {k: v for k, v in op[2].items() if k != "axes"}
        port, axes = self.inputs[name], op[2].get("axes")
        if isinstance(port, PixelPort):
            return self.looked_up(name, numerics.quantize(port.values, **attrs), axes, expr)
        if dtype_of(expr) != "int8":
            return None
        entered = make_op("qc.enter", [self.env[name]], _moved(axes), shape_of(expr), "int8")
        assert port.params is not None
        steps = np.arange(-128, 128).astype(np.int8)
        table = numerics.quantize(numerics.dequantize(steps, scale=port.params.scale, zero_point=port.params.zero_point), **attrs)
        if (table == steps).all():
            return entered
        return make_op("qc.lut", [self.builder.emit(self.builder.made(name, "entered"), entered), const(table)], {}, shape_of(expr), "int8")

    def looked_up(self, name: str, table: np.ndarray, axes: Sequence[int] | None, like: Any) -> Any:
        port = self.inputs[name]
        assert isinstance(port, PixelPort)
        order = [port.axes[i] for i in axes] if axes else list(port.axes)
        attrs = {"channels": list(port.channels), **_moved(order)}
        return make_op("qc.pixels", [self.env[name], const(table)], attrs, shape_of(like), str(table.dtype))

    def read(self, var: Any) -> Any:
        """A value as the network's own operators read it: in float32 where that is an input's type in the file."""
        name = str(var.name)
        port = self.inputs.get(name)
        if port is None:
            return self.env[name]
        if name not in self.real:
            if isinstance(port, PixelPort):
                made = self.looked_up(name, port.values, None, var)
            else:
                assert port.params is not None
                entered = self.builder.emit(self.builder.made(name, "entered"), make_op("qc.enter", [self.env[name]], {}, shape_of(var), "int8"))
                made = make_op("qc.dequantize", [entered], {"scale": port.params.scale, "zero_point": port.params.zero_point}, shape_of(var), "float32")
            self.real[name] = self.builder.emit(self.builder.made(name, "real"), made)
        return self.real[name]

    # -- outputs ------------------------------------------------------------------------------------------------------------------------

    def handed_out(self, name: str, var: Any, exprs: Mapping[str, Any]) -> Any:
        port, found = self.outputs[name], _bytes_behind(exprs.get(str(var.name)))
        if found is not None:
            stored, attrs = self.env[str(found[0].name)], found[1]
        else:
            assert port.params is not None, name
            attrs = {"scale": port.params.scale, "zero_point": port.params.zero_point}
            call = make_op("qc.quantize", [self.read(var)], attrs, shape_of(var), "int8")
            stored = self.builder.emit(self.builder.made(name, "quantized"), call)
            self.params[str(stored.name)] = [attrs["scale"], attrs["zero_point"]]
        left = {"dtype": port.dtype, **_moved(attrs.get("axes"))}
        given = self.builder.emit(self.builder.made(name, "stored"), make_op("qc.leave", [stored], left, shape_of(var), port.dtype))
        self.params[str(given.name)] = [attrs["scale"], attrs["zero_point"] + (128 if port.dtype == "uint8" else 0)]
        return given


def quantizations(module: tvm.IRModule, name: str) -> list[QParams]:
    """Under which parameters an integer module stores its float input `name` in int8, in order."""
    found = [match_op(e) for _, e in Graph.of(module).bindings if any(isinstance(a, relax.Var) and str(a.name) == name for a in arguments(e))]
    return [QParams(op[2]["scale"], op[2]["zero_point"]) for op in found if op is not None and op[0] == "qc.quantize" and "out_dtype" not in op[2]]


def stored_output(module: tvm.IRModule, name: str) -> bool:
    """Is the output `name` of an integer module stored in 8 bits before it becomes float32?"""
    graph = Graph.of(module)
    return _bytes_behind(graph.values().get(str(dict(graph.outputs)[name].name))) is not None


def _bytes_behind(expr: Any) -> tuple[Any, dict[str, Any]] | None:
    """(int8 variable, attributes) of a `qc.dequantize`."""
    op = match_op(expr)
    return (op[1][0], op[2]) if op is not None and op[0] == "qc.dequantize" and dtype_of(op[1][0]) == "int8" else None


def _moved(axes: Sequence[int] | None) -> dict[str, Any]:
    return {} if axes is None or list(axes) == sorted(axes) else {"axes": list(axes)}
