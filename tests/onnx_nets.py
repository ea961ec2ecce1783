"""Small ONNX networks written in a few lines, and the comparison of an imported module with ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tvm
from onnx import helper, numpy_helper
from tvm import relax

from qcompiler.importers.model import FloatModel, load
from qcompiler.passes.graph import Graph, dtype_of, match_op, relax_op, shape_of
from qcompiler.passes.legal_layouts import legal_layouts
from qcompiler.passes.legalize import legalize
from qcompiler.verification import interpreter


class OnnxNet:
    """`y = net.op("Conv", x, net.weight(4, 3, 3, 3), strides=[2, 2])`, then `net.save(path, [y])`. Weights are random, of unit gain."""

    def __init__(self, opset: int = 17, seed: int = 0) -> None:
        self.opset, self.rng = opset, np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def input(self, name: str, *shape: int | str | None, dtype: int = onnx.TensorProto.FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def const(self, value: Any, dtype: str = "float32", name: str | None = None) -> str:
        name = name or f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def ints(self, *values: int) -> str:
        return self.const(values, "int64")

    def weight(self, *shape: int, spread: float | None = None) -> str:
        spread = spread if spread is not None else max(1, int(np.prod(shape[1:]))) ** -0.5
        return self.const(self.rng.standard_normal(shape) * spread)

    def op(self, op: str, *inputs: str, outputs: int = 1, name: str | None = None, domain: str = "", **attrs: Any) -> Any:
        names = [f"{name or op.lower()}{len(self.nodes)}{'abcdefgh'[i] if outputs > 1 else ''}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, name=f"node_{names[0]}", domain=domain, **attrs))
        return names[0] if outputs == 1 else names

    def spelled_norm(
        self, x: str, gamma: str | None = None, beta: str | None = None, axis: int | Sequence[int] = -1, square: str = "Pow", end: str = "Div"
    ) -> str:
        """A normalization as exporters write it below operator set 17. square: "Pow" or "Mul". end: "Div", "Reciprocal" or "One" (1 / root)."""
        axes = [axis] if isinstance(axis, int) else list(axis)
        d = self.op("Sub", x, self.op("ReduceMean", x, axes=axes, keepdims=1))
        variance = self.op("ReduceMean", self.op("Pow", d, self.const(2.0)) if square == "Pow" else self.op("Mul", d, d), axes=axes, keepdims=1)
        root = self.op("Sqrt", self.op("Add", variance, self.const(1e-3)))
        inverse = {"Div": "", "Reciprocal": lambda: self.op("Reciprocal", root), "One": lambda: self.op("Div", self.const(1.0), root)}[end]
        y = self.op("Mul", d, inverse()) if callable(inverse) else self.op("Div", d, root)
        y = y if gamma is None else self.op("Mul", y, gamma)
        return y if beta is None else self.op("Add", y, beta)

    def proto(self, outputs: Sequence[str]) -> onnx.ModelProto:
        infos = [helper.make_empty_tensor_value_info(o) for o in outputs]
        domains = sorted({n.domain for n in self.nodes if n.domain})
        graph = helper.make_graph(self.nodes, "net", self.inputs, infos, self.initializers)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset), *(helper.make_opsetid(d, 1) for d in domains)], ir_version=8)
        return onnx.shape_inference.infer_shapes(model) if all(not n.domain for n in self.nodes) else model

    def save(self, path: Path, outputs: Sequence[str]) -> Path:
        onnx.save(self.proto(outputs), path)
        return path


def compiled(module: tvm.IRModule) -> Callable[..., list[np.ndarray]]:
    """A float module as a function of arrays, on TVM's own kernels. Each runs once or twice on little: to optimize its code takes longer."""
    built = relax.build(legalize(module), tvm.target.Target({"kind": "llvm", "opt-level": 0}))
    main = relax.VirtualMachine(built, tvm.cpu())["main"]
    return lambda *arrays: [r.numpy() for r in main(*[tvm.runtime.tensor(np.asarray(a, order="C")) for a in arrays])]


def execute(module: tvm.IRModule, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs of a float module by name, computed by TVM's own kernels; where it holds operators of ours, an operator at a time."""
    graph = Graph.of(module)
    if any(match_op(expr) for _, expr in graph.bindings):
        return interpreter.run(module, feeds)
    arrays = [np.asarray(feeds[str(p.name)], dtype_of(p), order="C") for p in graph.inputs]
    return dict(zip((name for name, _ in graph.outputs), compiled(legal_layouts(module))(*arrays), strict=True))


def samples(model: FloatModel, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {i.name: (rng.standard_normal(i.shape) * 2 if i.dtype == "float32" else rng.integers(0, 2, i.shape)).astype(i.dtype) for i in model.inputs}


def agrees(path: Path, input_shapes: dict[str, Sequence[int]] | None = None, tolerance: float = 1e-5) -> FloatModel:
    """Load, run, and compare every output with ONNX Runtime: largest error relative to the output's largest value. Returns the model.

    `tolerance`: float32 sums of different order; 1e-5 holds for a few hundred terms.
    """
    runtime = pytest.importorskip("onnxruntime")
    model = load(path, input_shapes)
    feeds = samples(model)
    session = runtime.InferenceSession(str(path))
    wanted = dict(zip([o.name for o in session.get_outputs()], session.run(None, feeds), strict=True))
    found = execute(model.module, feeds)
    assert list(found) == list(wanted) == [o.name for o in model.outputs]
    for info in model.outputs:
        a, b = found[info.name], np.asarray(wanted[info.name])
        assert a.shape == b.shape == info.shape, info
        assert a.dtype == b.dtype == info.dtype, info
        error = np.abs(a.astype(np.float64) - b).max(initial=0.0)
        assert error <= tolerance * max(np.abs(b.astype(np.float64)).max(initial=0.0), 1e-3), f"{info.name}: {error}"
    canonical(model.module)
    return model


def canonical(module: tvm.IRModule) -> None:
    """The promises of docs/architecture.md that every module keeps."""
    graph = Graph.of(module)
    assert len(module.get_global_vars()) == 1
    for name, expr in graph.bindings:
        op = relax_op(expr)
        attrs = expr.attrs if op else None
        assert op is not None or isinstance(expr, relax.TupleGetItem) or not graph.inputs or name in {str(v.name) for _, v in graph.outputs}, name
        assert op not in ("relax.nn.conv1d", "relax.nn.max_pool1d", "relax.nn.avg_pool1d", "relax.nn.batch_norm", "relax.call_tir"), name
        if op == "relax.nn.conv2d":
            assert (attrs.data_layout, attrs.kernel_layout) == ("NHWC", "OHWI"), name
        elif op == "relax.nn.conv2d_transpose":
            assert (attrs.data_layout, attrs.kernel_layout) == ("NHWC", "IHWO"), name
        elif op in ("relax.nn.max_pool2d", "relax.nn.avg_pool2d", "relax.image.resize2d"):
            assert attrs.layout == "NHWC", name
        elif op in ("relax.reshape", "relax.permute_dims"):
            assert shape_of(expr.args[0]) != shape_of(expr) or op == "relax.permute_dims", name


def operators(model: FloatModel | tvm.IRModule) -> list[str]:
    """Operators of a module in order, without "relax." and "nn."."""
    module = model.module if isinstance(model, FloatModel) else model
    return [str(relax_op(e) or "item").removeprefix("relax.").removeprefix("nn.") for _, e in Graph.of(module).bindings]
