"""The residual streams of a convolutional network in 16 bits, where that is worth the work of writing and copying them.

A sum in 8 bits rounds what all layers before it have added up, and each block rounds it again. Sums are integers all the same, and cheap: only what the streams
hold is written in 16 bits, and once more in 8 for the convolutions that read it. The network is made both ways, and the estimate of both decides.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from qcompiler.passes.graph import Graph
from qcompiler.passes.groups import STREAMS, find_groups
from qcompiler.passes.sequence import RESIDUAL
from qcompiler.passes.streams import residual_values
from qcompiler.passes.trained import Trained
from qcompiler.pipeline.goal import decibel
from qcompiler.pipeline.rewritten import rewritten
from qcompiler.pipeline.stages import Measured, QuantizedNetwork, integer_network
from qcompiler.pipeline.survey import BEYOND_NOTICE, ELEMENT, Survey, worst_estimate

_MOVED = 2  # elements written for each of a stream: one of 16 bits and one of the copy, in place of one


def candidates(network: QuantizedNetwork) -> set[str]:
    """The values of residual streams that the network stores in 8 bits."""
    attrs, params = Graph.of(network.model.module).attrs, network.plan.params
    if STREAMS in attrs:
        return set()
    found = residual_values(find_groups(network.model.module), frozenset(Trained.of(attrs).values))
    return {v for v in found if (p := params(v)) is not None and p.dtype == "int8"}


def with_wide(measured: Measured, values: Mapping[str, str]) -> Measured:
    """Statistics of the network with `values` in 16 bits, which must be such that their operators can write them. values: id -> why."""
    return rewritten(measured, RESIDUAL, "measure residual streams", values)


def widened(network: QuantizedNetwork) -> QuantizedNetwork:
    """The network with its residual streams in 16 bits; itself where that is not worth it. The step's account says what it brings."""
    job, found = network.job, candidates(network)
    ratio, allowance = job.recipe.halves
    if not found or not network.measured.table.samples:
        return network
    survey, before = Survey(network, network.integer), worst_estimate(network)
    elements = {g.id: math.prod(g.shape) for g in find_groups(network.model.module)}
    part = _MOVED * ELEMENT * sum(elements[v] for v in found) / sum(survey.work()[0].values())
    if decibel(before) >= BEYOND_NOTICE or part > allowance:
        return network
    why = f"a residual stream, for {100 * part:.1f} % more work in all (step residuals)"
    made = integer_network(with_wide(network.measured, dict.fromkeys(found, why)), job.kept)
    after = worst_estimate(made)
    if 1 - after / before < ratio * part:
        return network
    said = f"{len(found)} values in 16 bits for {100 * part:.1f} % more work: {decibel(before):.2f} dB -> {decibel(after):.2f} dB, estimated"
    return dataclasses.replace(made, account={**network.account, "residuals": said})
