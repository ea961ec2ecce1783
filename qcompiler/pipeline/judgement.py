"""What the outputs of a finished network keep, and the sentence that says so where that is little.

Every preset is judged: calibration samples run through the network and its float twin side by side. The network runs as code for this machine, which has the
bits of every target and is there whenever a recipe tries corrections; where there is none (`fast` for another machine), the float network runs with all
roundings, which is an estimate. The worst output counts, and of one that holds several quantities the worst of these.

Ranges that were taken from a sample hold it, and may not hold the next one. So the float network with all roundings runs once more, on samples of which half
reach furthest of all, each with the ranges that the others alone would have led to. What is lost more by that is added to the upper end of the 95 %
confidence interval of what was lost, and that is what other samples may lose. A network that keeps less than `ENOUGH` on the calibration samples, or may keep
less on others, is never handed out without a warning.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from qcompiler.calibration.data import take
from qcompiler.passes.graph import Graph
from qcompiler.passes.trained import Trained
from qcompiler.pipeline.findings import Findings
from qcompiler.pipeline.float_layers import ENOUGH, relative_noise
from qcompiler.pipeline.goal import Scores, decibel
from qcompiler.pipeline.scoring import ErrorSums
from qcompiler.pipeline.stages import Corrected
from qcompiler.pipeline.survey import SAMPLES, Survey, first_samples
from qcompiler.plan.recipes import Recipe
from qcompiler.plan.sensitivity import Sensitivity

_FEW = 2  # samples that tell which roundings to name
_NAMED = 3  # roundings that a warning names
_KEPT = "Where the file was trained or checked with them, they were found good; otherwise it helps to quantize the float network that it came from"


def judged(corrected: Corrected, asked: Recipe) -> Corrected:
    """The network, with what its worst output has lost, and a warning where that is much. asked: the recipe that led to it, maybe through a rival's plan."""
    network = corrected.network
    if network.noise is None:  # no samples, or no output that could be judged
        return corrected
    scores = _scores(corrected)
    noise, limit = scores.relative_noise(), relative_noise(ENOUGH)
    bound = _unseen(corrected, scores) if noise <= limit and len(scores) > 1 else noise
    warnings = (_warning(corrected, noise, bound, asked),) if bound > limit else ()
    return dataclasses.replace(corrected, noise=noise, warnings=warnings)


def _unseen(corrected: Corrected, scores: Scores) -> float:
    """Noise over power that other samples may lead to: of the samples that tell, half are those that reach furthest, each for itself."""
    network, measured = corrected.network, corrected.network.measured
    count = network.job.alike.count or measured.table.samples

    def found() -> Findings:
        survey, twin, standing = Survey(network, corrected.integer), measured.twin.session(), measured.ends.standing(count, SAMPLES // 2, SAMPLES // 2)
        numbers = sorted(standing)
        power, seen, unseen = survey.errors(twin, take(network.job.alike, numbers), (None, measured.ends), numbers)
        weights = np.array([standing[n] for n in numbers])
        return {"power": weights @ power, "more": weights @ np.maximum(unseen - seen, 0.0)}

    power, more = network.remembered("unseen", found, lambda state: (state["power"], state["more"]), count)
    return scores.noise_bound() + float((more / np.maximum(power, np.finfo(np.float64).tiny)).max())


def _scores(corrected: Corrected) -> Scores:
    """Of every quantity in every float output; one that is always zero counts as kept. A stored calibration leads to the same figures without running
    anything."""
    network, measured = corrected.network, corrected.network.measured

    def estimated() -> Findings:
        power, noise = Survey(network, corrected.integer).errors(measured.twin.session(), first_samples(corrected.network))
        return {"power": power, "noise": noise}

    runs = corrected.corrections or corrected.here is not None
    name, find = ("judge", lambda: _run(corrected)) if runs else ("judge unrun", estimated)
    return network.remembered(name, find, lambda state: Scores(*_told(state["power"], state["noise"])))


def _run(corrected: Corrected) -> Findings:
    """power, noise: as `Scores` has them, by code for this machine."""
    measured, job = corrected.network.measured, corrected.network.job
    twin, session = measured.twin.session(), corrected.host_code().session()
    sums = ErrorSums(twin.outputs)
    for done, sample in enumerate(first_samples(corrected.network), 1):
        counted = measured.padding.of(twin, sample)
        sums.add(counted.outputs(session.run(sample)), counted.outputs(twin.run(sample)))
        job.progress("judge the outputs", done, SAMPLES)
    scores = sums.scores()
    return {"power": scores.power, "noise": scores.noise}


def _told(power: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nothing is lost of what is always zero."""
    silent = power.sum(axis=0) == 0
    return power, np.where(silent, 0.0, noise)


def _warning(corrected: Corrected, noise: float, bound: float, asked: Recipe) -> str:
    network = corrected.network
    costs = _costs(corrected)
    total = sum(costs.values()) or 1.0
    worst = sorted(costs, key=lambda name: -costs[name])[:_NAMED]
    named = ", ".join(f"{name} ({100 * costs[name] / total:.0f} %)" for name in worst)
    much = noise > relative_noise(ENOUGH)
    left = f"about {decibel(noise):.1f} dB are left on the calibration samples{'' if much else f', on others maybe {decibel(bound):.1f} dB'}"
    trained = Trained.of(Graph.of(network.job.model.module).attrs)
    own, lose = trained.keeps_float and not trained.calibrated, "lose" if much else "may lose"
    who = f"the model file's own roundings, which are kept, {lose} much of the float network behind them" if own else f"the outputs {lose} much in 8 bits"
    advice = _KEPT if own else _advice(asked.preset)
    return f"{who}: {left} ({ENOUGH:g} and more are sound). Most of the noise comes from {named}. {advice}"


def _costs(corrected: Corrected) -> dict[str, float]:
    """Relative noise at the worst output of each rounding that is left in a network, as people call it."""
    network = corrected.network

    def found() -> Findings:
        return Survey(network, corrected.integer).sensitivity(network.measured.twin.session(), most=_FEW).state()

    alone, plan = network.remembered("roundings", found, Sensitivity.of_state), network.plan
    costs = {f"value '{name}'": float(noise.max()) for name, noise in alone.values.items() if plan.params(name) is not None}
    return costs | {f"the weights of '{name}'": float(noise.max()) for name, noise in alone.weights.items() if name not in plan.reasons}


def _advice(preset: str) -> str:
    better: Sequence[str] = {"fast": ("--preset default", "--preset accurate"), "default": ("--preset accurate",)}.get(preset, ())
    helps = [*better, f"--min-sqnr {ENOUGH:g}, which keeps as many layers in float as that takes", "--keep-float with these names"]
    return f"What helps: {', '.join(helps[:-1])}, or {helps[-1]}"
