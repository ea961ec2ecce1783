"""Residual streams in 16 bits, and the copies of them that matrix products read in 8.

    dense(x, w)      -->      dense(multiply(x, ones), w)          x in a stream; the product is the value `x~copy`

A stream is what normalizations read, or hand out of the network, and what adds up to it: the sums, the residuals of layers, and what moves their data.
Every layer of a transformer adds to it, so that the rounding of 8 bits would add up too. No dot product reads 16-bit numbers: those that read a stream get
one copy, whose channels have freely chosen scales (`qcompiler/refine/equalization.py`): its factors become the multipliers of a `qc.requantize`.

Convolutional networks have residual streams too, which lose less: there 16 bits are a choice (`with_wide_residuals`). Sums read the stream, convolutions and
pools the copy.

Works on the canonical float module, which computes the same; what quantizes must follow.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import tvm
from tvm import relax

from qcompiler.passes.graph import Graph, GraphBuilder, const, const_value, dtype_of, is_const, relax_op, shape_of, substitute
from qcompiler.passes.groups import SIXTEEN, STREAMS, Group, find_groups
from qcompiler.passes.trained import Trained

COPY = "copy"


def stream_values(groups: Sequence[Group], stated: frozenset[str] = frozenset(), outputs: frozenset[str] = frozenset()) -> set[str]:
    """The values that are worth 16 bits. stated: those that the model file rounds itself, which stay as they are. outputs: of the network; what a normalization
    hands out is worth them too, whoever else reads it."""
    made_by = {g.id: g for g in groups}
    movers: dict[str, list[str]] = defaultdict(list)  # what has its operand's numbers
    for group in groups:
        if group.traits.moves and group.reason is None:
            for value in group.inputs:
                movers[value].append(group.id)
    found: set[str] = set()
    normalizations = [g for g in groups if g.traits.normalizes and g.reason is None]
    front = [g.inputs[0] for g in normalizations] + [g.id for g in normalizations if g.id in outputs]
    while front:
        value = front.pop()
        maker = made_by.get(value)
        if value in found or value in stated or (maker is not None and not _holds(maker)):
            continue
        found.add(value)
        front += movers[value]
        if maker is not None and (maker.traits.sums or maker.traits.moves):
            front += maker.inputs
        if maker is not None and maker.residual:
            front.append(maker.residual)
    moved = {g.id: g.inputs[0] for g in groups if g.traits.moves and not g.traits.joins and g.inputs}
    while eight := {value for value in found if moved.get(value, value) not in found}:  # the numbers of a value in 8 bits, moved
        found -= eight
    return found | (_bent(groups, made_by) - stated if found else set())


def _bent(groups: Sequence[Group], made_by: Mapping[str, Group]) -> set[str]:
    """What goes into and comes out of a function between two matrix products (GELU, SiLU): few channels of it reach far, and a copy of it may scale them."""
    read = {g.inputs[0] for g in groups if g.kind == "dense" and g.reason is None}
    bent = [g for g in groups if g.kind == "unary" and g.reason is None and g.id in read]
    return {v for g in bent if (maker := made_by.get(g.inputs[0])) is not None and maker.kind == "dense" and _holds(maker) for v in (g.id, g.inputs[0])}


def _holds(maker: Group) -> bool:
    """Can the integer form of a group write 16 bits?"""
    return maker.reason is None and maker.traits.writes_wide


def residual_values(groups: Sequence[Group], stated: frozenset[str] = frozenset()) -> set[str]:
    """The values that sums of two tensors read, where what writes them can write 16 bits: the residual streams of a convolutional network."""
    made_by = {g.id: g for g in groups}
    sums = [g for g in groups if g.reason is None and (g.residual or (g.traits.sums and g.weight is None))]
    front, found = [v for g in sums for v in (g.inputs if g.traits.sums else (g.residual,)) if v], set[str]()
    carried = _carried(groups)
    while front:
        value = front.pop()
        while (maker := made_by.get(value)) is not None and value in carried[maker.inputs[0] if maker.inputs else ""]:
            value = maker.inputs[0]
        if maker is None or maker.traits.keeps or not _holds(maker):
            continue
        moved = with_moved([value], groups)
        if stated.isdisjoint(moved):
            found.update(moved)
    return found


def with_moved(values: Iterable[str], groups: Iterable[Group]) -> list[str]:
    """The values, and what has their numbers, moved: one quantization for all."""
    carried, found = _carried(groups), list(values)
    for name in found:
        found += carried[name]
    return list(dict.fromkeys(found))


def _carried(groups: Iterable[Group]) -> Mapping[str, list[str]]:
    """A value -> what has its numbers, moved."""
    found = defaultdict[str, list[str]](list)
    for group in groups:
        if group.traits.moves and not group.traits.joins and group.reason is None:
            found[group.inputs[0]].append(group.id)
    return found


def with_copies(module: tvm.IRModule) -> tvm.IRModule:
    """The module with a copy of each value of a stream for the operators that read 8 bits only, and the streams as an attribute; itself without any."""
    graph, groups = Graph.of(module), find_groups(module)
    streams = stream_values(groups, frozenset(Trained.of(graph.attrs).values), frozenset(str(v.name) for _, v in graph.outputs))
    if not streams and not any(g.kind == "attention" and g.reason is None for g in groups):
        return module
    return _copied(module, streams, {STREAMS: sorted(streams)})


def with_wide_residuals(module: tvm.IRModule, values: Mapping[str, str]) -> tvm.IRModule:
    """The module with `values`, some of `residual_values`, in 16 bits, and with copies of them like those of a stream. values: id -> why."""
    known = Graph.of(module).attrs.get(SIXTEEN, {})
    return _copied(module, set(values), {SIXTEEN: dict(sorted({**known, **values}.items()))})


def copied_values(module: tvm.IRModule) -> dict[str, str]:
    """{copy: what it is a copy of, number by number} of a module whose copies have no factors."""
    found = {}
    for name, expr in Graph.of(module).bindings:
        x, factors = expr.args if relax_op(expr) == "relax.multiply" else (None, None)
        if isinstance(x, relax.Var) and is_const(factors) and shape_of(x) == shape_of(expr) and (const_value(factors) == 1).all():
            found[name] = str(x.name)
    return found


def _copied(network: tvm.IRModule, streams: Set[str], attrs: Mapping[str, Any]) -> tvm.IRModule:
    """The module with a copy of each of `streams` for the operators that read 8 bits only, and attributes."""
    graph, groups = Graph.of(network), find_groups(network)
    wanted = {name: (set(g.inputs) - set(g.plain)) & streams for g in groups if g.reason is None and not g.traits.reads_wide for name in g.members}
    builder = GraphBuilder({**graph.attrs, **attrs})
    builder.reserve(name for name, _ in graph.bindings)
    env: dict[str, Any] = {str(p.name): builder.input(str(p.name), shape_of(p), dtype_of(p)) for p in graph.inputs}
    owner = {m: g for g in groups for m in g.members}
    copies: dict[str, Any] = {}

    def copied(variable: Any) -> Any:
        name = str(variable.name)
        if name not in copies:
            ones = const(np.ones(shape_of(variable)[-1], np.float32))
            copies[name] = builder.emit(builder.made(name, COPY), relax.op.multiply(env[name], ones))
        return copies[name]

    for name, expr in graph.bindings:
        copying = wanted.get(name, set()) if relax_op(expr) in owner[name].traits.relax else set()
        env[name] = builder.emit(name, substitute(expr, lambda v, c=copying: copied(v) if str(v.name) in c else env[str(v.name)]))  # type: ignore[misc]
    return builder.finish([(name, env[str(v.name)]) for name, v in graph.outputs])
