"""The operands that are read in halves, so in 16 bits: those whose rounding to 8 costs the outputs most for the work that a second product takes.

Exact like everything in 8 bits, and cheaper than a layer in float32. The candidates' roundings are measured one by one (`qcompiler/plan/sensitivity.py`);
those that bring most for their work are taken while the recipe allows it: `default` roundings that stand out, for a few percent more work and of networks with
16-bit streams only, `accurate` all that can be felt. States of recurrent layers may take more (`Recipe.states`): what their rounding costs inside of
the layer is not in the measurement, and comes back in every step. Where the outputs lose too much, `float_layers.py` takes more of them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping

import numpy as np

from qcompiler.passes.graph import Graph
from qcompiler.passes.groups import STREAMS, find_groups
from qcompiler.passes.halves import Division, divisible
from qcompiler.passes.sequence import HALVED
from qcompiler.pipeline.goal import decibel
from qcompiler.pipeline.rewritten import rewritten
from qcompiler.pipeline.stages import Measured, QuantizedNetwork, integer_network
from qcompiler.pipeline.survey import BEYOND_NOTICE, ELEMENT, SAMPLES, Survey, estimate
from qcompiler.plan.sensitivity import Sensitivity
from qcompiler.plan.tradeoff import WideCost

_INSIDE = 2  # times what is measured, at least, is lost where 8 bits of states are multiplied in recurrent layers too
_MOVED = 4  # elements written for each of a value that is read in halves: the value, its halves, a partial sum


def candidates(network: QuantizedNetwork) -> dict[str, Division]:
    """What could be read in halves and is stored in 8 bits now, by layers in 8 bits."""
    plan, found = network.plan, divisible(network.model.module)
    stored = {v for v in found if (p := plan.params(v)) is not None and p.dtype == "int8"}
    return {v: d for v, d in found.items() if v in stored and not any(g.id in plan.reasons for g in d.layers)}


def costs(network: QuantizedNetwork, found: Mapping[str, Division], element: float = ELEMENT) -> dict[str, WideCost]:
    """What reading each of `candidates` in halves costs, where writing an element costs `element`."""
    elements = {i.name: math.prod(i.shape) for i in network.model.inputs} | {g.id: math.prod(g.shape) for g in find_groups(network.model.module)}
    return {v: WideCost(tuple(g.id for g in (*d.layers, *d.makers)), _MOVED * element * elements[v]) for v, d in found.items()}


def with_halves(measured: Measured, values: Mapping[str, str], floats: Collection[str] = ()) -> Measured:
    """Statistics of the network with `values`, some of `divisible`, in halves. values: id -> why. floats: the layers that a plan will keep in float."""
    return rewritten(measured, HALVED, "measure halves", values, floats)


def halved(network: QuantizedNetwork) -> QuantizedNetwork:
    """The network with some operands in halves, measured and planned anew; itself where none is worth it. The step's account says how many."""
    job = network.job
    found = candidates(network)
    everywhere = STREAMS in Graph.of(network.model.module).attrs or job.recipe.divides_anywhere
    if not everywhere:
        found = {v: d for v, d in found.items() if d.makers}
    ratio, allowance = job.recipe.halves if everywhere else job.recipe.states
    if not found or not network.measured.table.samples:
        return network
    survey, whole = Survey(network, network.integer), np.maximum(estimate(network), np.finfo(np.float64).tiny)
    if decibel(float(whole.max()) * (1 if everywhere else _INSIDE)) >= BEYOND_NOTICE:
        return network
    alone = network.remembered(
        "values", lambda: survey.value_noise(network.measured.twin.session(), found, SAMPLES).state(), Sensitivity.of_state, sorted(found)
    ).values
    work, _ = survey.work()
    share = {v: float((noise / whole).max()) for v, noise in alone.items()}
    cost = {v: c.seconds + sum(work[n] for n in c.layers) for v, c in costs(network, found).items()}
    total = sum(work.values())
    left, chosen = allowance * total, dict[str, str]()
    for value in sorted(share, key=lambda v: -share[v] / cost[v]):
        if share[value] * total >= ratio * cost[value] and cost[value] <= left:
            left -= cost[value]
            part, more = 100 * min(share[value], 1.0), 100 * cost[value] / total
            chosen[value] = f"its rounding to 8 would be {part:.0f} % of the noise at the outputs, for {more:.1f} % more work (step halves)"
    if not chosen:
        return network
    made = integer_network(with_halves(network.measured, chosen), job.kept)
    more = 100 * sum(cost[v] for v in chosen) / total
    return dataclasses.replace(made, account={**network.account, "halves": f"{operands(len(chosen))} read in 16 bits for {more:.1f} % more work"})


def operands(count: int) -> str:
    return f"{count} operand{'s' if count > 1 else ''}"
