"""Compile to an accuracy target: of the networks that meet it, the fastest found in the time given.

    int8 network --> does it meet the target? --> sensitivity, costs --> path of plans (tradeoff.py) --> compile, judge, time plans on it --> the best one

Plans are ranked by estimates and accepted by measurement: a plan on the path is compiled, corrected and run like any other network. How far it is off
the target says how far to go along the path for the next one. Every fourth sample is held out from calibration and correction, and judges.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.backend.build import build
from qcompiler.base.errors import DataError
from qcompiler.base.files import temporary_folder
from qcompiler.base.progress import Progress
from qcompiler.base.targets import find_target, missing_features
from qcompiler.calibration.data import Samples, load_labels
from qcompiler.importers.model import FloatModel
from qcompiler.pipeline.goal import CONFIDENCE, Finding, Goal, Scores, check_labels, check_thresholds, classifying, decibel, held_out, judge
from qcompiler.pipeline.halves import candidates, costs, operands, with_halves
from qcompiler.pipeline.job import Job
from qcompiler.pipeline.library import Compilation, link
from qcompiler.pipeline.metric import Metric, MetricFunction, Outputs, Scored, load_metric
from qcompiler.pipeline.ports import ported
from qcompiler.pipeline.scoring import ErrorSums
from qcompiler.pipeline.sixteen import with_asked
from qcompiler.pipeline.stages import calibrate, correct, equalize, generate, integer_network
from qcompiler.pipeline.survey import Survey
from qcompiler.plan.sensitivity import Sensitivity, conversion_module, conversion_seconds
from qcompiler.plan.tradeoff import Choice, Network, Point, Wide, first_below
from qcompiler.runtime.bench import interleave
from qcompiler.runtime.session import Session

BUDGET = 600.0  # seconds, when none is given
_MOST = 8  # plans that are compiled
_TRIMMED = 3  # of them, as part of one point of the path that estimates say would do
_WORTH = 0.01  # of the latency: a smaller gain is not searched for
_CURVE = 40  # points of the predicted path in the manifest
_MEASURING = 3.0  # seconds for the times of all plans


@dataclass
class Candidate:
    """A plan that was compiled. keep: groups in float. seconds: latency on this machine, once measured."""

    keep: Choice
    compilation: Compilation
    session: Session
    scores: Scores
    findings: list[Finding]
    seconds: float = math.nan

    @property
    def met(self) -> bool:
        return all(f.met for f in self.findings)

    def factor(self) -> float:
        """By how much noise may grow, or (below 1) must shrink, to just meet the target. A fraction that is missed asks for half the noise, and one
        that is met tolerates twice as much: a search that closes in from both sides ends between them."""
        return min(f.noise if f.noise is not None else 2.0 if f.met else 0.5 for f in self.findings)


def search(job: Job, goal: Goal, labels: Any, budget: float | None, metric: str | MetricFunction | None = None) -> Compilation:
    """The fastest network found that meets `goal`, or the most accurate one. Its manifest's `mixed_precision` says which, and what else was tried.

    labels: class indices, one per row of the job's samples, or a file of them; for a metric what it takes. budget: seconds.
    Raises DataError for labels that don't fit, and for a goal that the network's outputs can't be judged by.
    """
    clock = _Clock(BUDGET if budget is None else budget, job.progress)
    job = job.counted()
    measure = None if metric is None else load_metric(metric, labels, job.samples)
    classes = _classes(labels if measure is None or goal.max_accuracy_drop is not None else None, job.samples, job.model, goal)
    with temporary_folder() as folder:
        return _Search(replace(job, progress=clock.progress), goal, classes, clock, folder, measure).run()


def _classes(labels: Any, samples: Samples, model: FloatModel, goal: Goal) -> np.ndarray | None:
    """int64[samples, rows of a batch], or None without labels."""
    classified = classifying(model.outputs)
    check_thresholds(goal, classified, labels is not None)
    if not any(o.dtype == "float32" for o in model.outputs):
        raise DataError("an accuracy target needs an output of float32 numbers, and this model has none")
    if labels is None:
        return None
    found = load_labels(labels, samples)
    assert samples.count is not None
    check_labels(found, samples.count * classified[0].shape[0], classified[0])
    return found.reshape(samples.count, -1)


class _Clock:
    """The time budget; every report of progress shows what is left of it."""

    def __init__(self, budget: float, progress: Progress) -> None:
        self.budget, self._begin, self._progress = budget, time.monotonic(), progress

    @property
    def spent(self) -> float:
        return time.monotonic() - self._begin

    @property
    def left(self) -> float:
        return self.budget - self.spent

    def progress(self, stage: str, done: int, total: int | None) -> None:
        self._progress(stage, done, total)
        self._progress("time budget, seconds", min(int(self.spent), int(self.budget)), int(self.budget))


@dataclass
class _Search:
    job: Job
    goal: Goal
    labels: np.ndarray | None
    clock: _Clock
    folder: Path
    metric: Metric | None = None
    tried: list[Candidate] = field(default_factory=list)
    network: Network | None = None
    sensitivity: Sensitivity | None = None
    path: list[Point] = field(default_factory=list)
    plan_seconds: float = 0.0  # that trying one plan took, at most
    stopped: str = ""  # why no further plan was tried, when the target was not met

    def run(self) -> Compilation:
        count = self.job.samples.count
        assert count is not None
        self.held = held_out(count)
        fitted = [i for i in range(count) if i not in set(self.held)]
        self.host = find_target("native")
        self.runs_here = not missing_features(self.job.target)
        self.measured = with_asked(calibrate(equalize(self.job.fitted_to(fitted))))
        self.twin = self.measured.twin.session(threads=1)
        first = self.attempt(frozenset(self.job.kept), self.job.kept)
        if not first.met and not self.out_of_time():
            self.survey(first)
            self.follow_path()
        times = interleave({"float": self.run_once(self.twin), **{str(i): self.run_once(c.session) for i, c in enumerate(self.tried)}}, seconds=_MEASURING)
        for candidate, timing in zip(self.tried, times[1:], strict=True):
            candidate.seconds = timing.minimum
        chosen = self.choose()
        return self.with_account(chosen, times[0].minimum)

    def run_once(self, session: Session) -> Any:
        sample = next(iter(self.job.samples))
        return lambda: session.run(sample)

    # -- plans --------------------------------------------------------------------------------------------------------------------------

    def attempt(self, keep: Choice, reasons: Mapping[str, str], wide: Mapping[str, str] = {}) -> Candidate:
        """Compile a plan, run it, judge it. reasons: {group id: why it stays float}; wide: {value id: why it is read in 16 bits}."""
        number, start = len(self.tried), self.clock.spent
        network = integer_network(with_halves(self.measured, wide, reasons) if wide else self.measured, reasons)
        compilation = link(correct(network, generate(network)))
        if self.runs_here:
            session = Session(compilation.artifact.save(self.folder / f"plan{number}.so"))
        else:
            session = compilation.corrected.host_code().session(threads=1)
        scores = self.score(session, number)
        candidate = Candidate(keep, compilation, session, scores, judge(self.goal, scores, self.held))
        self.tried.append(candidate)
        self.plan_seconds = max(self.plan_seconds, self.clock.spent - start)
        return candidate

    def score(self, session: Session, number: int) -> Scores:
        outputs = self.job.model.outputs
        sums, classified, votes = ErrorSums(outputs), classifying(outputs), []
        answers: tuple[list[Outputs], list[Outputs]] = [], []
        for done, sample in enumerate(self.job.samples, 1):
            counted = self.measured.padding.of(self.twin, sample)
            got, expected = counted.outputs(session.run(sample)), counted.outputs(self.twin.run(sample))
            for collected, found in zip(answers, (got, expected), strict=True) if self.metric is not None else ():
                collected.append({name: np.array(array) for name, array in found.items()})
            sums.add(got, expected)
            if classified:
                votes.append((got[classified[0].name].argmax(1), expected[classified[0].name].argmax(1)))
            self.clock.progress(f"judge plan {number + 1}", done, self.job.samples.count)
        top = np.array(votes)  # [samples, 2, rows]
        float_right, int8_right = (None, None) if self.labels is None else (top[:, 1] == self.labels, top[:, 0] == self.labels)
        metric = None if self.metric is None else Scored(self.metric.name, self.metric.of(answers[1]), self.metric.of(answers[0]))
        agree = top[:, 0] == top[:, 1] if classified else None
        return replace(sums.scores(), agree=agree, float_right=float_right, int8_right=int8_right, metric=metric)

    # -- search -------------------------------------------------------------------------------------------------------------------------

    def survey(self, first: Candidate) -> None:
        """Sensitivities and costs of the plan that has everything in int8, and the path from it."""
        survey = Survey(first.compilation.quantized, first.compilation.integer)
        self.sensitivity = survey.sensitivity(self.twin, seconds=min(60.0, self.clock.left / 4))
        sample = next(iter(self.job.samples))
        conversion = build(conversion_module(), self.host, "generate host code").session(threads=1)
        int8, float32 = survey.seconds(first.session, sample), survey.seconds(self.twin, sample)
        to_int8, to_float = conversion_seconds(conversion)
        quantized, divides = first.compilation.quantized, "halves" in self.job.recipe.steps
        wide = costs(quantized, candidates(quantized), to_int8) if divides else {}
        self.network = survey.network(self.sensitivity, int8, float32, (to_int8, to_float), wide)
        self.path = self.network.path(frozenset(self.job.kept))

    def follow_path(self) -> None:
        """Compile plans on the path until one just meets the target."""
        assert self.network is not None
        missed, met = 0, len(self.path)  # indices: the last known to miss, the first known to meet the target
        limit = self.path[0].noise * self.tried[0].factor()
        self.stopped = "no plan that keeps more layers in float is left"
        refuted: Counter[int] = Counter()  # how many trimmed plans of a point missed the target
        while len(self.tried) < _MOST:
            index = max(missed + 1, min(first_below(self.path, limit), met - 1))
            if index >= met or (met < len(self.path) and self.path[met].seconds - self.path[index].seconds < _WORTH * self.path[met].seconds):
                return
            if self.out_of_time():
                return
            whole, known = self.path[index], {c.keep: c.met for c in self.tried}
            if whole.keep not in known:
                slim = self.network.trimmed(whole, max(limit, whole.noise), frozenset(self.job.kept))
                point = whole if slim.keep in known or refuted[index] == _TRIMMED else slim
                floats = {name: self.reason(point, name) for name in sorted(point.floats)}
                candidate = self.attempt(point.keep, {**floats, **self.job.kept}, {v: self.reason(point, Wide(v)) for v in sorted(point.wide)})
                limit = point.noise * candidate.factor()
                if not candidate.met and point is not whole:
                    refuted[index] += 1  # which the whole point, with less noise, need not
                    continue
                known[whole.keep] = candidate.met
            missed, met = (missed, index) if known[whole.keep] else (index, met)
        self.stopped = f"{_MOST} plans were tried"

    def out_of_time(self) -> bool:
        """Is there no time for another plan?"""
        if self.clock.left < self.plan_seconds:
            needed = math.ceil(self.clock.spent + 1.2 * self.plan_seconds)
            allowed = f"the time budget of {self.clock.budget:.0f} s does not allow another plan, which takes about {self.plan_seconds:.0f} s"
            self.stopped = (
                f"{allowed}; --time-budget {needed}s has room for one, {math.ceil(needed + (_MOST - len(self.tried) - 1) * self.plan_seconds)}s for all"
            )
            return True
        return False

    def reason(self, point: Point, name: str | Wide) -> str:
        assert self.network is not None
        gain, seconds = self.network.gain(point, name)
        where = "" if self.runs_here else f", as on {self.host.name}"
        return f"raises the SQNR by about {gain:.2f} dB for {1e6 * seconds:+.0f} us{where}; chosen to meet {self.goal}"

    def choose(self) -> Candidate:
        met = [c for c in self.tried if c.met]
        return min(met, key=lambda c: c.seconds) if met else min(self.tried, key=lambda c: c.scores.relative_noise())

    # -- account ------------------------------------------------------------------------------------------------------------------------

    def with_account(self, chosen: Candidate, float_seconds: float) -> Compilation:
        """The chosen compilation, linked again with the manifest's `mixed_precision`."""
        points = [self.figures(c, c is chosen) for c in self.tried]
        account = {
            "goal": str(self.goal),
            "met": chosen.met,
            "statement": self.statement(chosen),
            "findings": [{"wanted": f.wanted, "found": f.found, "met": f.met} for f in chosen.findings],
            "samples": len(chosen.scores),
            "held_out": len(self.held),
            "confidence": CONFIDENCE,
            "measured_on": self.host.name if not self.runs_here else self.job.target.name,
            "threads": self.twin.threads,
            "float": {"seconds": float_seconds, "bytes": sum(g.weight.nbytes for g in self.measured.means.groups.values() if g.weight is not None)},
            "points": points,
            "curve": self.curve(),
            "sensitivity": self.layers(),
        }
        return link(ported(chosen.compilation.corrected), mixed_precision=account)

    def statement(self, chosen: Candidate) -> str:
        wide = sum(isinstance(k, Wide) for k in chosen.keep)
        kept = len(chosen.keep - set(self.job.kept)) - wide
        layers = f"{kept} layer{'s' if kept != 1 else ''} kept in float" + (f" and {operands(wide)} read in 16 bits" if wide else "")
        if chosen.met:
            others = f", the fastest of {sum(c.met for c in self.tried)} that do, of {len(self.tried)} tried" if len(self.tried) > 1 else ""
            return f"the target ({self.goal}) is met with {layers}{others}"
        return f"THE TARGET ({self.goal}) IS NOT MET: {self.stopped}. This is the most accurate of {len(self.tried)} plans tried, with {layers}"

    def figures(self, c: Candidate, chosen: bool) -> dict[str, Any]:
        judged = c.scores.of(self.held) if self.held else c.scores
        bound, drop = judged.noise_bound(), c.scores.accuracy_drop()
        return {
            "float_layers": sorted(k for k in c.keep if isinstance(k, str)),
            "in_sixteen": sorted(k.value for k in c.keep if isinstance(k, Wide)),
            "sqnr_db": _finite(decibel(judged.relative_noise())),
            "sqnr_bound_db": _finite(decibel(bound)) if self.held and math.isfinite(bound) else None,
            "agreement": c.scores.agreement(),
            "accuracy_drop": None if drop is None else drop[0],
            "metric": None if c.scores.metric is None else vars(c.scores.metric),
            "seconds": c.seconds,
            "bytes": c.compilation.artifact.size,
            "met": c.met,
            "chosen": chosen,
        }

    def curve(self) -> list[dict[str, Any]]:
        """The predicted path, moved to where the first plan was measured."""
        if not self.path:
            return []
        first, base = self.tried[0], self.path[0]
        scale = (first.scores.of(self.held) if self.held else first.scores).relative_noise() / max(base.noise, 1e-300)
        shift, size = first.seconds - base.seconds, first.compilation.artifact.size - base.bytes
        every = max(1, -(-len(self.path) // _CURVE))
        shown = [p for i, p in enumerate(self.path) if i % every == 0 or i == len(self.path) - 1]
        return [{"layers": len(p.keep), "sqnr_db": _finite(decibel(p.noise * scale)), "seconds": p.seconds + shift, "bytes": p.bytes + size} for p in shown]

    def layers(self) -> dict[str, Any]:
        """Per layer: SQNR of the outputs when its weights and its result alone are rounded, and its seconds in both types."""
        if self.network is None or self.sensitivity is None:
            return {}
        rows = []
        for layer in self.network.layers.values():
            alone = layer.noise + self.network.values[layer.id].noise
            if layer.movable:
                sqnr = _finite(decibel(float(alone.max())))
                rows.append({"id": layer.id, "sqnr_db": sqnr, "int8_seconds": layer.int8_seconds, "float_seconds": layer.float_seconds})
        return {"samples": self.sensitivity.samples, "layers": rows}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
