"""The whole judged: a costly recipe against the plan of `default`, on samples that neither was fitted to; the better network is kept.

Every step of a recipe is judged by itself, on the samples that it looks at, and steps that each gain something can lose together. Both plans come from the same
calibration and the same float twin, so the second costs its ranges, its code and its correction.
"""

from __future__ import annotations

import dataclasses

from qcompiler.base.parallel import one_blas_thread
from qcompiler.calibration.data import CheckedSamples, Samples, take
from qcompiler.pipeline.float_layers import settled
from qcompiler.pipeline.goal import FEWEST, Scores, decibel, held_out
from qcompiler.pipeline.halves import halved
from qcompiler.pipeline.job import Job
from qcompiler.pipeline.judgement import judged
from qcompiler.pipeline.library import Compilation, link
from qcompiler.pipeline.ports import ported
from qcompiler.pipeline.residuals import widened
from qcompiler.pipeline.scoring import ErrorSums
from qcompiler.pipeline.sixteen import with_asked
from qcompiler.pipeline.stages import Corrected, Measured, QuantizedNetwork, calibrate, correct, equalize, generate, integer_network
from qcompiler.plan.recipes import Recipe
from qcompiler.runtime.session import Session

_MOST = 32  # samples held out


def planned(measured: Measured) -> QuantizedNetwork:
    """The stages from statistics to the integer network."""
    measured, steps = with_asked(measured), measured.job.recipe.steps
    made = integer_network(measured, measured.job.kept)  # plan, quantize, realize
    made = widened(made) if "residuals" in steps else made  # again with sums in 16 bits, with operands in halves, with layers in float, where asked for
    return settled(halved(made) if "halves" in steps else made)


@one_blas_thread
def network(measured: Measured) -> Corrected:
    """The stages behind calibration, up to constants that need no more change."""
    chosen = planned(measured)
    return correct(chosen, generate(chosen))  # lower, generate code; biases and weights


def best_of(job: Job, rival: Recipe) -> Compilation:
    """The better one of the networks that the job's recipe and `rival` make. Judged by the worst output on every fourth sample, at most `_MOST`, which
    calibration doesn't see; of fewer than `FEWEST` samples none is held out."""
    samples = job.samples
    if samples.count is None:
        samples = CheckedSamples(list(samples), job.model.inputs)
    assert samples.count is not None
    held = held_out(samples.count)
    held = [held[i * len(held) // _MOST] for i in range(_MOST)] if len(held) > _MOST else held
    fitted = [i for i in range(samples.count) if i not in set(held)]
    measured = calibrate(equalize(dataclasses.replace(job, samples=take(samples, fitted) if held else samples)))
    twin = measured.twin.session()
    judges = take(samples, held) if held else samples
    networks = [network(m) for m in (measured, measured.under(rival))]
    noise = [_scores(n, twin, judges).relative_noise() for n in networks]
    own, other = (f"{r.preset} {decibel(x):.2f} dB" for r, x in zip((job.recipe, rival), noise, strict=True))
    where = f"{len(held)} samples that neither was fitted to" if held else f"the calibration samples themselves (fewer than {FEWEST}: none could be held out)"
    better = 0 if noise[0] <= noise[1] else 1
    verdict = f"{own}, {other} on {where}: the plan of {(job.recipe, rival)[better].preset} kept"
    return link(ported(judged(networks[better])), searched={"rivals": verdict})


def _scores(made: Corrected, twin: Session, samples: Samples) -> Scores:
    session, sums = made.host_code().session(), ErrorSums(twin.outputs)
    for done, sample in enumerate(samples, 1):
        counted = made.network.measured.padding.of(twin, sample)
        sums.add(counted.outputs(session.run(sample)), counted.outputs(twin.run(sample)))
        made.network.job.progress(f"judge the plan of {made.network.job.recipe.preset}", done, samples.count)
    return sums.scores()
