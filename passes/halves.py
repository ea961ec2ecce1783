"""Operands of convolutions and matrix products in 16 bits, as two halves of 8.

    relu(conv2d(x, w) + b)    -->    relu(conv2d(lower, w) + (conv2d(upper, w) + b)),    upper = multiply(x, ones),  lower = subtract(x, upper)

In float `lower` is 0. In integers x has 16 bits, `upper` is x in steps of 256, and `lower` what that leaves, so that both products together are exact: the
second takes the first as its residual, in 16 bits. No dot product reads 16-bit numbers; this is what takes their place where 8 bits lose too much, at the price
of computing a layer twice. A bias and a residual of the layer's own go with the first product, slopes and clamps with the sum; what is added behind slopes
is an operator of its own then.

Works on the canonical float module, with copies of its streams where it has such (`streams.py`), equalized or not; what measures its values must follow.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tvm
from tvm import relax

from qcompiler.passes.graph import Graph, GraphBuilder, const, dtype_of, relax_op, shape_of, substitute
from qcompiler.passes.groups import SIXTEEN, Group, find_groups, values_in_sixteen
from qcompiler.passes.trained import Trained
from qcompiler.passes.unary import clamp

HALVES = "qc.halves"
"""Attribute: {value in 16 bits: [its upper half, its lower half]}."""


@dataclass(frozen=True)
class Division:
    """A value that can be read in halves. chain: its id, and those of what moves it to the layers that read it; joined: of what it is joined from. layers:
    convolutions and dense layers, in order. makers: the recurrent layers that write it."""

    chain: tuple[str, ...]
    layers: tuple[Group, ...] = ()
    joined: tuple[str, ...] = ()
    makers: tuple[Group, ...] = ()

    @property
    def read(self) -> str:
        return self.chain[-1]

    @property
    def values(self) -> tuple[str, ...]:
        """All that has its 16 bits."""
        return (*self.joined, *self.chain)


def divisible(module: tvm.IRModule) -> dict[str, Division]:
    """By value id, what can be read in halves: an input of the network, what is written by an operator that can write 16 bits, or what several recurrent layers
    write, side by side; read by convolutions or dense layers, and beside them by what reads 16 bits anyway, or float32."""
    graph, groups = Graph.of(module), find_groups(module)
    readers: dict[str, list[Group]] = {str(v.name): [] for _, v in graph.outputs}
    taken = {*(values_in_sixteen(graph.attrs) or ()), *Trained.of(graph.attrs).values, *readers}
    taken |= {half for pair in graph.attrs.get(HALVES, {}).values() for half in pair}
    for group in groups:
        for value in dict.fromkeys((*group.operands, *group.plain)):
            readers.setdefault(value, []).append(group)
    made_by = {g.id: g for g in groups}
    written = [g.id for g in groups if g.reason is None and g.traits.writes_wide and not g.traits.keeps]
    starts = [Division((v,)) for v in [*(str(p.name) for p in graph.inputs if dtype_of(p) == "float32"), *written]]
    starts = [replace(s, makers=(g,)) if (g := made_by.get(s.read)) is not None and g.traits.recurs else s for s in starts]
    starts += [start for g in groups if (start := _joined(g, made_by, readers)) is not None]
    found: dict[str, Division] = {}
    for start in starts:
        chain = [start.read]
        while len(behind := readers.get(chain[-1], [])) == 1 and behind[0].traits.moves and not behind[0].traits.joins and behind[0].reason is None:
            chain.append(behind[0].id)
        layers = [g for g in behind if _doubles(g, chain[-1])]
        division = replace(start, chain=tuple(chain), layers=tuple(layers))
        if layers and taken.isdisjoint(division.values) and all(g in layers or _takes(g, chain[-1]) for g in behind):
            found[start.read] = division
    return found


def _joined(group: Group, made_by: Mapping[str, Group], readers: Mapping[str, Sequence[Group]]) -> Division | None:
    """What begins with a concatenation of results that recurrent layers write for it alone (both directions of one)."""
    if not group.traits.joins or group.reason is not None:
        return None
    values, makers = list[str](), list[Group]()
    for value in group.inputs:
        while len(readers.get(value, ())) == 1 and (maker := made_by.get(value)) is not None and maker.reason is None:
            values.append(value)
            if maker.traits.recurs:
                makers.append(maker)
                break
            if not maker.traits.moves or maker.traits.joins:
                return None
            value = maker.inputs[0]
        else:
            return None
    return Division((group.id,), (), tuple(values), tuple(makers))


def _doubles(group: Group, value: str) -> bool:
    """Can a group be computed twice, on either half of its operand? The second product takes the first as its residual."""
    return group.traits.residual and group.reason is None and group.inputs[0] == value != group.residual


def _takes(group: Group, value: str) -> bool:
    """Can a group read a value in 16 bits, whoever reads its result?"""
    reads = group.traits.reads_wide and (group.traits.joins or not group.traits.moves)
    return group.reason is not None or reads or group.residual == value not in group.inputs


def in_halves(module: tvm.IRModule, values: Mapping[str, str], whole: Collection[str] = ()) -> tvm.IRModule:
    """The module in which the layers behind `values`, some of `divisible`, read them in halves. values: id -> why. whole: layers that read them as they are,
    since they are float."""
    graph, known = Graph.of(module), divisible(module)
    chosen = {d.read: replace(d, layers=layers) for v in values for d in [known[v]] if (layers := tuple(g for g in d.layers if g.id not in whole))}
    values = {division.chain[0]: values[division.chain[0]] for division in chosen.values()}
    bound = graph.values()
    builder = GraphBuilder(graph.attrs)
    builder.reserve(name for name, _ in graph.bindings)
    env: dict[str, Any] = {str(p.name): builder.input(str(p.name), shape_of(p), dtype_of(p)) for p in graph.inputs}
    doubled = {m: g for division in chosen.values() for g in division.layers for m in g.front.members if clamp(bound[m]) is None}
    ends = {g.id: [m for m in g.members if doubled.get(m) is g][-1] for division in chosen.values() for g in division.layers}
    halves: dict[str, list[str]] = dict(graph.attrs.get(HALVES, {}))
    parts: dict[str, tuple[Any, Any]] = {}
    sixteen = {**graph.attrs.get(SIXTEEN, {}), **{v: why for value, why in values.items() for v in known[value].values}}

    def divide(name: str) -> None:
        x = env[name]
        upper = builder.emit(builder.made(name, "upper"), relax.op.multiply(x, const(np.ones(shape_of(x)[-1], np.float32))))
        lower = builder.emit(builder.made(name, "lower"), relax.op.subtract(x, upper))
        parts[name], halves[name] = (upper, lower), [str(upper.name), str(lower.name)]

    for name in chosen.keys() & env.keys():
        divide(name)
    for name, expr in graph.bindings:
        group = doubled.get(name)
        if group is None:
            env[name] = builder.emit(name, substitute(expr, lambda v: env[str(v.name)]))
        elif name != ends[group.id]:
            env[name] = builder.emit(name, _half(expr, group, env, parts, 0))
        else:
            first = builder.emit(builder.made(name, "upper"), _half(expr, group, env, parts, 0))
            sixteen[str(first.name)] = ""
            product = next(bound[m] for m in group.members if relax_op(bound[m]) in group.traits.relax)
            second = builder.emit(builder.made(name, "lower"), _half(product, group, env, parts, 1))
            env[name] = builder.emit(name, relax.op.add(second, first))
        if name in chosen:
            divide(name)
    builder.state(SIXTEEN, dict(sorted(sixteen.items())))
    builder.state(HALVES, halves)
    return builder.finish([(name, env[str(v.name)]) for name, v in graph.outputs])


def _half(expr: Any, group: Group, env: Mapping[str, Any], parts: Mapping[str, tuple[Any, Any]], which: int) -> Any:
    """A binding of the layer, on the upper (0) or the lower (1) half of its operand."""
    reads = relax_op(expr) in group.traits.relax
    return substitute(expr, lambda v: parts[str(v.name)][which] if reads and str(v.name) == group.inputs[0] else env[str(v.name)])
