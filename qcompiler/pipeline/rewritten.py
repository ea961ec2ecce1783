"""What calibration says of a network behind passes that change nothing that is computed: most of it is known already."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import tvm

from qcompiler.calibration.table import CalibrationTable
from qcompiler.passes.sequence import run
from qcompiler.passes.streams import copied_values
from qcompiler.pipeline.job import Job
from qcompiler.pipeline.stages import FloatTwin, Measured, calibrate, looked_at, means_of, observe
from qcompiler.plan.ranges import SampleEnds


def rewritten(measured: Measured, rewrite: tuple[Callable[..., tvm.IRModule], ...], stage: str, *arguments: Any) -> Measured:
    """The statistics of the network behind passes that change nothing that is computed. What has a name of before, or is a copy, is known; a pass over the
    samples looks at the rest, if there is any. stage: what it is called. arguments: as `run` has them."""
    job = measured.job
    first, *others = (dataclasses.replace(m, module=run(rewrite, m.module, *arguments, dump=job.dump)) for m in job.models)
    job = dataclasses.replace(job, model=first, others=tuple(others))
    equalized = dataclasses.replace(measured.equalized, job=job, twin=FloatTwin(job))
    if job.samples.count == 0:
        return calibrate(equalized).with_noise_of(measured)
    ids, sources, means = looked_at(job), _sources(measured, job), means_of(job)
    new, known = [v for v in ids if v not in sources], {v: sources[v] for v in ids if v in sources}
    means.know(measured.means, sources)
    table, ends = CalibrationTable(measured.table.samples), SampleEnds(new)
    if new or means.wanted:
        table = observe(equalized, new, [means, ends], stage, [means.limit], at_first=True)
    table, ends = table.with_copies(measured.table, known), ends.with_copies(measured.ends, known)
    job.dump("calibration", table)
    return Measured(equalized, table, means, ends, measured.warnings).with_noise_of(measured)


def _sources(measured: Measured, job: Job) -> dict[str, str]:
    """Value of a job's network -> the one with its numbers of those that were measured."""
    seen = measured.table.values.keys() | measured.table.unbounded  # a view is computed by no step, and so not seen
    copies = {copy: value for copy, value in copied_values(job.model.module).items() if value in seen}
    return copies | {value: value for value in looked_at(measured.job)}
