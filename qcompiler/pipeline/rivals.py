"""The whole judged: a costly recipe against the plan of `default`, on samples that neither was fitted to; the better network is kept.

Every step of a recipe is judged by itself, on the samples that it looks at, and steps that each gain something can lose together. Both plans come from the same
calibration and the same float twin, so the second costs its ranges, its code and its correction.
"""

from __future__ import annotations

import numpy as np

from qcompiler.base.parallel import one_blas_thread
from qcompiler.calibration.data import Samples, take
from qcompiler.pipeline.findings import Findings
from qcompiler.pipeline.float_layers import settled
from qcompiler.pipeline.goal import FEWEST, Scores, decibel, held_out
from qcompiler.pipeline.halves import halved
from qcompiler.pipeline.job import Job
from qcompiler.pipeline.residuals import widened
from qcompiler.pipeline.scoring import ErrorSums
from qcompiler.pipeline.sixteen import with_asked
from qcompiler.pipeline.stages import Corrected, Measured, QuantizedNetwork, calibrate, correct, equalize, generate, integer_network
from qcompiler.plan.recipes import Recipe

_MOST = 32  # samples held out


@one_blas_thread
def planned(measured: Measured) -> QuantizedNetwork:
    """The stages from statistics to the integer network."""
    measured, steps = with_asked(measured), measured.job.recipe.steps
    made = integer_network(measured, measured.job.kept)  # plan, quantize, realize
    made = widened(made) if "residuals" in steps else made  # again with sums in 16 bits, with operands in halves, with layers in float, where asked for
    return settled(halved(made) if "halves" in steps else made)


@one_blas_thread
def with_code(chosen: QuantizedNetwork) -> Corrected:
    """The stages behind the integer network, up to constants that need no more change."""
    return correct(chosen, generate(chosen))  # lower, generate code; biases and weights


def network(measured: Measured) -> Corrected:
    """The stages behind calibration, up to constants that need no more change."""
    return with_code(planned(measured))


def rival_of(job: Job) -> Recipe | None:
    """The recipe beside which that of a job has to prove better, where anything can tell."""
    return job.recipe.rival if job.samples.count != 0 and any(o.dtype == "float32" for o in job.model.outputs) else None


def best_of(job: Job, rival: Recipe) -> tuple[Corrected, dict[str, str]]:
    """The better one of the networks that the job's recipe and `rival` make, and what was found, {"rivals": sentence}. Judged by the worst output on every
    fourth sample, at most `_MOST`, which calibration doesn't see; of fewer than `FEWEST` samples none is held out. Where a stored calibration knows which one
    is better, the other gets no code."""
    job = job.counted()
    count = job.samples.count
    assert count is not None
    held = held_out(count)
    held = [held[i * len(held) // _MOST] for i in range(_MOST)] if len(held) > _MOST else held
    judges = take(job.samples, held) if held else job.samples
    measured = calibrate(equalize(job.fitted_to([i for i in range(count) if i not in set(held)]) if held else job))
    plans = [planned(m) for m in (measured, measured.under(rival))]
    made = dict[int, Corrected]()

    def finished(number: int) -> Corrected:
        if number not in made:
            made[number] = with_code(plans[number])
        return made[number]

    def found() -> Findings:
        return {"noise": np.array([_scores(finished(number), judges).relative_noise() for number in range(len(plans))])}

    noise = plans[0].remembered("rivals", found, lambda state: state["noise"].tolist(), plans[1].digest, plans[1].measured.table.digest)
    own, other = (f"{r.preset} {decibel(x):.2f} dB" for r, x in zip((job.recipe, rival), noise, strict=True))
    where = f"{len(held)} samples that neither was fitted to" if held else f"the calibration samples themselves (fewer than {FEWEST}: none could be held out)"
    better = 0 if noise[0] <= noise[1] else 1
    return finished(better), {"rivals": f"{own}, {other} on {where}: the plan of {(job.recipe, rival)[better].preset} kept"}


def _scores(made: Corrected, judges: Samples) -> Scores:
    measured = made.network.measured
    twin, session = measured.twin.session(), made.host_code().session()
    sums = ErrorSums(twin.outputs)
    for done, sample in enumerate(judges, 1):
        counted = measured.padding.of(twin, sample)
        sums.add(counted.outputs(session.run(sample)), counted.outputs(twin.run(sample)))
        made.network.job.progress(f"judge the plan of {made.network.job.recipe.preset}", done, judges.count)
    return sums.scores()
