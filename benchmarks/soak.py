"""A library under load for a long time: does memory stay flat, do latencies stay as they are, and is every answer right, bit for bit?

    python benchmarks/soak.py MODEL.so [--duration 600] [--load 0.8] [--streams 2] [--threads 1] [--deadline S]

First the capacity of the pool is measured, with its queue always full. Then requests are due at a fixed rate, that share of it, whatever happens; latencies
count from then to the answer. Inputs are 16 different ones, of the library's first shape; their answers are computed before, by a session. The table goes to
--results too. Exit status 1 where an answer was wrong.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np

from qcompiler.runtime.bench import random_inputs
from qcompiler.runtime.pool import SessionPool, measure
from qcompiler.runtime.session import Session

INPUTS = 16
PAGE = os.sysconf("SC_PAGE_SIZE")


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def machine() -> str:
    """The processor and how many cores of it this process may use."""
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{names[0] if names else 'unknown processor'}, {len(os.sched_getaffinity(0))} cores"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def samples_of(session: Session, seed: int) -> dict[str, np.ndarray]:
    """Random pixels for inputs of uint8, the rest as `random_inputs` has it."""
    rng = np.random.default_rng(seed)
    pixels = {i.name: rng.integers(0, 256, i.shape).astype(np.uint8) for i in session.inputs if i.dtype == "uint8"}
    return {**random_inputs(session.inputs, seed), **pixels}


class Soak:
    """What is seen of a pool under load. Latencies go to an array that is made before, so that what grows is not this."""

    def __init__(self, pool: SessionPool, inputs: Sequence[Any], answers: Sequence[Any], rate: float, duration: float) -> None:
        self.pool, self.inputs, self.answers, self.rate, self.duration = pool, inputs, answers, rate, duration
        self.latencies = np.full(int(rate * duration) + 1, np.nan)
        self.memory: list[tuple[float, int]] = []
        self.wrong = self.failed = 0
        self._answered = threading.Semaphore(0)

    def run(self) -> None:
        begin, sampled = time.perf_counter(), 0.0
        for number in range(len(self.latencies)):
            due = begin + number / self.rate
            time.sleep(max(0.0, due - time.perf_counter()))
            if due - sampled >= 1.0:
                sampled = due
                self.memory.append((due - begin, resident()))
            self.pool.submit(self.inputs[number % INPUTS]).add_done_callback(lambda future, number=number, due=due: self._check(future, number, due))  # type: ignore[misc]
        for _ in self.latencies:
            self._answered.acquire()

    def _check(self, future: Future[dict[str, np.ndarray]], number: int, due: float) -> None:
        self.latencies[number] = time.perf_counter() - due
        if future.exception() is not None:
            self.failed += 1
        else:
            wanted = self.answers[number % INPUTS]
            self.wrong += any(array.tobytes() != wanted[name] for name, array in future.result().items())
        self._answered.release()

    def rows(self) -> list[list[str]]:
        """A row of the table for the first and the last third."""
        third, found = len(self.latencies) // 3, []
        for name, taken, part in (("first", self.latencies[:third], 0), ("last", self.latencies[-third:], 2)):
            memory = [bytes_ for at, bytes_ in self.memory if part * self.duration / 3 <= at <= (part + 1) * self.duration / 3]
            p50, p99 = np.quantile(taken, [0.5, 0.99]) * 1e3
            found.append([name, str(len(taken)), f"{p50:.2f}", f"{p99:.2f}", f"{statistics.median(memory) / 2**20:.1f}", f"{max(memory) / 2**20:.1f}"])
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", type=Path)
    parser.add_argument("--duration", type=float, default=600.0)
    parser.add_argument("--load", type=float, default=0.8, help="share of the measured capacity")
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--deadline", type=float)
    parser.add_argument("--results", type=Path, default=Path(__file__).resolve().parent / "results" / "soak.md")
    options = parser.parse_args()
    session = Session(options.library)
    inputs = [samples_of(session, seed) for seed in range(INPUTS)]
    answers = [{name: array.tobytes() for name, array in session.run(sample).items()} for sample in inputs]
    waiting = None if options.deadline is None else 64 * options.streams
    with SessionPool(options.library, options.streams, options.threads, waiting, deadline=options.deadline) as pool:
        capacity = statistics.median(measure(pool, inputs[0], min(3.0, options.duration / 10)).per_second for _ in range(3))
        soak = Soak(pool, inputs, answers, options.load * capacity, options.duration)
        soak.run()
    told = f", batches within {options.deadline:g} s" if options.deadline else ""
    title = (
        f"{options.library.name}: {options.duration:g} s at {options.load:.0%} of {capacity:.1f} requests a second, {options.streams} streams of "
        f"{options.threads} threads{told}; {len(soak.latencies)} requests, {soak.wrong} wrong answers, {soak.failed} failures"
    )
    head = ("third", "requests", "p50 ms", "p99 ms", "memory MB, median", "largest")
    text = f"{title}\n\n{markdown(head, soak.rows())}\n\n{machine()}\n"
    print(text)
    words = " ".join([options.library.name, *(w for w in sys.argv[1:] if w != str(options.library))])
    options.results.write_text(f"    python benchmarks/soak.py {words}\n\n{text}")
    sys.exit(1 if soak.wrong or soak.failed else 0)


if __name__ == "__main__":
    main()
