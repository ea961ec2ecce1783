"""Latency, measured fairly: candidates take turns in one process, so that drifting clocks and neighbours hit all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from qcompiler.base.errors import DataError
from qcompiler.base.progress import Progress, silent
from qcompiler.base.tensor import TensorInfo


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one candidate."""

    name: str
    minimum: float
    median: float
    rounds: int


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

    `rehearse`: so many untimed calls come before each timed one. Some runtimes' threads go on spinning after a call, on cores that the next
    candidate needs; and each then finds the caches as it leaves them itself.
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
        progress("measure", rounds, max(rounds, min_rounds, int(rounds * seconds / spent) if spent > 0 else 0))
    return [Timing(name, min(t), statistics.median(t), len(t)) for name, t in times.items()]


def ratios(timings: Sequence[Timing], base: str) -> dict[str, float]:
    """Minimum of each candidate over the minimum of `base`: 0.5 is twice as fast as `base`."""
    reference = next(t.minimum for t in timings if t.name == base)
    return {t.name: t.minimum / reference for t in timings}


def random_inputs(inputs: Sequence[TensorInfo], seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs to measure with: standard normal numbers for float inputs, zeros for others (any index is valid then)."""
    generator = np.random.default_rng(seed)
    return {i.name: generator.standard_normal(i.shape).astype(i.dtype) if np.dtype(i.dtype).kind == "f" else np.zeros(i.shape, i.dtype) for i in inputs}


def onnxruntime_call(model: str, inputs: Mapping[str, np.ndarray], threads: int) -> Callable[[], Any]:
    """A call of ONNX Runtime (CPU) on `model`. Raises DataError when it isn't installed, or can't load the model."""
    try:
        import onnxruntime
    except ImportError as error:
        raise DataError("--against onnxruntime: it is not installed; pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common class of their own
        raise DataError(f"--against onnxruntime: it can't load {model}: {str(error).splitlines()[0]}") from error
    feed = dict(inputs)
    return lambda: session.run(None, feed)
