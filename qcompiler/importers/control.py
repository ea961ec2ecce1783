"""Order and control flow of an ONNX graph, decided when compiling: nodes sorted, a known branch taken, loops of known length unrolled. Of a branch that is
decided at run time both are computed."""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import onnx
from tvm import relax

from qcompiler.base.errors import ModelError
from qcompiler.importers.nodes import Beyond, Node, Refused, Value, is_tensor, real
from qcompiler.passes.graph import dtype_of, shape_of
from qcompiler.passes.trained import ATTRIBUTE

UNROLLED = 20_000  # nodes that a loop may become
ROUNDS = "Export its body as a model of its own, and call that once a round; what a round hands to the next can stay in the session (--state INPUT=OUTPUT)"


class Importer(Protocol):
    """Takes nodes one at a time; `values`: tensor name -> what it is."""

    where: str
    values: dict[str, Value]

    def constants(self, graph: onnx.GraphProto, names: Mapping[str, str]) -> None: ...
    def nodes(self, nodes: Iterable[onnx.NodeProto]) -> None: ...


def reads(proto: onnx.NodeProto) -> set[str]:
    """The tensors that a node reads, in its subgraphs too where those don't define them."""
    found = {name for name in proto.input if name}
    for graph in subgraphs(proto):
        inner = {name for node in graph.node for name in reads(node)} | {o.name for o in graph.output}
        found |= inner - {name for node in graph.node for name in node.output} - {t.name for t in graph.initializer} - {v.name for v in graph.input}
    return found


def captured(graph: onnx.GraphProto) -> set[str]:
    """The tensors of a graph that subgraphs of its nodes read."""
    return {name for node in graph.node for name in reads(node) - set(node.input)}


def in_order(nodes: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    """The nodes, each behind those whose results it reads, otherwise in the file's order; what stands in a circle comes last."""
    maker = {name: i for i, node in enumerate(nodes) for name in node.output if name}
    waits = [{maker[name] for name in reads(node) if name in maker} - {i} for i, node in enumerate(nodes)]
    if all(w < i for i, before in enumerate(waits) for w in before):
        return list(nodes)
    after: dict[int, list[int]] = {}
    for i, before in enumerate(waits):
        for w in before:
            after.setdefault(w, []).append(i)
    left = [len(before) for before in waits]
    ready, order = [i for i, n in enumerate(left) if n == 0], []
    while ready:
        i = heapq.heappop(ready)
        order.append(i)
        for j in after.get(i, []):
            left[j] -= 1
            if left[j] == 0:
                heapq.heappush(ready, j)
    return [nodes[i] for i in [*order, *(i for i, n in enumerate(left) if n > 0)]]


def subgraphs(proto: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [g for a in proto.attribute for g in ([a.g] if a.HasField("g") else a.graphs)]


def renamed(proto: onnx.NodeProto, names: Mapping[str, str]) -> onnx.NodeProto:
    """A copy of a node with its tensors renamed, in its subgraphs too where those don't define them."""
    copy = onnx.NodeProto()
    copy.CopyFrom(proto)
    for tensors in (copy.input, copy.output):
        for i, name in enumerate(tensors):
            tensors[i] = names.get(name, name)
    for graph in subgraphs(copy):
        own = {t.name for t in graph.initializer} | {v.name for v in graph.input} | {o for n in graph.node for o in n.output}
        visible = {k: v for k, v in names.items() if k not in own}
        for i, node in enumerate(graph.node):
            graph.node[i].CopyFrom(renamed(node, visible))
        for output in graph.output:
            output.name = visible.get(output.name, output.name)
    return copy


def inlined(importer: Importer, graph: onnx.GraphProto, rename: Callable[[str], str], operands: Sequence[Value] = ()) -> list[Value]:
    """The results of a subgraph whose nodes are taken in place, its own names renamed, its inputs bound to `operands`."""
    local = [v.name for v in graph.input] + [t.name for t in graph.initializer] + [o for n in graph.node for o in n.output if o]
    names = {name: rename(name) for name in local}
    for info, value in zip(graph.input, operands, strict=True):
        importer.values[names[info.name]] = value
    importer.constants(graph, names)
    importer.nodes([renamed(proto, names) for proto in in_order(graph.node)])
    return [importer.values[names.get(v.name, v.name)] for v in graph.output]


def branch(importer: Importer, node: Node) -> list[Value]:
    """An If: the branch of a condition that is known, else both, and a choice of each result."""
    condition, (then, otherwise) = node.inputs[0], (node.attrs.get(f"{which}_branch") for which in ("then", "else"))
    if not isinstance(condition, np.ndarray):
        return _both(importer, node, then, otherwise)
    outer = dict(importer.values)
    graph = then if condition.all() else otherwise
    if not isinstance(graph, onnx.GraphProto):
        raise Refused("it has no graph for the branch that its condition takes")
    return inlined(importer, graph, lambda name: node.builder.naming.made(node.id, name) if name in outer else name)


def _both(importer: Importer, node: Node, *graphs: onnx.GraphProto | None) -> list[Value]:
    """`where(condition, then, else)` of every result: both branches are computed, so neither may be one that only its condition lets run."""
    source, made = node.proto.input[0], node.builder.naming.made
    decided = "If it depends on an input that is the same in every call, fix that with --input-value NAME=VALUE"
    why = f"which branch it takes is computed at run time (from '{source}'), so both are computed"
    if math.prod(node.shape()) != 1:
        raise Refused(f"its condition has shape {list(node.shape())}; supported: one element")
    found = list[list[Value]]()
    try:
        for which, graph in zip(("then", "else"), graphs, strict=True):
            if graph is None:
                raise Refused(f"it has no {which} branch")
            found.append(inlined(importer, graph, functools.partial(made, made(node.id, which))))
    except ModelError as error:
        inner = str(error).removeprefix(f"{importer.where}: ")
        raise Beyond(f"{why}, and its {which} branch can't be: {inner}. {decided}") from error
    condition, results = node.tensor(0), list[Value]()
    for name, pair in zip(node.outputs, zip(*found, strict=True), strict=True):
        if not all(is_tensor(v) for v in pair):
            raise Beyond(f"{why}, and its result '{name}' is no tensor. {decided}")
        arrays = [v if isinstance(v, np.ndarray) else None for v in pair]
        kinds = [f"{real(v).dtype} {list(v.shape)}" if isinstance(v, np.ndarray) else f"{dtype_of(v)} {list(shape_of(v))}" for v in pair]
        if kinds[0] != kinds[1]:
            raise Beyond(f"{why}, and its result '{name}' is {kinds[0]} in one and {kinds[1]} in the other; supported: the same in both. {decided}")
        if pair[0] is pair[1] or (arrays[0] is not None and arrays[1] is not None and arrays[0].tobytes() == arrays[1].tobytes()):
            results.append(pair[0])
            continue
        if shape_of(condition):
            condition = node.emit("condition", relax.op.reshape(condition, ()))
        sides = [node.variable(which, v) for which, v in zip(("then", "else"), pair, strict=True)]
        results.append(relax.op.where(condition, *sides))
    node.builder.note(ATTRIBUTE, f"node '{node.proto.name or node.id}' (If): {why} in every call. {decided}: then only its branch is")
    return results


@dataclass
class _Unroller:
    importer: Importer
    node: Node
    count: int = 0

    def step(self, graph: onnx.GraphProto, operands: Sequence[Value]) -> list[Value]:
        """One round of the loop's body."""
        naming = self.node.builder.naming
        here = naming.made(self.node.id, self.count)
        self.count += 1
        if self.count * max(len(graph.node), 1) > UNROLLED:
            raise Refused(f"unrolled, it has more than {UNROLLED} nodes after {self.count} rounds; supported: loops of fewer nodes in all. {ROUNDS}")
        return inlined(self.importer, graph, lambda name: naming.made(here, name), operands)

    def stacked(self, rows: list[Value], axis: int) -> Value:
        """What each round yields, side by side along a new axis."""
        if not rows:
            raise Refused("its body never runs, so the shape of what it collects is unknown")
        if all(isinstance(r, np.ndarray) for r in rows):
            return np.stack(rows, axis)
        node = self.node
        parts = [node.variable(f"row{i}", np.expand_dims(r, axis) if isinstance(r, np.ndarray) else relax.op.expand_dims(r, axis)) for i, r in enumerate(rows)]
        return parts[0] if len(parts) == 1 else node.emit("rows", relax.op.concat(parts, axis))


def loop(importer: Importer, node: Node) -> list[Value]:
    """A Loop whose trip count and conditions are known, unrolled."""
    unroller, graph = _Unroller(importer, node), node.attrs["body"]
    try:
        trips, going = (node.constant(i, what) for i, what in ((0, "trip count"), (1, "condition")))
    except Refused as reason:
        raise Beyond(f"{reason}. {ROUNDS}") from reason
    carried, collected = list(node.inputs[2:]), [list[Value]() for _ in range(len(graph.output) - 1 - len(node.inputs[2:]))]
    rounds = 0
    while (trips is None or rounds < int(trips.reshape(-1)[0])) and (going is None or bool(going.all())):
        going, *rest = unroller.step(graph, [np.asarray(rounds, np.int64), np.asarray(True), *carried])
        if not isinstance(going, np.ndarray):
            raise Beyond(
                f"how often it runs depends on data: its condition is computed at run time; supported: loops whose length is known when compiling. {ROUNDS}"
            )
        carried, rows = rest[: len(carried)], rest[len(carried) :]
        for column, row in zip(collected, rows, strict=True):
            column.append(row)
        rounds += 1
    return [*carried, *(unroller.stacked(rows, 0) for rows in collected)]


def scan(importer: Importer, node: Node) -> list[Value]:
    """A Scan over axes of known length, unrolled."""
    if node.opset < 9:
        raise Refused("Scan of operator set 8 has a batch axis of its own; supported: Scan since operator set 9")
    unroller, graph, count = _Unroller(importer, node), node.attrs["body"], int(node.attrs["num_scan_inputs"])
    states = len(node.inputs) - count
    outputs = len(graph.output) - states
    carried, scanned = list(node.inputs[:states]), node.inputs[states:]
    axes = [node.axis(int(a), len(node.shape(states + i))) for i, a in enumerate(node.attrs.get("scan_input_axes", [0] * count))]
    backwards = list(node.attrs.get("scan_input_directions", [0] * count))
    length = node.shape(states)[axes[0]]
    collected = [list[Value]() for _ in range(outputs)]
    for i in range(length):
        rows = []
        for k, (x, axis) in enumerate(zip(scanned, axes, strict=True)):
            at = length - 1 - i if backwards[k] else i
            if isinstance(x, np.ndarray):
                rows.append(np.take(x, at, axis))
            else:
                part = node.emit(f"part{k}-{i}", relax.op.strided_slice(x, [axis], [at], [at + 1]))
                rows.append(node.emit(f"scanned{k}-{i}", relax.op.squeeze(part, [axis])))
        results = unroller.step(graph, [*carried, *rows])
        carried = results[:states]
        for column, row in zip(collected, results[states:], strict=True):
            column.append(row)
    turned = node.attrs.get("scan_output_directions", [0] * outputs)
    places = node.attrs.get("scan_output_axes", [0] * outputs)
    finished = [rows[::-1] if turn else rows for rows, turn in zip(collected, turned, strict=True)]
    return [*carried, *(unroller.stacked(rows, _place(rows, int(axis))) for rows, axis in zip(finished, places, strict=True))]


def _place(rows: list[Value], axis: int) -> int:
    rank = len(rows[0].shape if isinstance(rows[0], np.ndarray) else rows[0].ty.shape) + 1 if rows else 1
    return axis % rank


CONTROL: dict[str, Callable[[Any, Node], list[Value]]] = {"If": branch, "Loop": loop, "Scan": scan}
