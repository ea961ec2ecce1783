r"""Ranges of values, judged by what they do to the network's outputs, and widened where that costs nothing.

Observers (`observers.py`) judge a range by the error of the value itself. For the outputs that can be far off: a spike may be the whole evidence for a
class, or of no consequence behind a table of averages. So the ranges that observers propose for a value compete once more, in the float network with
that value alone rounded:

    noise(range) = sum over samples of weight * |outputs with the value rounded - outputs|^2 / sum over samples of weight * |outputs|^2

A range that clips does damage in few samples, so the samples in which a value reaches furthest are always among those that judge it, each for
itself; others, evenly spread, stand for the rest. They judge in rounds, one of each kind first and twice as many by the end of each that follows. After
a round with n of each kind in all, a range with 1 + 2 / n times the noise of the best of its value's is out, and from two on a value is settled whose ranges
that are left differ by a `TRIFLE` of the noise of all values; where the work is more than `LITTLE`, also after the first round, by half of a trifle: most of it
goes to the few values that the outputs depend on.

**Margins.** What was never seen can go further than all that was, and a clipped spike costs more than many roundings. A value's own rounding often has
no part in the noise at the outputs: there a wider range is free. So the widest is taken of ranges that differ by a trifle from the best. Rounding noise
grows with the square of the step, so all ranges are widened, at most to `REACH` times what was seen, until each value's noise comes to one common level;
the level is where this adds a fraction (`premium`) to the noise of all values.

**Other samples.** The next one may reach further than all before, the more so the fewer they were, and what no sample showed costs nothing in this
competition. The ranges that clip tell what it does cost: noise at the outputs beyond that of rounding, per square of what the furthest elements lost. Times
what the next sample is to lose (`headroom.unseen`) it is the noise that each range adds out of sample; with it a range competes, as wide as makes least of
both (`choose`). Of fewer than a hundred samples, ranges of which that isn't known get headroom for the next one instead.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from qcompiler.base.parallel import in_order, worker_count
from qcompiler.base.progress import Progress, silent
from qcompiler.calibration.data import Samples, take
from qcompiler.calibration.headroom import headroom, spread, unseen
from qcompiler.calibration.padding import Padding
from qcompiler.calibration.table import Seen
from qcompiler.numerics.metrics import Parts
from qcompiler.numerics.spec import QParams
from qcompiler.plan.quant_plan import NO_ROOM, Judged, Proposals
from qcompiler.plan.sensitivity import Walk, values_of, work_behind
from qcompiler.runtime.session import Session

REACH = 2.0
PREMIUM = 0.02
LEAST_COUNTED = 64
TRIFLE = 0.01
LITTLE = 2.0**36  # float multiplications: a second or two
_WIDER = 2 ** (np.arange(13) / 8)  # what a range is multiplied by, for the sake of the next sample
_FELT = 4.0  # steps that a range clips at least, to tell what clipping costs
_BEHIND = 2.0  # times 1 / n
_NEAR = 0.02
_PIECE = 12  # runs of the network, of what a sample judges in one go: beside them the one that every go begins with takes little
_GOLDEN = (math.sqrt(5) - 1) / 2


class Heard(NamedTuple):
    """What the outputs say of a value's ranges. noise: over power, by observer. cut: noise over power, per square of what clipping takes off the furthest
    elements, in units of the value; nan where no range clips."""

    noise: dict[str, float]
    cut: float


class SampleEnds:
    """A calibration watcher: least and greatest element of each of `values` in every sample."""

    def __init__(self, values: Iterable[str]) -> None:
        self.ends: dict[str, list[tuple[float, float]]] = {v: [] for v in values}

    def look(self, sample: int, value_id: str, array: np.ndarray, seen: Seen | None) -> tuple[float, float] | None:
        if not (value_id in self.ends and array.size and array.dtype == np.float32):
            return None
        return (seen.low, seen.high) if seen is not None else (float(array.min()), float(array.max()))

    def take(self, value_id: str, seen: tuple[float, float]) -> None:
        self.ends[value_id].append(seen)

    def end_sample(self, outputs: Mapping[str, np.ndarray]) -> None:
        """Outputs are of no interest here."""

    def state(self) -> dict[str, np.ndarray]:
        return {name: np.array(ends, np.float64).reshape(-1, 2) for name, ends in self.ends.items()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        self.ends = {name: [(float(low), float(high)) for low, high in ends] for name, ends in state.items()}

    def with_copies(self, other: SampleEnds, sources: Mapping[str, str]) -> SampleEnds:
        """These and more values. sources: of each the value of `other` that has its numbers."""
        found = SampleEnds(())
        found.ends = {v: other.ends[source] for v, source in sources.items()} | self.ends
        return found

    def with_room(self, proposals: Mapping[str, Proposals], least: Mapping[str, np.ndarray]) -> dict[str, Proposals]:
        """The ranges, each with headroom for the next sample: as much as makes least of what it clips, a single number, and of the rounding of all. least:
        float64[2], what is known of the headroom below and above a value."""
        names = [name for name, p in proposals.items() if len({len(self.ends.get(m, ())) for m in p.members} - {0}) == 1]
        if not names:
            return dict(proposals)
        reach = np.stack([self.reach([m for m in proposals[name].members if self.ends.get(m)]) for name in names])  # [values, samples, ends]
        furthest, mean, variance = reach.max(axis=1), reach.mean(axis=1), reach.var(axis=1)
        room, deviation = headroom(reach.shape[1], furthest, mean, variance), mean * spread(reach.shape[1], mean, variance)
        found = {}
        for i, name in enumerate(names):
            rounding = proposals[name].size / 12 * ((furthest[i].sum() / 255) * _WIDER) ** 2
            clipping = [unseen(f * furthest[i], furthest[i], mean[i], deviation[i]).sum() for f in _WIDER.tolist()]
            own = np.minimum(room[i], _WIDER[int(np.argmin(rounding + clipping))])
            known = [least[m] for m in proposals[name].members if m in least]
            found[name] = proposals[name].with_room(*np.max([own, *known], axis=0).tolist())
        return {**proposals, **found}

    def beyond(self, proposals: Mapping[str, Proposals], heard: Mapping[str, Heard]) -> dict[str, Callable[[QParams], float]]:
        """Value -> the noise over power that a range adds in the next sample, beyond what all samples showed; of values of which that is known."""
        known = [name for name in proposals if name in heard and not math.isnan(heard[name].cut)]
        names = [name for name in known if len({len(self.ends.get(m, ())) for m in proposals[name].members}) == 1]
        reach = [self.reach(proposals[name].members) for name in names]
        if not names:
            return {}
        furthest, mean, variance = (np.array([of(r, axis=0) for r in reach]) for of in (np.max, np.mean, np.var))
        deviation = mean * spread(len(reach[0]), mean, variance)

        def lost(i: int) -> Callable[[QParams], float]:
            return lambda params: heard[names[i]].cut * float(unseen(_reach_of(params), furthest[i], mean[i], deviation[i]).sum())

        return {name: lost(i) for i, name in enumerate(names)}

    def reach(self, values: Sequence[str]) -> np.ndarray:
        """float64[samples, 2]: how far values that are stored alike reach below and above zero."""
        ends = np.array([self.ends[v] for v in values])
        result: np.ndarray = np.maximum(ends * (-1, 1), 0.0).max(axis=0)
        return result

    def weights(self, value_id: str, count: int, spread: int, furthest: int) -> dict[int, float]:
        """Sample -> how many it stands for: the `furthest` samples in which the value reaches furthest for themselves, and then `spread` others for the rest.
        The first few of either kind are such a choice too."""
        return self._standing([value_id], count, spread, furthest)

    def standing(self, count: int, spread: int, furthest: int) -> dict[int, float]:
        """The same of all values: the samples in which the typical one reaches furthest."""
        return self._standing([*self.ends], count, spread, furthest)

    def _standing(self, values: Sequence[str], count: int, spread: int, furthest: int) -> dict[int, float]:
        known = [np.array(seen) for v in values if len(seen := self.ends.get(v, ())) == count]
        if not known:
            return dict.fromkeys(_spread(count), 1.0)
        ends = np.stack(known)
        low, high = np.minimum(ends[:, :, 0].min(axis=1), 0.0)[:, None], np.maximum(ends[:, :, 1].max(axis=1), 0.0)[:, None]
        reach = np.maximum(ends[:, :, 0] / np.where(low < 0, low, -math.inf), ends[:, :, 1] / np.where(high > 0, high, math.inf)).mean(axis=0)
        first = np.argsort(-reach, kind="stable")[:furthest].tolist()
        rest = [i for i in _spread(count) if i not in first]
        return dict.fromkeys(first, 1.0) | dict.fromkeys(rest[:spread], len(rest) / max(min(spread, len(rest)), 1))


def _reach_of(params: QParams) -> np.ndarray:
    """float64[2]: how far a range reaches below and above zero."""
    return np.array(params.range) * (-1, 1)


@functools.lru_cache(1)
def _spread(count: int) -> list[int]:
    """Samples in an order of which the first few, however many, are evenly spread: one for all values, which then have most of their judges in common."""
    return sorted(range(count), key=lambda i: i * _GOLDEN % 1)


def output_noise(
    twin: Session,
    proposals: Mapping[str, Proposals],
    ends: SampleEnds,
    samples: Samples,
    count: int,
    each: int,
    part: float = 1.0,
    work: float = math.inf,
    progress: Progress = silent,
    padding: Padding | None = None,
    beside: float = 0.0,
) -> dict[str, Heard]:
    """{value: what its ranges do at the outputs of the float network `twin`}. samples: all `count` of the calibration, which `ends` has seen;
    each value is judged by 2 * `each` of them. Outputs count alike, each relative to its own power. part: values behind which more than this part of the
    network's multiplications lie are left out, unless judging all takes `LITTLE` at most; so are those that `twin` does not compute. work: so many times
    the multiplications of calibration (of `LEAST_COUNTED` samples where it had fewer) may be spent, on values nearest to the outputs first. No clock decides.
    padding: positions that don't count. beside: the noise of values that are not judged here, as what makes no difference is a part of the noise of all.
    """
    behind = work_behind(twin)
    judged = {name: p for name, p in proposals.items() if p.members and all(m in behind for m in p.members)}
    standing = {member: ends.weights(member, count, each, each) for p in judged.values() for member in p.members}
    runs, whole = {m: len(w) * behind[m] for m, w in standing.items()}, float(sum(step["macs"] for step in twin.manifest["steps"]))
    much = whole * sum(len(p.params) * sum(runs[m] for m in p.members) for p in judged.values()) > LITTLE
    if much:
        judged = {name: p for name, p in judged.items() if all(behind[m] <= part for m in p.members)}
    judged = _affordable(judged, runs, work * max(count, LEAST_COUNTED))
    standing = {member: standing[member] for p in judged.values() for member in p.members}
    if not judged:
        return {}
    judges = _Judges(twin, judged, standing, each, padding, beside, 0 if much else 1, ends)
    variants, done = sum(len(standing[m]) * len(p.params) for p in judged.values() for m in p.members), 0
    workers = twin.alone(worker_count(twin.manifest["workspace"]))
    while wanted := judges.wanted:
        items = judges.prepared(wanted, take(samples, list(wanted)))
        for index, own, errors_of in in_order(judges.judge, workers, items):
            for errors in errors_of.values():
                done += len(errors)
                progress("judge ranges", done, variants)
            judges.take(index, own, errors_of)
        judges.rule()
    if done < variants:
        progress("judge ranges", variants, variants)
    return {name: Heard(dict(zip(judged[name].params, noises.tolist(), strict=True)), judges.cut[name]) for name, noises in judges.noises()}


class _Judges:
    """Ranges that compete, and what the samples so far say of them. judged: value -> its ranges; standing: of each member of a value, the samples that judge
    it, and how many each stands for: `each` of the first kind, then those of the second. beside: as `output_noise` has it; settles: the round from which on
    values are settled.

    noise: member -> float64[ranges, outputs]; power: member -> float64[outputs]; left: value that is not settled -> bool[ranges].
    """

    def __init__(
        self,
        twin: Session,
        judged: Mapping[str, Proposals],
        standing: Mapping[str, Mapping[int, float]],
        each: int,
        padding: Padding | None,
        beside: float,
        settles: int,
        ends: SampleEnds,
    ) -> None:
        self._twin, self._judged, self._standing, self._padding, self._beside, self._settles = twin, judged, standing, padding, beside, settles
        self._leader = {member: name for name, p in judged.items() for member in p.members}
        self._behind = work_behind(twin)
        self._at = {i.name: 0 for i in twin.inputs} | {v: n for n, step in enumerate(twin.manifest["steps"], 1) for v in values_of(step)}
        self._parts: list[Parts] = []
        self._round, self._rounds = 0, {member: _rounds(weights, each) for member, weights in standing.items()}
        self._open = set(judged)
        self._lag = {name: np.ones(len(p.params)) for name, p in judged.items()}  # times the noise of the best, of ranges that are out
        self._ends, self.cut = ends, dict[str, float]()
        self.noise: dict[str, np.ndarray] = {}
        self.power: dict[str, np.ndarray] = {}
        self.left = {name: np.ones(len(p.params), bool) for name, p in judged.items()}

    @property
    def wanted(self) -> dict[int, list[str]]:
        """Sample, in order -> the members that it judges in this round; none after the last round."""
        found: dict[int, list[str]] = {}
        for member, rounds in self._rounds.items():
            for sample in rounds.get(self._round, ()) if self._leader[member] in self._open else ():
                found.setdefault(sample, []).append(member)
        return dict(sorted(found.items()))

    def prepared(self, wanted: Mapping[int, list[str]], samples: Samples) -> Iterator[tuple[int, Mapping[str, np.ndarray], list[str]]]:
        """(number, sample, some of what it judges) of those that are `wanted`; before the first the parts of the outputs are told apart, by it, for all. One
        sample of each round judges all values: cut into pieces, that is work for all workers."""
        for (index, members), sample in zip(wanted.items(), samples, strict=False):
            self._parts = self._parts or Walk(self._twin, sample, padding=self._padding).parts
            runs = np.cumsum([self._behind[m] * self.left[self._leader[m]].sum() for m in members])
            for _, piece in itertools.groupby(zip(members, (runs // _PIECE).tolist(), strict=True), lambda pair: pair[1]):
                yield index, sample, [member for member, _ in piece]

    def judge(self, session: Session, item: tuple[int, Mapping[str, np.ndarray], list[str]]) -> tuple[int, np.ndarray, dict[str, np.ndarray]]:
        """(number of a sample, its power, errors with each range that is left of the values that it judges)."""
        index, sample, members = item
        walk, found = Walk(session, sample, parts=self._parts, padding=self._padding, stops=[self._at[m] for m in members]), dict[str, np.ndarray]()
        for member in members:
            walk.return_to(self._at[member])
            leader = self._leader[member]
            trying = self.left[leader]
            found[member] = np.zeros((len(trying), len(walk.power)))
            found[member][trying] = walk.errors_with_each(member, itertools.compress(self._judged[leader].params.values(), trying))
        return index, walk.power, found

    def take(self, index: int, own: np.ndarray, errors_of: Mapping[str, np.ndarray]) -> None:
        """Add what a sample says: its power, and the errors of the members that it judges."""
        for member, errors in errors_of.items():
            weight = self._standing[member][index]
            self.noise[member] = self.noise.get(member, np.zeros_like(errors)) + weight * errors
            self.power[member] = self.power.get(member, np.zeros_like(own)) + weight * own

    def rule(self) -> None:
        """End a round: put out ranges that are far behind, and settle values."""
        noises = dict(self.noises())
        if not self._round:  # in which all ranges run
            self.cut = {name: self._cost_of_clipping(name, noise) for name, noise in noises.items()}
        for name in self._open & noises.keys():
            left, least = self.left[name], noises[name].min()
            out = left & (noises[name] > (1 + _BEHIND / 2**self._round) * least)
            with np.errstate(divide="ignore"):
                self._lag[name][out] = noises[name][out] / least
            left &= ~out
        trifle = _trifle([self._beside, *(n.min() for n in noises.values())])
        trifle *= min(1.0, 2**self._round / 2)
        if self._round >= self._settles:
            self._open = {name for name in self._open & noises.keys() if noises[name][self.left[name]].max() > noises[name].min() + trifle}
        self._round += 1

    def _cost_of_clipping(self, name: str, noise: np.ndarray) -> float:
        """`Heard.cut`, after the first round: the least that a range says. Rounding noise is taken to grow with the square of the step."""
        params, members = list(self._judged[name].params.values()), self._judged[name].members
        scales, ends = np.array([p.scale for p in params]), np.stack([_reach_of(p) for p in params])
        widest, lost, count = int(scales.argmax()), np.zeros(len(params)), 0.0
        for member in members:
            if not self._ends.ends.get(member):
                return math.nan
            reach = self._ends.reach([member])
            for sample in self._rounds[member].get(0, ()):
                weight = self._standing[member][sample]
                lost += weight * np.square(np.maximum(reach[sample] - ends, 0.0)).sum(axis=1)
                count += weight / len(members)
        clips = lost > np.square(_FELT * scales[widest])
        if not clips.any():
            return math.nan
        clipping = noise - noise[widest] * np.square(scales / scales[widest])
        return max(float((clipping[clips] / lost[clips]).min()) * count, 0.0)

    def noises(self) -> Iterator[tuple[str, np.ndarray]]:
        """(value, float64[ranges]: the noise of each, over power, by the samples so far); a range that is out stays as far behind the best as it was."""
        for name, p in self._judged.items():
            if all(m in self.noise for m in p.members):
                ratios = [self.noise[m] / np.maximum(self.power[m], np.finfo(np.float64).tiny) for m in p.members]
                total, left = np.asarray(sum(r.mean(axis=1) for r in ratios)), self.left[name]
                total[np.isnan(total)] = math.inf
                with np.errstate(invalid="ignore"):
                    behind = total[left].min() * self._lag[name]
                behind[np.isnan(behind)] = math.inf  # infinitely far behind nothing
                yield name, np.where(left, total, behind)


def _trifle(least: Iterable[float]) -> float:
    """What makes no difference. least: the noise of every value."""
    return TRIFLE * sum(n for n in least if math.isfinite(n))


def _rounds(samples: Iterable[int], each: int) -> dict[int, list[int]]:
    """The samples of each round: one of the first `each` and one of the others, and then twice as many by the end of each round."""
    found: dict[int, list[int]] = {}
    held = list(samples)
    for kind in (held[:each], held[each:]):
        for place, sample in enumerate(kind):
            found.setdefault(place.bit_length(), []).append(sample)
    return found


def _affordable(judged: Mapping[str, Proposals], runs: Mapping[str, float], most: float) -> dict[str, Proposals]:
    """Those of `judged` that `most` runs of the network pay for, nearest to the outputs first, in their own order. runs: member -> of a single range of it."""
    cost = {name: len(p.params) * sum(runs[m] for m in p.members) for name, p in judged.items()}
    order = sorted(judged, key=lambda name: max(runs[m] for m in judged[name].members))
    total = np.cumsum([cost[name] for name in order])
    kept = {name for name, spent in zip(order, total.tolist(), strict=True) if spent <= most}
    return {name: p for name, p in judged.items() if name in kept}


def choose(
    proposals: Mapping[str, Proposals], noise: Mapping[str, Mapping[str, float]], part: float, beyond: Mapping[str, Callable[[QParams], float]] = {}
) -> dict[str, Judged]:
    """The range with the least noise of every value that was judged. With a `part` of the noise of all that margins may add, the widest of those that differ
    by a trifle from it, and widened. beyond: value -> the noise that a range adds in the next sample, where that is known; then ranges compete with it, each
    as wide as makes the sum least."""
    best, chosen, trifle = dict[str, str](), dict[str, tuple[QParams, float]](), _trifle(min(found.values()) for found in noise.values())
    for name, found in noise.items():
        p, more = proposals[name], beyond.get(name)
        ranges = {o: _enough(params, found[o], more, p.bound) if more else (params, found[o]) for o, params in p.params.items()}
        costs = {o: own + more(params) if more else own for o, (params, own) in ranges.items()}
        least = min(costs.values())
        if part:
            best[name] = max((o for o in ranges if costs[o] <= least + trifle), key=lambda o: ranges[o][0].scale)
        else:
            best[name] = next(o for o in ranges if costs[o] <= least * (1 + _NEAR))
        chosen[name] = ranges[best[name]]
    wider = widened(chosen, proposals, part) if part else {}
    best |= {name: next(iter(p.params)) for name, p in proposals.items() if name not in noise and (p.room != NO_ROOM or p.whole)}
    result = {}
    for name, observer in best.items():
        competed = len(noise.get(name, ()))
        reason = "everything seen" if proposals[name].whole else "least estimated error"
        reason = f"least error at the network's outputs of {competed} ranges" if competed > 1 else reason
        reason += ", widened where that costs the outputs next to nothing," if name in wider else ""
        own = proposals[name].params[observer]
        enough, _ = chosen.get(name, (own, 0.0))
        reason += ", with headroom," if proposals[name].room != NO_ROOM or enough != own else ""
        result[name] = Judged(wider.get(name, enough), observer, reason)
    return result


def _enough(params: QParams, noise: float, beyond: Callable[[QParams], float], bound: float) -> tuple[QParams, float]:
    """(a range as wide as makes least of its rounding and of what lies beyond it, its noise without the latter). noise: of `params`."""
    low, high = params.range
    tried = [params, *(QParams.from_range(f * low, max(high, min(f * high, bound))) for f in _WIDER[1:].tolist())]
    noises = [noise * (p.scale / params.scale) ** 2 for p in tried]
    return min(zip(tried, noises, strict=True), key=lambda pair: pair[1] + beyond(pair[0]))


def premium(samples: int) -> float:
    """What margins may cost, as a fraction of the noise: no less than `PREMIUM`, and as often as the next sample reaches further, at either end, than so many
    did."""
    return max(PREMIUM, 2 / (samples + 1))


def widened(chosen: Mapping[str, tuple[QParams, float]], proposals: Mapping[str, Proposals], part: float) -> dict[str, QParams]:
    """The ranges with margins, of those that get one. chosen: parameters and noise at the outputs of every value that was judged. part: of
    the noise of all, what margins may add."""
    wishes = {name: _wish(params, proposals[name]) for name, (params, _) in chosen.items()}
    noise = np.array([n for _, n in chosen.values()])
    most = np.array([(w[1] - w[0]) / (p.range[1] - p.range[0]) for w, (p, _) in zip(wishes.values(), chosen.values(), strict=True)])

    def ratios(level: float) -> np.ndarray:
        result: np.ndarray = np.minimum(most, np.sqrt(np.maximum(level / np.maximum(noise, np.finfo(np.float64).tiny), 1.0)))
        return result

    allowed = part * noise.sum()
    below, above = 0.0, float((noise * np.square(most)).max(initial=0.0))
    for _ in range(60):
        level = (below + above) / 2
        below, above = (level, above) if float((noise * (np.square(ratios(level)) - 1)).sum()) <= allowed else (below, level)
    found = {}
    for (name, (params, _)), ratio, limit in zip(chosen.items(), ratios(below).tolist(), most.tolist(), strict=True):
        if ratio > 1 + _NEAR:
            way = (ratio - 1) / (limit - 1)
            low, high = (end + way * (wish - end) for end, wish in zip(params.range, wishes[name], strict=True))
            found[name] = QParams.from_range(low, high)
    return found


def _wish(params: QParams, proposals: Proposals) -> tuple[float, float]:
    low, high = params.range
    return min(low, REACH * proposals.low), max(high, min(REACH * proposals.high, proposals.bound))
