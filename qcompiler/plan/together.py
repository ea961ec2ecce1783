"""Ranges of a whole plan, judged all at once and on samples that they don't know.

Each range is the best for the outputs when its value alone is rounded (`ranges.py`). Together they can be worse than wider ones: what clips in several values
clips in the same samples, and adds up as signals do, not as noise. And a value of which the outputs were not asked has a range that clips for its own sake.
So this plan and one of ranges that clip nothing run through the float network with every value rounded, and the one whose outputs lose least is taken. A
range holds the samples that it was taken from, and would not hold them had they been others: each sample meets the ranges that the others alone would have
led to.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from qcompiler.base.parallel import in_order, worker_count
from qcompiler.calibration.data import Samples, take
from qcompiler.calibration.padding import Padding
from qcompiler.numerics.metrics import Parts
from qcompiler.numerics.spec import LIMITS, QParams
from qcompiler.plan.quant_plan import Judged, Proposals, Quantized, QuantPlan
from qcompiler.plan.ranges import Heard, SampleEnds, choose, premium
from qcompiler.plan.sensitivity import Walk
from qcompiler.runtime.session import Session

LITTLE = 2.0**33  # float multiplications
CLEARLY = 0.8  # times the noise of the ranges that are best one by one: less is no chance of the few samples that judge


def rival_ranges(
    proposals: Mapping[str, Proposals], heard: Mapping[str, Heard], ends: SampleEnds, samples: int, room: Mapping[str, np.ndarray], steps: Collection[str]
) -> list[dict[str, Judged]]:
    """The ranges that the outputs prefer, one by one; and, where they were asked, those that clip nothing. heard: what the outputs say of `proposals`.
    samples: of the calibration. room: as `SampleEnds.with_room` has it. steps: of the recipe."""

    def chosen(proposals: Mapping[str, Proposals]) -> dict[str, Judged]:
        noise = {name: {o: h.noise[o] for o in proposals[name].params} for name, h in heard.items()}
        if "margins" not in steps:
            return choose(proposals, noise, 0.0)
        beyond = ends.beyond(proposals, heard)
        roomy = ends.with_room({n: p for n, p in proposals.items() if n not in beyond}, room)
        noise |= {n: {o: x * (p.params[o].scale / proposals[n].params[o].scale) ** 2 for o, x in noise[n].items()} for n, p in roomy.items() if n in noise}
        return choose({**proposals, **roomy}, noise, premium(samples), beyond)

    plain = chosen(proposals)
    if "judge-ranges" not in steps or all(len(p.params) == 1 for p in proposals.values()):
        return [plain]
    return [plain, chosen({name: p.only_widest() for name, p in proposals.items()})]


def noise_together(
    twin: Session, plans: Sequence[QuantPlan], ends: SampleEnds, samples: Samples, count: int, each: int, padding: Padding | None = None
) -> np.ndarray:
    """float64[plans]: noise over power at the outputs of the float network `twin`, the mean of all, when every value that a plan stores is rounded as without
    the sample at hand. samples: all `count` of the calibration, which `ends` has seen; judged by the `each` that reach furthest, and as many for the rest; by
    half of them where that is more work than `LITTLE`."""
    macs = sum(step["macs"] for step in twin.manifest["steps"])
    each = each if 2 * each * (1 + len(plans)) * macs <= LITTLE else max(each // 2, 1)
    weights = ends.standing(count, each, each)
    params = [{v: p for v in plan.edges if (p := plan.params(v)) is not None} for plan in plans]
    parts = list[Parts]()

    def walked(session: Session, item: tuple[int, Mapping[str, np.ndarray]]) -> tuple[int, np.ndarray, np.ndarray]:
        index, sample = item
        walk = Walk(session, sample, session, parts, padding)
        return index, walk.power, np.stack([walk.errors_of_plan(without_sample(plan, p, ends, index)) for plan, p in zip(plans, params, strict=True)])

    def judges() -> Iterable[tuple[int, Mapping[str, np.ndarray]]]:
        chosen = sorted(weights)
        for index, sample in zip(chosen, take(samples, chosen), strict=False):
            parts[:] = parts or Walk(twin, sample, padding=padding).parts
            yield index, sample

    power, noise = np.zeros(1), np.zeros((len(plans), 1))
    for index, own, errors in in_order(walked, twin.alone(worker_count(twin.manifest["workspace"])), judges()):
        power, noise = power + weights[index] * own, noise + weights[index] * errors
    result: np.ndarray = (noise / np.maximum(power, np.finfo(np.float64).tiny)).mean(axis=1)
    return result


def without_sample(plan: QuantPlan, params: Mapping[str, QParams], ends: SampleEnds, index: int) -> dict[str, QParams]:
    """`params` of a plan as they were without one sample: a range that came from data is narrower by as much as that sample reached further than all others,
    at either end; values stored alike count as one."""
    together: dict[str, list[str]] = {}
    for value in params:
        together.setdefault(plan.source(value), []).append(value)
    found = dict(params)
    for source, members in together.items():
        seen = [np.array(ends.ends[m]) for m in {source, *members} if len(ends.ends.get(m, ())) > index]
        if isinstance(plan.edges[source], Quantized) and seen and len({len(s) for s in seen}) == 1 and len(seen[0]) > 1:
            reach = np.stack([np.minimum(np.min(seen, 0)[:, 0], 0.0), np.maximum(np.max(seen, 0)[:, 1], 0.0)], 1)
            whole, rest = (np.array([r[:, 0].min(), r[:, 1].max()]) for r in (reach, np.delete(reach, index, 0)))
            low, high = np.divide(rest, whole, out=np.ones(2), where=whole != 0)
            if low < 1 or high < 1:
                p = params[source] if source in params else params[members[0]]
                least, most = LIMITS[p.dtype]
                found |= dict.fromkeys(
                    members, QParams.from_range(p.scale * (least - p.zero_point) * low, p.scale * (most - p.zero_point) * high, dtype=p.dtype)
                )
    return found
