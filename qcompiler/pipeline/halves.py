"""The operands that are read in halves, so in 16 bits: those whose rounding to 8 costs the outputs most for the work that a second product takes.

Exact like everything in 8 bits, and cheaper than a layer in float32. The candidates' roundings are measured one by one (`qcompiler/plan/sensitivity.py`);
those that bring most for their work are taken until they cost a third of the network's work, or have little part in its noise.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np

from qcompiler.passes.groups import find_groups
from qcompiler.passes.halves import divisible
from qcompiler.passes.sequence import HALVED, run
from qcompiler.pipeline.stages import QuantizedNetwork, calibrate, float_code, integer_network
from qcompiler.pipeline.survey import ELEMENT, Survey

_ALLOWANCE = 1 / 3  # of the network's work
_LEAST = 0.01  # of all noise at an output: a value with less is left in 8 bits
_SAMPLES = 8
_MOVED = 4  # elements written for each of a value that is read in halves: the value, its halves, a partial sum


def halved(network: QuantizedNetwork) -> QuantizedNetwork:
    """The network with some operands in halves, measured and planned anew; itself where none is worth it. The step's account says how many."""
    model, job = network.model, network.job
    candidates = divisible(model.module)
    stored = {v for v in candidates if (p := network.plan.params(v)) is not None and p.dtype == "int8"}
    stored = {v for v in stored if not any(g.id in network.plan.reasons for g in candidates[v].layers)}
    if not stored:
        return network
    survey, session = Survey(network, network.integer), network.measured.twin.session()
    alone = survey.value_noise(session, stored, _SAMPLES)
    whole = np.maximum(survey.noise(session, itertools.islice(job.alike, _SAMPLES)), np.finfo(np.float64).tiny)
    work, _ = survey.work()
    share = {v: float((noise / whole).max()) for v, noise in alone.items()}
    elements = {g.id: math.prod(g.shape) for g in find_groups(model.module)}
    cost = {v: sum(work[g.id] for g in candidates[v].layers) + _MOVED * ELEMENT * elements[v] for v in share}
    left, chosen = _ALLOWANCE * sum(work.values()), list[str]()
    for value in sorted(share, key=lambda v: -share[v] / cost[v]):
        if share[value] >= _LEAST and cost[value] <= left:
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
    more = 100 * sum(cost[v] for v in chosen) / sum(work.values())
    what = f"{len(chosen)} operand{'s' if len(chosen) > 1 else ''} read in 16 bits for {more:.1f} % more work"
    return dataclasses.replace(found, account={**network.account, "halves": what})
