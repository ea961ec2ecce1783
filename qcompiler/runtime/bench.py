"""Latency, measured fairly: candidates take turns in one process, so that drifting clocks and neighbours hit all of them alike."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qcompiler.base.progress import Progress, silent
from qcompiler.base.tensor import TensorInfo

BUSY = 0.1
"""Cores that other processes may use on average before a measurement says so."""


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one candidate. median, p90, p99: half, 90 % and 99 % of the calls took no longer."""

    name: str
    minimum: float
    median: float
    rounds: int
    mean: float = float("nan")
    p90: float = float("nan")
    p99: float = float("nan")

    @staticmethod
    def of(name: str, times: Sequence[float]) -> Timing:
        p90, p99 = (float(p) for p in np.percentile(times, (90, 99), method="inverted_cdf"))
        return Timing(name, min(times), statistics.median(times), len(times), statistics.fmean(times), p90, p99)


def interleave(
    candidates: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 3.0,
    min_rounds: int = 10,
    warmup: int = 3,
    rehearse: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    progress: Progress = silent,
) -> list[Timing]:
    """Call the candidates round robin (each round starts with the next one) for about `seconds` in all; at least `min_rounds` rounds.

    `warmup`: untimed calls of each before all. `rehearse`: so many untimed calls come before each timed one. Some runtimes' threads go on spinning after a
    call, on cores that the next candidate needs; and each then finds the caches as it leaves them itself.
    """
    for call in candidates.values():
        for _ in range(warmup):
            call()
    names = list(candidates)
    times: dict[str, list[float]] = {name: [] for name in names}
    begin, rounds = clock(), 0
    while rounds < min_rounds or clock() - begin < seconds:
        for offset in range(len(names)):
            name = names[(rounds + offset) % len(names)]
            for _ in range(rehearse):
                candidates[name]()
            start = clock()
            candidates[name]()
            times[name].append(clock() - start)
        rounds += 1
        spent = clock() - begin
        progress("measure", rounds, max(rounds + 1, min_rounds, int(rounds * seconds / spent) if spent > 0 else 0))
    progress("measure", rounds, rounds)
    return [Timing.of(name, t) for name, t in times.items()]


def ratios(timings: Sequence[Timing], base: str) -> dict[str, float]:
    """Minimum of each candidate over the minimum of `base`: 0.5 is twice as fast as `base`."""
    reference = next(t.minimum for t in timings if t.name == base)
    return {t.name: t.minimum / reference for t in timings}


class Neighbours:
    """How many cores other processes use, between `__init__` and `cores`, by /proc/stat; None where it can't be read."""

    def __init__(self) -> None:
        self._begin = self._now()

    def cores(self) -> float | None:
        """On average; of all cores of the machine, not only of those that this process may use."""
        end = self._now()
        if self._begin is None or end is None:
            return None
        wall, all_, own = (b - a for a, b in zip(self._begin, end, strict=True))
        return max(0.0, all_ - own) / wall if wall > 0 else 0.0

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        """Seconds: of the clock, that all processes ran, that this one and its children ran."""
        try:
            fields = [int(f) for f in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        except (OSError, ValueError):
            return None
        user, nice, system, _, _, irq, softirq, _ = fields
        return time.monotonic(), (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])


def random_inputs(inputs: Sequence[TensorInfo], seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs to measure with: standard normal numbers for float inputs, zeros for others (any index is valid then)."""
    generator = np.random.default_rng(seed)
    return {i.name: generator.standard_normal(i.shape).astype(i.dtype) if np.dtype(i.dtype).kind == "f" else np.zeros(i.shape, i.dtype) for i in inputs}
