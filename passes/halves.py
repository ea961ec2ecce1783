"""Operands of matrix products in 16 bits, as two halves of 8.

    dense(x, w)      -->      dense(lower, w) + dense(upper, w),      upper = multiply(x, ones),  lower = subtract(x, upper)

In float `lower` is 0. In integers x has 16 bits, `upper` is x in steps of 256, and `lower` what that leaves, so that both products together are exact: the
second takes the first as its residual, in 16 bits. No dot product reads 16-bit numbers; this is what takes their place where 8 bits lose too much, at the price
of computing a layer twice.

Works on the canonical float module with copies of its streams (`streams.py`), equalized or not; what measures its values must follow.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from tvm import relax

from qcompiler.passes.graph import Graph, GraphBuilder, const, dtype_of, relax_op, shape_of, substitute
from qcompiler.passes.groups import STREAMS, Group, find_groups

HALVES = "qc.halves"
"""Attribute: {value in 16 bits: [its upper half, its lower half]}."""


@dataclass(frozen=True)
class Division:
    """A value that can be read in halves. chain: its id, and those of views of it, up to what the layers read. layers: dense, in order."""

    chain: tuple[str, ...]
    layers: tuple[Group, ...]

    @property
    def read(self) -> str:
        return self.chain[-1]


def divisible(module: tvm.IRModule) -> dict[str, Division]:
    """By value id, what can be read in halves: of a network with streams, written by what can write 16 bits, and read in 8 by dense layers alone that have no
    clamp of their own."""
    graph, groups = Graph.of(module), find_groups(module)
    if STREAMS not in graph.attrs:
        return {}
    readers: dict[str, list[Group]] = {str(v.name): [] for _, v in graph.outputs}
    taken = {*graph.attrs[STREAMS], *readers, *(half for pair in graph.attrs.get(HALVES, {}).values() for half in pair)}
    for group in groups:
        for value in dict.fromkeys(group.operands):
            readers.setdefault(value, []).append(group)
    found: dict[str, Division] = {}
    for group in groups:
        chain = [group.id]
        while len(behind := readers.get(chain[-1], [])) == 1 and behind[0].traits.views and behind[0].reason is None:
            chain.append(behind[0].id)
        fits = group.reason is None and group.traits.writes_wide and not group.traits.keeps and taken.isdisjoint(chain)
        if fits and behind and all(_doubles(g, chain[-1]) for g in behind):
            found[group.id] = Division(tuple(chain), tuple(behind))
    return found


def _doubles(group: Group, value: str) -> bool:
    """Can a group be computed twice, on either half of its operand?"""
    return group.kind == "dense" and group.reason is None and group.inputs[0] == value != group.residual and group.low is None and group.high is None


def in_halves(module: tvm.IRModule, values: Collection[str]) -> tvm.IRModule:
    """The module in which the layers behind `values`, some of `divisible`, read them in halves."""
    graph, known = Graph.of(module), divisible(module)
    chosen = {known[v].read: known[v] for v in values}
    builder = GraphBuilder(graph.attrs)
    builder.reserve(name for name, _ in graph.bindings)
    env: dict[str, Any] = {str(p.name): builder.input(str(p.name), shape_of(p), dtype_of(p)) for p in graph.inputs}
    doubled = {member: g for division in chosen.values() for g in division.layers for member in g.members}
    halves: dict[str, list[str]] = dict(graph.attrs.get(HALVES, {}))
    parts: dict[str, tuple[Any, Any]] = {}
    streams = [*graph.attrs[STREAMS], *(v for division in chosen.values() for v in division.chain)]
    for name, expr in graph.bindings:
        group = doubled.get(name)
        if group is None:
            env[name] = builder.emit(name, substitute(expr, lambda v: env[str(v.name)]))
        elif name != group.id:
            env[name] = builder.emit(name, _upper(expr, group, env, parts))
        else:
            first = builder.emit(builder.made(name, "upper"), _upper(expr, group, env, parts))
            streams.append(str(first.name))
            second = builder.emit(builder.made(name, "lower"), relax.op.matmul(parts[group.inputs[0]][1], _weight(graph.values(), group, env)))
            env[name] = builder.emit(name, relax.op.add(second, first))
        if name in chosen:
            x = env[name]
            upper = builder.emit(builder.made(name, "upper"), relax.op.multiply(x, const(np.ones(shape_of(x)[-1], np.float32))))
            lower = builder.emit(builder.made(name, "lower"), relax.op.subtract(x, upper))
            parts[name], halves[name] = (upper, lower), [str(upper.name), str(lower.name)]
    builder.state(STREAMS, sorted(streams))
    builder.state(HALVES, halves)
    return builder.finish([(name, env[str(v.name)]) for name, v in graph.outputs])


def _upper(expr: Any, group: Group, env: Mapping[str, Any], parts: Mapping[str, tuple[Any, Any]]) -> Any:
    """A binding of the layer, on the upper half of its operand."""
    reads = relax_op(expr) in group.traits.relax
    return substitute(expr, lambda v: parts[str(v.name)][0] if reads and str(v.name) == group.inputs[0] else env[str(v.name)])


def _weight(values: Mapping[str, Any], group: Group, env: Mapping[str, Any]) -> Any:
    """The layer's right operand."""
    product = next(values[m] for m in group.members if relax_op(values[m]) in group.traits.relax)
    return env[str(product.args[1].name)] if isinstance(product.args[1], relax.Var) else product.args[1]
