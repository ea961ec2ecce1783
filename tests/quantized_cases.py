"""Every way to state a quantization that ONNX has, times what is done with it: small graphs, many to a model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

SHAPE = (3, 8, 4, 6)  # of the input x
BITS = {"int8": (-128, 127), "uint8": (0, 255), "int16": (-32768, 32767), "uint16": (0, 65535), "int4": (-8, 7), "uint4": (0, 15)}
NEW = ("int16", "uint16", "int4", "uint4")  # since operator set 21, as blocks
RNG = np.random.default_rng(5)


@dataclass(frozen=True)
class Stated:
    """A quantization: grain is "tensor", ("axis", k) or ("block", k, size)."""

    dtype: str
    grain: Any
    runtime: bool = False

    def __str__(self) -> str:
        return f"{self.dtype}-{'-'.join(map(str, self.grain)) if isinstance(self.grain, tuple) else self.grain}{'-runtime' if self.runtime else ''}"

    def shape(self, of: tuple[int, ...]) -> tuple[int, ...]:
        """Of scale and zero point, for a tensor of shape `of`."""
        if self.grain == "tensor":
            return ()
        axis = self.grain[1] % len(of)
        return (of[axis],) if self.grain[0] == "axis" else tuple(-(-d // self.grain[2]) if i == axis else d for i, d in enumerate(of))

    @property
    def attributes(self) -> dict[str, int]:
        if self.grain == "tensor":
            return {}
        return {"axis": self.grain[1]} | ({"block_size": self.grain[2]} if self.grain[0] == "block" else {})


class Graph:
    """Nodes and tensors of one case, with names of its own; `x` is the model's input."""

    def __init__(self, prefix: str) -> None:
        self.prefix, self.nodes, self.tensors = prefix, [], []
        self.count = itertools.count()

    def name(self) -> str:
        return f"{self.prefix}.{next(self.count)}"

    def tensor(self, array: Any, dtype: str = "float32") -> str:
        name, array = self.name(), np.asarray(array)
        self.tensors.append(
            helper.make_tensor(name, getattr(TensorProto, {"float32": "FLOAT"}.get(dtype, dtype.upper())), array.shape, array.reshape(-1).tolist())
        )
        return name

    def op(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = self.name()
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=f"node {name}", **attributes))
        return name

    def parameters(self, stated: Stated, of: tuple[int, ...], reach: float = 3.0) -> list[str]:
        """Scale and zero point under which the type holds about [-reach, reach]; saturation does some work."""
        shape, (low, high) = stated.shape(of), BITS[stated.dtype]
        scale = np.float32(2 * reach / (high - low)) * RNG.uniform(0.6, 1.1, shape).astype(np.float32)
        middle = (low + high + 1) // 2
        zero = middle + RNG.integers(-((high - low) // 6), (high - low) // 6 + 1, shape)
        name = self.tensor(scale)
        if stated.runtime:  # a factor that is 1 whatever the input
            name = self.op("Mul", name, self.op("Exp", self.op("Mul", self.op("ReduceMax", "x", keepdims=0), self.tensor(0.0))))
        return [name, self.tensor(zero, stated.dtype)]

    def pair(self, x: str, scale: float, zero: int, dtype: str = "uint8") -> str:
        names = [self.tensor(np.float32(scale)), self.tensor(zero, dtype)]
        return self.op("DequantizeLinear", self.op("QuantizeLinear", x, *names), *names)

    def weights(self, stated: Stated, shape: tuple[int, ...]) -> str:
        low, high = BITS[stated.dtype]
        parameters = self.parameters(stated, shape, 0.5)
        return self.op("DequantizeLinear", self.tensor(RNG.integers(low, high + 1, shape), stated.dtype), *parameters, **stated.attributes)


def integers(g: Graph, s: Stated) -> str:
    return g.op("QuantizeLinear", "x", *g.parameters(s, SHAPE), **s.attributes)


def relu(g: Graph, s: Stated) -> str:
    parameters = g.parameters(s, SHAPE)
    return g.op("Relu", g.op("DequantizeLinear", g.op("QuantizeLinear", "x", *parameters, **s.attributes), *parameters, **s.attributes))


def cast(g: Graph, s: Stated) -> str:
    return g.op("Mul", g.op("Cast", integers(g, s), to=TensorProto.FLOAT), g.tensor(0.5))


def transposed(g: Graph, s: Stated) -> str:
    """Integers that move between both nodes; the axis moves along."""
    scale, zero = g.parameters(s, SHAPE)
    q = g.op("Transpose", g.op("QuantizeLinear", "x", scale, zero, **s.attributes), perm=[0, 2, 3, 1])
    if s.grain == "tensor":
        return g.op("DequantizeLinear", q, scale, zero)
    moved = {"axis": [0, 2, 3, 1].index(s.grain[1] % 4)}
    if s.grain[0] == "block":
        moved["block_size"] = s.grain[2]
        scale, zero = (g.op("Transpose", n, perm=[0, 2, 3, 1]) for n in (scale, zero))
    return g.op("DequantizeLinear", q, scale, zero, **moved)


def conv(g: Graph, s: Stated) -> str:
    return g.pair(g.op("Conv", g.pair("x", 0.02, 120), g.weights(s, (4, 8, 3, 3)), pads=[1, 1, 1, 1]), 0.1, 120)


def matmul(g: Graph, s: Stated) -> str:
    return g.pair(g.op("MatMul", g.pair("x", 0.02, 3, "int8"), g.weights(s, (6, 5))), 0.05, 0, "int8")


def gemm(g: Graph, s: Stated) -> str:
    flat = g.op("Reshape", g.pair("x", 0.02, 120), g.tensor([12, 48], "int64"))
    return g.pair(g.op("Gemm", flat, g.weights(s, (5, 48)), transB=1), 0.1, 130)


def moved_weights(g: Graph, s: Stated) -> str:
    """Behind a Reshape and a Transpose."""
    w = g.op("Transpose", g.op("Reshape", g.weights(s, (4, 72)), g.tensor([4, 3, 3, 8], "int64")), perm=[0, 3, 1, 2])
    return g.pair(g.op("Conv", g.pair("x", 0.02, 120), w), 0.1, 120)


def weight_only(g: Graph, s: Stated) -> str:
    return g.op("MatMul", "x", g.weights(s, (6, 5)))


ACTIVATIONS: dict[str, Callable[[Graph, Stated], str]] = {f.__name__: f for f in (integers, relu, cast, transposed)}
WEIGHTS: dict[str, tuple[Callable[[Graph, Stated], str], tuple[int, ...]]] = {
    "conv": (conv, (4, 8, 3, 3)), "matmul": (matmul, (6, 5)), "gemm": (gemm, (5, 48)), "moved_weights": (moved_weights, (4, 72)),
    "weight_only": (weight_only, (6, 5)),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    form: str
    stated: Stated
    graph: Graph
    output: str

    def __str__(self) -> str:
        return f"{self.form}-{self.stated}"


def grains(opset: int, shape: tuple[int, ...]) -> list[Any]:
    found: list[Any] = ["tensor", *(("axis", k) for k in range(len(shape))), ("axis", -1)]
    return found + ([("block", 1, 2), ("block", len(shape) - 1, 4)] if opset >= 21 else [])


def cases(opset: int) -> Iterator[Case]:
    """All that an operator set can state."""
    types = [t for t in BITS if opset >= 21 or t not in NEW]
    count = itertools.count()

    def made(form: str, make: Callable[[Graph, Stated], str], stated: Stated) -> Case:
        graph = Graph(f"c{next(count)}")
        return Case(form, stated, graph, make(graph, stated))

    for dtype in types:
        for grain in grains(opset, SHAPE):
            for form, make in ACTIVATIONS.items():
                yield made(form, make, Stated(dtype, grain))
        for grain in ["tensor", ("axis", 1), ("block", 2, 2)][: 3 if opset >= 21 else 2]:
            for form in ("integers", "relu"):
                yield made(form, ACTIVATIONS[form], Stated(dtype, grain, runtime=True))
        for form, (make, shape) in WEIGHTS.items():
            for grain in grains(opset, shape):
                yield made(form, make, Stated(dtype, grain))


def model(chosen: list[Case], opset: int) -> onnx.ModelProto:
    """All cases in one model, a result each."""
    results = [helper.make_empty_tensor_value_info(c.output) for c in chosen]
    nodes, tensors = ([i for c in chosen for i in getattr(c.graph, part)] for part in ("nodes", "tensors"))
    graph = helper.make_graph(nodes, "cases", [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)], results, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
