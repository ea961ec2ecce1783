"""The operands that are read in halves, so in 16 bits: those whose rounding to 8 costs the outputs most for the work that a second product takes.

Exact like everything in 8 bits, and cheaper than a layer in float32. The candidates' roundings are measured one by one (`qcompiler/plan/sensitivity.py`);
those that bring most for their work are taken while the recipe allows it: `default` roundings that stand out, for a few percent more work, `accurate` all that
can be felt.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np

from qcompiler.passes.groups import find_groups
from qcompiler.passes.halves import divisible
from qcompiler.passes.sequence import HALVED, run
from qcompiler.pipeline.goal import decibel
from qcompiler.pipeline.stages import QuantizedNetwork, calibrate, float_code, integer_network
from qcompiler.pipeline.survey import BEYOND_NOTICE, ELEMENT, Survey

RESCUE = (0.2, 0.2)  # `Recipe.halves` where the outputs lose too much
_SAMPLES = 8
_MOVED = 4  # elements written for each of a value that is read in halves: the value, its halves, a partial sum


def halved(network: QuantizedNetwork, bounds: tuple[float, float] | None = None) -> QuantizedNetwork:
    """The network with some operands in halves, measured and planned anew; itself where none is worth it. The step's account says how many. bounds: as
    `Recipe.halves`, of which they take the place."""
    model, job = network.model, network.job
    ratio, allowance = bounds or job.recipe.halves
    candidates = divisible(model.module)
    stored = {v for v in candidates if (p := network.plan.params(v)) is not None and p.dtype == "int8"}
    stored = {v for v in stored if not any(g.id in network.plan.reasons for g in candidates[v].layers)}
    if not stored or not network.measured.table.samples:
        return network
    survey, session = Survey(network, network.integer), network.measured.twin.session()
    whole = np.maximum(survey.noise(session, itertools.islice(job.alike, _SAMPLES)), np.finfo(np.float64).tiny)
    if decibel(float(whole.max())) >= BEYOND_NOTICE:
        return network
    alone = survey.value_noise(session, stored, _SAMPLES)
    work, _ = survey.work()
    share = {v: float((noise / whole).max()) for v, noise in alone.items()}
    elements = {g.id: math.prod(g.shape) for g in find_groups(model.module)}
    cost = {v: sum(work[g.id] for g in candidates[v].layers) + _MOVED * ELEMENT * elements[v] for v in share}
    total = sum(work.values())
    left, chosen = allowance * total, list[str]()
    for value in sorted(share, key=lambda v: -share[v] / cost[v]):
        if share[value] * total >= ratio * cost[value] and cost[value] <= left:
            left -= cost[value]
            chosen.append(value)
    if not chosen:
        return network
    before = network.measured
    first, *others = (dataclasses.replace(m, module=run(HALVED, m.module, sorted(chosen), dump=job.dump)) for m in job.models)
    job = dataclasses.replace(job, model=first, others=tuple(others))
    twin = float_code(first, dump=job.dump, progress=job.progress, others=job.sampled)
    measured = calibrate(dataclasses.replace(before.equalized, job=job, twin=twin), "measure halves").with_noise_of(before)
    found = integer_network(measured, job.kept)
    more = 100 * sum(cost[v] for v in chosen) / total
    what = f"{len(chosen)} operand{'s' if len(chosen) > 1 else ''} read in 16 bits for {more:.1f} % more work"
    return dataclasses.replace(found, account={**network.account, "halves": what})
