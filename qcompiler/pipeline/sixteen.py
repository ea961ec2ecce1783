"""The network with what a user wants in 16 bits (`qcompiler/plan/sixteen.py`)."""

from __future__ import annotations

from qcompiler.passes.graph import Graph
from qcompiler.passes.groups import find_groups, values_in_sixteen
from qcompiler.passes.halves import divisible
from qcompiler.passes.trained import Trained
from qcompiler.pipeline.halves import with_halves
from qcompiler.pipeline.residuals import with_wide
from qcompiler.pipeline.stages import Measured
from qcompiler.plan.sixteen import ASKED, written_wide


def with_asked(measured: Measured) -> Measured:
    """The statistics of the job's network with what it is asked to have in 16 bits, so far as nothing else keeps it in float."""
    job = measured.job
    wanted = [g for g in job.sixteen if g not in job.kept]
    if not wanted:
        return measured
    attrs, stated = Graph.of(job.model.module).attrs, Trained.of(Graph.of(job.model.module).attrs).values.keys()
    groups, have = find_groups(job.model.module), values_in_sixteen(attrs) or frozenset()
    written = [v for g in groups if g.id in wanted and g.id not in have for v in written_wide(g, groups, stated)]
    if written:
        measured = with_wide(measured, dict.fromkeys(written, ASKED))
    halves = [v for v, d in divisible(measured.model.module).items() if any(g.id in wanted for g in d.layers)]
    return with_halves(measured, dict.fromkeys(halves, ASKED), job.kept) if halves else measured
