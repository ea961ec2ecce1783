"""The layers that a compilation takes in float of its own accord.

An estimate decides: the float network with all roundings of the plan at once, on calibration samples. From 20 dB on nothing happens. Below, the step
"rescue" reads operands in 16 bits (`halves.py`) and takes layers in float, what brings back most for its work first, until the estimate comes to 20 dB. That
may cost a fifth of the network's work, or as much again where 20 dB can't be had for less. The step "mixed" takes layers in float up to 40 dB, and whatever
the estimate. What the outputs have lost in the end is measured and said by `judgement.py`.

Work is counted, not timed: the same layers are taken on every machine.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from qcompiler.pipeline.goal import decibel
from qcompiler.pipeline.halves import candidates, costs, operands, with_halves
from qcompiler.pipeline.stages import QuantizedNetwork, integer_network
from qcompiler.pipeline.survey import BEYOND_NOTICE, ELEMENT, SAMPLES, Survey, worst_estimate
from qcompiler.plan.sensitivity import Sensitivity
from qcompiler.plan.tradeoff import Network, Point, Wide, first_below

ENOUGH = 20.0  # dB of every output: from here on no layer is rescued, and nothing is warned of
_ALLOWANCE = 0.2  # of the network's work, for layers in float and operands in 16 bits
_UTMOST = 1.0  # the same where less can't bring outputs back
_TRIES = 3  # plans that a rescue makes


def settled(network: QuantizedNetwork) -> QuantizedNetwork:
    """The network, or the one with layers in float that takes its place."""
    job = network.job
    if not network.measured.table.samples or not any(o.dtype == "float32" for o in job.model.outputs):
        return network
    steps = frozenset() if job.target.gpu else job.recipe.steps
    if "mixed" in steps:
        network = _mixed(network)
    noise = worst_estimate(network)
    if "mixed" not in steps and "rescue" in steps and relative_noise(ENOUGH) < noise < math.inf:
        network, noise = _rescued(network, noise, _Trade.of(network, "halves" in steps))
    return dataclasses.replace(network, noise=noise)


def relative_noise(db: float) -> float:
    """Noise over power of an SQNR."""
    return float(10 ** (-db / 10))


@dataclass(frozen=True)
class _Trade:
    """What a network's roundings cost its outputs, one by one, and what its layers cost in either type."""

    found: Sensitivity
    network: Network

    @staticmethod
    def of(network: QuantizedNetwork, divides: bool = False) -> _Trade:
        survey = Survey(network, network.integer)
        found = network.remembered("sensitivity", lambda: survey.sensitivity(network.measured.twin.session(), most=SAMPLES).state(), Sensitivity.of_state)
        wide = costs(network, candidates(network)) if divides else {}
        return _Trade(found, survey.network(found, *survey.work(), (ELEMENT, ELEMENT), wide))

    def affordable(self, kept: Mapping[str, str], most: float) -> list[Point]:
        """The plans of the path that cost at most the part `most` more than the first, which has only `kept` in float."""
        path = self.network.path(frozenset(kept))
        return list(itertools.takewhile(lambda p: p.seconds <= path[0].seconds * (1 + most), path))

    def reasons(self, first: Point, last: Point, step: str) -> tuple[dict[str, str], dict[str, str]]:
        """({group id: why it stays float}, {value id: why it has 16 bits}) of what `last` adds to `first`."""
        floats, wide = dict[str, str](), dict[str, str]()
        for choice in sorted(last.keep - first.keep, key=str):
            gain, work = self.network.gain(last, choice)
            why = f"raises the SQNR by about {gain:.2f} dB for {_more(work / first.seconds)} (step {step})"
            if isinstance(choice, Wide):
                wide[choice.value] = why
            else:
                floats[choice] = why
        return floats, wide


def _more(part: float) -> str:
    return f"{abs(100 * part):.1f} % {'less' if part < 0 else 'more'} work"


def _summary(first: Point, last: Point, before: float, after: float) -> str:
    """One line for people. before, after: relative noise."""
    count, wide = len(last.floats - first.floats), len(last.wide - first.wide)
    if not count + wide:
        return "no layer is worth it"
    taken = [f"{operands(wide)} read in 16 bits"] if wide else []
    taken += [f"{count} layer{'s' if count > 1 else ''} kept in float"] if count else []
    return f"{' and '.join(taken)} for {_more(last.seconds / first.seconds - 1)}: {decibel(before):.2f} dB -> {decibel(after):.2f} dB, estimated"


def _with(network: QuantizedNetwork, floats: Mapping[str, str], wide: Mapping[str, str]) -> QuantizedNetwork:
    """The network with layers in float and values in 16 bits, {id: why}."""
    if not floats and not wide:
        return network
    return integer_network(with_halves(network.measured, wide, floats) if wide else network.measured, {**floats, **network.job.kept})


def _mixed(network: QuantizedNetwork) -> QuantizedNetwork:
    """With the layers in float whose 8-bit roundings cost the outputs most for the work that float32 takes."""
    trade = _Trade.of(network)
    points = trade.affordable(network.job.kept, _ALLOWANCE)
    first, last = points[0], points[first_below(points, relative_noise(BEYOND_NOTICE))]
    found = _with(network, *trade.reasons(first, last, "mixed"))
    return dataclasses.replace(found, account={**network.account, "mixed": _summary(first, last, first.noise, last.noise)})


def _rescued(network: QuantizedNetwork, noise: float, trade: _Trade) -> tuple[QuantizedNetwork, float]:
    """(the network with as few operands in 16 bits and layers in float as bring its estimated noise from `noise` to `ENOUGH`, or as come closest; its noise).
    The sum of single noises ranks plans; each plan's own estimate tells how far the sum is off."""
    points, further = (trade.affordable(network.job.kept, most) for most in (_ALLOWANCE, _UTMOST))
    first, fixed = points[0], frozenset(network.job.kept)
    best, least, chosen = network, noise, first
    tried, limit = {first.keep}, first.noise * relative_noise(ENOUGH) / noise
    for _ in range(_TRIES):
        if points[-1].noise > limit >= further[-1].noise:
            points = further
        whole = points[first_below(points, limit)]
        point = trade.network.trimmed(whole, max(limit, whole.noise), fixed)
        if point.keep in tried:
            break
        tried.add(point.keep)
        candidate = _with(network, *trade.reasons(first, point, "rescue"))
        found = worst_estimate(candidate)
        if found < least:
            best, least, chosen = candidate, found, point
        if found <= relative_noise(ENOUGH):
            break
        limit = min(limit, point.noise) * min(relative_noise(ENOUGH) / found, 0.5)
    return dataclasses.replace(best, account={**network.account, "rescue": _summary(first, chosen, noise, least)}), least
