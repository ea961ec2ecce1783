"""Small networks and a small plan, for tests of groups, insert_qdq, realize and select_float."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm
from onnx_nets import compiled
from tvm import relax

from qcompiler.numerics.spec import QParams
from qcompiler.passes.graph import Graph, GraphBuilder, const, dtype_of, shape_of, substitute
from qcompiler.passes.groups import Group, find_groups
from qcompiler.passes.legal_layouts import legal_layouts

NHWC = {"data_layout": "NHWC", "kernel_layout": "OHWI", "out_layout": "NHWC"}
NHWC_T = {"data_layout": "NHWC", "kernel_layout": "IHWO", "out_layout": "NHWC"}
op = relax.op


class Net:
    """A `GraphBuilder` with random constants: `net.add("name", expression)`."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.builder = GraphBuilder()

    def input(self, name: str, *shape: int, dtype: str = "float32") -> Any:
        return self.builder.input(name, shape, dtype)

    def add(self, name: str, expr: Any) -> Any:
        return self.builder.emit(name, expr)

    def random(self, *shape: int, spread: float = 1.0) -> Any:
        return const((self.rng.standard_normal(shape) * spread).astype(np.float32))

    def slopes(self, channels: int) -> Any:
        """Of a prelu: negative ones, and above 1."""
        return const(self.rng.uniform(-0.5, 1.5, channels).astype(np.float32))

    def conv(self, name: str, x: Any, out: int, kernel: int = 3, *, bias: bool = True, groups: int = 1, **attrs: Any) -> Any:
        pad = attrs.pop("padding", (kernel // 2,) * 4)
        weight = self.random(out, kernel, kernel, shape_of(x)[3] // groups, spread=(kernel * kernel * shape_of(x)[3] // groups) ** -0.5)
        y = self.add(name, op.nn.conv2d(x, weight, padding=pad, groups=groups, **attrs, **NHWC))
        return self.add(f"{name}_b", op.add(y, self.random(1, 1, 1, out, spread=0.3))) if bias else y

    def done(self, *outputs: Any) -> tvm.IRModule:
        return self.builder.finish([(f"out{i}", v) for i, v in enumerate(outputs)])


def scalar(value: float) -> Any:
    return const(np.float32(value))


def in_float(x: Any) -> Any:
    """An operator without an integer form: a softmax over the first axis."""
    return op.nn.softmax(x, axis=0)


def one_op(make: Callable[[Net, Any], Any], shape: Sequence[int] = (1, 6, 7, 8)) -> tvm.IRModule:
    """x -> `make(net, x)` -> softmax over the first axis, which stays float, so that the operator's output is neither a network input nor output."""
    net = Net(3)
    y = make(net, net.input("x", *shape))
    return net.done(net.add("soft", in_float(y)))


def residual_net(seed: int = 0) -> tvm.IRModule:
    """NCHW input, stem, two residual blocks (one with a projection, one depthwise), hard-swish, squeeze-excite, pooling, a dense head."""
    net = Net(seed)
    x = net.add("nhwc", op.permute_dims(net.input("image", 1, 3, 12, 12), [0, 2, 3, 1]))
    x = net.add("stem_r", op.nn.relu(net.conv("stem", x, 8, strides=2)))
    a = net.conv("a2", net.add("a1_r", op.clip(net.conv("a1", x, 8), 0.0, 6.0)), 16, 1)
    x = net.add("block_a", op.nn.relu(net.add("sum_a", op.add(a, net.conv("skip", x, 16, 1)))))
    b = net.conv("b2", net.add("b1_r", op.nn.relu(net.conv("b1", x, 16, groups=16))), 16, 1)
    x = net.add("block_b", op.add(x, b))
    h = net.add("h1", op.clip(net.add("h0", op.add(x, scalar(3))), 0.0, 6.0))
    x = net.add("swish", op.divide(net.add("h2", op.multiply(x, h)), scalar(6)))
    s = net.add("gate", op.sigmoid(net.conv("squeeze", net.add("mean", op.mean(x, [1, 2], True)), 16, 1)))
    x = net.add("excited", op.multiply(x, s))
    p = net.add("max", op.nn.max_pool2d(x, (2, 2), (2, 2), layout="NHWC"))
    q = net.add("avg", op.nn.avg_pool2d(x, (2, 2), (2, 2), layout="NHWC"))
    x = net.add("flat", op.reshape(net.add("cat", op.concat([p, q], axis=3)), (1, 3 * 3 * 32)))
    return net.done(net.add("logits", op.add(net.add("product", op.matmul(x, net.random(288, 10, spread=0.06))), net.random(10))))


def evaluate(module: tvm.IRModule, inputs: dict[str, np.ndarray], keep: Sequence[str], given: Mapping[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """Values `keep` of a module without qc.* calls, computed by TVM. Readers of a value in `given` see the given array instead of the
    computed one."""
    graph, given = Graph.of(module), given or {}
    builder = GraphBuilder()
    env = {str(p.name): builder.input(str(p.name), shape_of(p), dtype_of(p)) for p in graph.inputs}
    feed = [inputs[k] for k in env]
    computed = dict(env)
    for name, expr in graph.bindings:
        env[name] = computed[name] = builder.emit(name, substitute(expr, lambda v: env[str(v.name)]))
        if name in given:
            env[name] = builder.input(f"{name}~given", given[name].shape, str(given[name].dtype))
            feed.append(given[name])
    wanted = [k for k in keep if k not in inputs]
    results = compiled(legal_layouts(builder.finish([(k, computed[k]) for k in wanted])))(*feed)
    return {**inputs, **dict(zip(wanted, results, strict=True))}


@dataclass
class TinyPlan:
    """Min-max ranges of the float values over given inputs; max-scaled weights. `skip`: {group id: reason}."""

    module: tvm.IRModule
    inputs: dict[str, np.ndarray]
    skip: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, QParams | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.groups: dict[str, Group] = {g.id: g for g in find_groups(self.module)}
        values = evaluate(self.module, self.inputs, list(self.groups))
        ranges = {k: (float(v.min()), float(v.max())) for k, v in values.items() if v.dtype == np.float32}
        given = dict(self.parameters)
        for name in self.inputs:
            self.parameters[name] = QParams.from_range(*ranges[name])
        readers = Graph.of(self.module).consumers()
        for group in self.groups.values():
            inputs = [self.parameters.get(i) for i in group.inputs]
            if group.traits.accumulates and set(readers[group.id]) == {"<output>"}:
                self.parameters[group.id] = None
            elif group.traits.keeps and len(inputs) == 1:
                self.parameters[group.id] = inputs[0]
            elif group.id in ranges:
                self.parameters[group.id] = QParams.from_range(*ranges[group.id])
        self.parameters |= given

    def params(self, value_id: str) -> QParams | None:
        return self.parameters.get(value_id)

    def constant(self, group_id: str) -> QParams | None:
        return None

    def weight(self, group_id: str) -> tuple[np.ndarray, np.ndarray]:
        weight = self.groups[group_id].weight
        assert weight is not None
        axes = tuple(range(1, weight.ndim))
        scale = np.maximum(np.abs(weight).max(axes), 1e-9).astype(np.float64) / 127
        return np.rint(weight / scale.reshape(-1, *[1] * len(axes))).astype(np.int8), scale

    def reason(self, group_id: str) -> str | None:
        return self.skip.get(group_id)


def random_inputs(module: tvm.IRModule, seed: int = 7) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {str(p.name): rng.standard_normal(shape_of(p)).astype(np.float32) for p in Graph.of(module).inputs}
