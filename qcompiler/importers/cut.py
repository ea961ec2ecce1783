"""A network that ends at named values of its own: what stands behind them, such as a tail whose shapes depend on data, is left to whoever runs it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from qcompiler.base.errors import ModelError, closest
from qcompiler.importers.control import reads
from qcompiler.importers.onnx_file import names
from qcompiler.runtime.reference import Elsewhere, OnnxRuntime


@dataclass(frozen=True, eq=False)
class Cut:
    """A `Origin`: another one up to the values `cut`, which are its outputs, in this order. Its float network is compared with ONNX Runtime on what is left."""

    whole: Any
    cut: tuple[str, ...]

    @property
    def where(self) -> str:
        return str(self.whole.where)

    @property
    def name(self) -> str:
        return str(self.whole.name)

    @property
    def files(self) -> list[Path]:
        return list(self.whole.files)

    def read(self) -> tuple[onnx.ModelProto, str]:
        model, digest = self.whole.read()
        return cut_at(self.where, model, self.cut), hashlib.sha256(f"{digest} {self.cut}".encode()).hexdigest()

    def elsewhere(self) -> Elsewhere:
        return OnnxRuntime(self.read()[0].SerializeToString())


def cut_at(where: str, model: onnx.ModelProto, wanted: Sequence[str]) -> onnx.ModelProto:
    """`model` with the outputs `wanted`, without the nodes, inputs and constants that only what stood behind them reads.

    Raises ModelError for a name that no node of the graph computes.
    """
    graph = model.graph
    makers = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
    for name in wanted:
        if name not in makers:
            own = ", ".join(o.name for o in graph.output)
            raise ModelError(f"{where}: outputs: {_why_not(name, model)}.{closest(name, list(makers))} Its own outputs: {own}")
    kept, left = set[int](), [makers[name] for name in wanted]
    while left:
        index = left.pop()
        if index not in kept:
            kept.add(index)
            left += [makers[name] for name in reads(graph.node[index]) if name in makers]
    before, nodes = {name for node in graph.node for name in reads(node)}, [node for index, node in enumerate(graph.node) if index in kept]
    gone = before - {name for node in nodes for name in reads(node)}
    types = {v.name: v for v in (*graph.value_info, *graph.output)}
    outputs = [types.get(name, onnx.ValueInfoProto(name=name)) for name in dict.fromkeys(wanted)]
    found = onnx.ModelProto()
    found.CopyFrom(model)
    parts: list[tuple[Any, list[Any]]] = [
        (found.graph.node, nodes),
        (found.graph.output, outputs),
        (found.graph.value_info, []),
        (found.graph.input, [v for v in graph.input if v.name not in gone]),
        (found.graph.initializer, [t for t in graph.initializer if t.name not in gone]),
        (found.graph.sparse_initializer, [t for t in graph.sparse_initializer if t.values.name not in gone]),
    ]
    for part, kept_of_it in parts:
        del part[:]
        part.extend(kept_of_it)
    return found


def _why_not(name: str, model: onnx.ModelProto) -> str:
    if name in {v.name for v in model.graph.input} | {t.name for t in model.graph.initializer}:
        return f"'{name}' is an input or a constant, which no operator computes"
    if name in set(names(model)) and name not in {node.name for node in model.graph.node}:
        return f"'{name}' is inside of a subgraph; the network can be cut outside of such only"
    return f"no operator computes '{name}'; the names are those of tensors, as a viewer of the model shows them"
