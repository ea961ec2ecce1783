"""Calibration for tests: a float module on TVM's own kernels, and tables for plans that need no execution at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tvm
from onnx_nets import compiled

from qcompiler.calibration.table import CalibrationTable, Statistics, Watcher, calibrate
from qcompiler.passes.graph import Graph, GraphBuilder, dtype_of, shape_of, substitute
from qcompiler.passes.groups import find_groups
from qcompiler.plan.planner import observed_ids


@dataclass(frozen=True)
class Port:
    name: str
    shape: tuple[int, ...]
    dtype: str


class ModuleExecutor:
    """A float module on TVM's own kernels."""

    def __init__(self, module: tvm.IRModule) -> None:
        graph = Graph.of(module)
        self.inputs = [Port(str(p.name), shape_of(p), dtype_of(p)) for p in graph.inputs]
        visible = {g.id for g in find_groups(module)}
        self._ids = [n for n, e in graph.bindings if n in visible and hasattr(e.ty, "shape")]
        self._outputs = [(n, str(v.name)) for n, v in graph.outputs]
        builder = GraphBuilder()
        env = {p.name: builder.input(p.name, p.shape, p.dtype) for p in self.inputs}
        for name, expr in graph.bindings:
            env[name] = builder.emit(name, substitute(expr, lambda v: env[str(v.name)]))
        self._main = compiled(builder.finish([(n, env[n]) for n in self._ids]))

    def trace(self, inputs: Mapping[str, np.ndarray], visit: Callable[[str, np.ndarray], None]) -> dict[str, np.ndarray]:
        results = self._main(*[inputs[p.name] for p in self.inputs])
        values = {**inputs, **dict(zip(self._ids, results, strict=True))}
        for name, array in values.items():
            visit(name, array)
        return {name: values[value] for name, value in self._outputs}


def watch(watcher: Watcher, sample: int, value_id: str, array: np.ndarray) -> None:
    """What a pass does for a watcher with a value of its sample number `sample`."""
    seen = watcher.look(sample, value_id, array, None)
    if seen is not None:
        watcher.take(value_id, seen)


def random_samples(module: tvm.IRModule, count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    inputs = Graph.of(module).inputs
    return [{str(p.name): rng.standard_normal(shape_of(p)).astype(np.float32) for p in inputs} for _ in range(count)]


def table_of(module: tvm.IRModule, count: int = 2, watchers: Sequence[Watcher] = ()) -> CalibrationTable:
    """Statistics over `count` random samples."""
    return calibrate(ModuleExecutor(module), random_samples(module, count), ids=observed_ids(module), watchers=watchers)


def sketched_table(module: tvm.IRModule, size: int = 2000) -> CalibrationTable:
    """Statistics that obey the operators without running them: each value is one array of numbers. Convolutions, matrix products and the
    network's inputs give normal numbers; everything elementwise is computed; data movement keeps its operand's numbers."""
    rng = np.random.default_rng(0)
    values = {str(p.name): rng.standard_normal(size) for p in Graph.of(module).inputs}
    for group in find_groups(module):
        operands = [values[v] for v in group.inputs]
        if group.kind == "unary" and group.function is not None:
            result = group.function(operands[0])
        elif group.kind in ("add", "sub", "mul"):
            constant = [] if group.weight is None else [rng.choice(group.weight.reshape(-1), size)]
            a, b = (x[:size] for x in [*operands, *constant])
            result = {"add": a + b, "sub": a - b, "mul": a * b}[group.kind]
        elif group.kind == "concat":
            result = np.concatenate(operands)
        elif group.traits.keeps:
            result = operands[0]
        else:
            result = rng.standard_normal(size) if group.reason is None else rng.uniform(0, 1, size)
        values[group.id] = np.clip(result, group.low, group.high) if (group.low, group.high) != (None, None) else result
    table = CalibrationTable(samples=1)
    for name in observed_ids(module):
        table.values[name] = Statistics()
        assert table.values[name].add(values[name].astype(np.float32))
    return table
