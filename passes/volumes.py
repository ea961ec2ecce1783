"""Convolutions over three axes become sums of convolutions over two, which have kernels of ours; TVM's run on one thread.

    conv3d(x, w) {NCDHW}            -->   c0 = qc.f32.conv2d(x at depths of tap 0, w[0]), c1 = qc.f32.conv2d(x at depths of tap 1, w[1], c0), ...
    conv3d_transpose(x, w) {NCDHW}  -->   the same with qc.f32.conv2d_transpose and additions, for each depth of the output modulo the stride

Depth joins the batch: [N, C, D, H, W] is read as [N * D, H, W, C]. For constant weights, and for what `layout_volumes.py` leaves: batches, groups.
Follows `select_float` and `fuse_edges`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from tvm import relax

from qcompiler.passes.constants import Constant, constant_of
from qcompiler.passes.graph import Graph, GraphBuilder, const, dtype_of, make_op, plain, rebuilt, relax_op, shape_of
from qcompiler.passes.layout_volumes import phases
from qcompiler.passes.select_float import NO_LIMIT

_OPERATORS = ("relax.nn.conv3d", "relax.nn.conv3d_transpose")


def volumes(module: tvm.IRModule) -> tvm.IRModule:
    """The same module without them; the module itself when it has none."""
    graph = Graph.of(module)
    values = graph.values()
    found = {name: weight for name, expr in graph.bindings if (weight := _weight(expr, values)) is not None}
    if not found:
        return module

    def replaced(builder: GraphBuilder, name: str, expr: Any, old: Any) -> Any:
        spread = _scattered if relax_op(old) == _OPERATORS[1] else _gathered
        return spread(_Layer(builder, name, expr.args[0], old, found[name].real().astype(np.float32)))

    return rebuilt(graph, found, replaced)


def _weight(expr: Any, values: dict[str, Any]) -> Constant | None:
    if relax_op(expr) not in _OPERATORS or dtype_of(expr) != "float32" or str(expr.attrs.data_layout) != "NCDHW" or not isinstance(expr.args[0], relax.Var):
        return None
    return constant_of(expr.args[1], values)


class _Layer:
    """One convolution while it is rewritten. `x` has its depth in front of rows: [N, D, H, W, C]."""

    def __init__(self, builder: GraphBuilder, name: str, x: Any, old: Any, weight: np.ndarray) -> None:
        self.builder, self.name, self.weight, self.a = builder, name, weight, old.attrs
        self.shape, self.groups = shape_of(old), int(old.attrs.groups)
        self.strides, self.dilation, self.padding = (plain(v) for v in (self.a.strides, self.a.dilation, self.a.padding))
        self.x = self.emit("channels_last", relax.op.permute_dims(x, [0, 2, 3, 4, 1]))

    def emit(self, what: str, expr: Any) -> Any:
        return self.builder.emit(self.builder.made(self.name, what), expr)

    def padded(self, front: int, back: int) -> None:
        if front or back:
            self.x = self.emit("padded", relax.op.nn.pad(self.x, [0, 0, front, back, 0, 0, 0, 0, 0, 0]))

    def images(self, first: int, count: int, stride: int) -> Any:
        """`count` depths from `first` on, as a batch of images."""
        part = self.emit("depths", relax.op.strided_slice(self.x, [1], [first], [first + (count - 1) * stride + 1], [stride]))
        n, _, *image = shape_of(self.x)
        return self.emit("images", relax.op.reshape(part, [n * count, *image]))

    def flat(self, kind: str, operands: list[Any], weight: np.ndarray, **more: Any) -> Any:
        """A convolution over two axes, `weight` [O, KH, KW, I / groups]."""
        x, *sums = operands
        *_, height, width = self.shape
        geometry = {"strides": self.strides[1:], "padding": [*self.padding[1:3], *self.padding[4:]], "dilation": self.dilation[1:], "groups": self.groups}
        tensors = [x, const(np.ascontiguousarray(weight)), const(np.zeros(len(weight), np.float32)), *sums]
        shape = [shape_of(x)[0], height, width, len(weight)]
        return self.emit("plane", make_op(f"qc.f32.{kind}", tensors, geometry | more | {"low": -NO_LIMIT, "high": NO_LIMIT}, shape, "float32"))

    def result(self, y: Any) -> Any:
        """From [N, D, H, W, O] or the same as images."""
        n, channels, *volume = self.shape
        y = self.emit("volume", relax.op.reshape(y, [n, *volume, channels]))
        return self.builder.emit(self.name, relax.op.permute_dims(y, [0, 4, 1, 2, 3]))


def _gathered(layer: _Layer) -> Any:
    """Output depth i reads depths i * stride + tap * dilation - padding."""
    layer.padded(layer.padding[0], layer.padding[3])
    sums: list[Any] = []
    for tap in range(layer.weight.shape[2]):
        x = layer.images(tap * layer.dilation[0], layer.shape[2], layer.strides[0])
        sums = [layer.flat("conv2d", [x, *sums], layer.weight[:, :, tap].transpose(0, 2, 3, 1))]
    return layer.result(sums[0])


def _scattered(layer: _Layer) -> Any:
    """What `phases` says of each depth of the output modulo the stride."""
    groups, stride, depths = layer.groups, layer.strides[0], shape_of(layer.x)[1]
    count = -(-layer.shape[2] // stride)
    inputs, outputs, taps, *window = layer.weight.shape
    kernels = layer.weight.reshape(groups, inputs // groups, outputs, taps, *window).transpose(3, 0, 2, 4, 5, 1).reshape(taps, -1, *window, inputs // groups)
    reads = phases(taps, stride, layer.padding[0], layer.dilation[0])
    starts = [start for phase_reads in reads for start, _ in phase_reads]
    front = max(0, -min(starts))
    layer.padded(front, max(0, max(starts) + count - depths))
    extra = plain(layer.a.output_padding)[1:]
    parts = []
    for phase_reads in reads:
        total = None
        for start, tap in phase_reads:
            x = layer.images(start + front, count, 1)
            y = layer.flat("conv2d_transpose", [x], kernels[tap], output_padding=extra)
            total = y if total is None else layer.emit("sum", relax.op.add(total, y))
        n, channels, _, height, width = layer.shape
        shape = [n, count, 1, height, width, channels]
        parts.append(const(np.zeros(shape, np.float32)) if total is None else layer.emit("phase", relax.op.reshape(total, shape)))
    y = parts[0] if stride == 1 else layer.emit("phases", relax.op.concat(parts, 2))
    y = layer.emit("depth", relax.op.reshape(y, [n, count * stride, height, width, channels]))
    if count * stride > layer.shape[2]:
        y = layer.emit("cropped", relax.op.strided_slice(y, [1], [0], [layer.shape[2]]))
    return layer.result(y)
