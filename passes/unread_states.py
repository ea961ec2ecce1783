"""Recurrent layers hand out no last states that nobody reads: those are in float32, and all results of a layer have one type.

    states = recurrence(x, ..., finals=2);  y = states[0:T]     -->     states = recurrence(x, ..., finals=0)

Exporters stack the last states of all layers; `simplify` reads those that are taken out again from their own layer, and the slice that is left here goes too.
"""

from __future__ import annotations

import tvm

from qcompiler.passes.graph import Graph, make_op, match_op, relax_op, shape_of, slice_ranges
from qcompiler.passes.rewrite import Rewrite


def unread_states(module: tvm.IRModule) -> tvm.IRModule:
    rewrite = Rewrite(module)
    for name, expr in rewrite:
        own = match_op(expr)
        if own is not None and own[0] == "qc.f32.recurrence" and own[2]["finals"]:
            _, operands, attrs = own
            steps, *rest = shape_of(expr)
            read = _read(rewrite.graph, name, rewrite.uses[name], steps)
            finals = max(0, read - (steps - attrs["finals"]))
            if finals < attrs["finals"] and (finals or attrs["sequence"]):
                shape = (steps - attrs["finals"] + finals, *rest)
                expr = make_op("qc.f32.recurrence", operands, attrs | {"finals": finals}, shape, "float32")
        rewrite.keep(name, expr)
    return rewrite.done()


def _read(graph: Graph, name: str, readers: list[str], steps: int) -> int:
    """How many of the rows of `name`, from the first on, its readers see."""
    values, seen = graph.values(), 0
    for reader in readers:
        expr = values.get(reader)
        taken = slice_ranges(expr) if relax_op(expr) == "relax.strided_slice" else None
        rows = range(steps) if taken is None else taken[0]
        seen = max(seen, *(row + 1 for row in (rows[0], rows[-1]))) if rows else seen
    return seen
