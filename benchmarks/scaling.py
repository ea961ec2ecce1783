"""How a library would scale to more cores than this machine has, and what would limit it: measured parts, put together by the thread pool's own rules.

    python benchmarks/scaling.py MODEL.so... [--cores 1 2 4 8 16 32] [--memory GB/S] [--cache MB]

Measured here: the time of every step on one thread, what an empty parallel loop costs (pool.c), and how fast memory is read. From the manifest: how many tasks
a step has, and the bytes of weights and results.

    latency      a step of T tasks is cut into at most 4 shares per core, claimed as cores come free (qc_threads.c); a step of one task runs on one core; each
                 parallel step costs a loop; and no run is faster than memory gives what no cache holds: weights of more than the last cache has, and results
    throughput   streams of one thread each share nothing but caches and memory: they scale until all together move what memory gives. "at best": what no cache
                 holds, as above; "at worst": every byte, weights once, each result written and read once, as if there were no shared cache

What it can't see: clocks that fall when all cores work, how streams share the last cache, memory on several sockets. `bench --threads 2` checks two cores.
"""

from __future__ import annotations

import argparse
import heapq
import os
import tempfile
from pathlib import Path
from typing import Any

import roofline
from call_overhead import pool
from soak import machine, markdown

from qcompiler.base.targets import find_target
from qcompiler.runtime.bench import random_inputs
from qcompiler.runtime.session import Session, stored_bytes

SHARES = 4  # per thread: qc_threads.c
MEMORY = 1 << 28  # bytes of a buffer that no cache holds


def shared_out(tasks: int, cores: int) -> float:
    """The part of a step's time on one core that it takes on so many: shares of whole tasks, each claimed by the core that is free first."""
    shares = SHARES * cores
    chunk = -(-tasks // shares)
    sizes = [min(chunk, tasks - begin) for begin in range(0, tasks, chunk)]
    free = [0.0] * cores
    for size in sizes:
        heapq.heapreplace(free, free[0] + size / tasks)
    return max(free)


class Library:
    """Steps of a library at its first shape: seconds, tasks, bytes of the result."""

    def __init__(self, path: Path, rounds: int) -> None:
        session = Session(path)
        at = session.specializations[0]
        manifest = at.manifest
        self.name = path.name
        self.seconds = [t for *_, t in session.profile(random_inputs(at.inputs), rounds)]
        self.tasks = [s["tasks"] * s.get("images", 1) for s in manifest["steps"]]
        self.bytes = [stored_bytes(manifest["layouts"][s["id"]]) for s in manifest["steps"]]
        self.values, self.weights = 2 * sum(self.bytes), manifest["constants"]

    def beyond(self, cache: float) -> float:
        """Bytes of a run that no cache of so many bytes holds."""
        return (self.weights if self.weights > cache else 0) + sum(2 * b for b in self.bytes if b > cache)

    def latency(self, cores: int, loop: float, floor: float) -> tuple[float, dict[str, float]]:
        """Seconds of a run on so many cores; seconds lost to each limit. loop: seconds of an empty parallel loop. floor: of memory."""
        lost = dict.fromkeys(("steps of one task", "uneven shares", "starting loops", "memory"), 0.0)
        total = 0.0
        for seconds, tasks in zip(self.seconds, self.tasks, strict=True):
            computed = seconds * shared_out(tasks, cores)
            lost["steps of one task" if tasks == 1 else "uneven shares"] += computed - seconds / cores
            start = loop if tasks > 1 and cores > 1 else 0.0
            lost["starting loops"] += start
            total += computed + start
        lost["memory"] = max(0.0, floor - total)
        return total + lost["memory"], lost


def last_cache() -> float:
    """Bytes of the last cache, as Linux has it; 8 MB where it says nothing."""
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((float(s[:-1]) * {"K": 1 << 10, "M": 1 << 20}[s[-1]] for s in sizes if s[-1:] in ("K", "M")), default=float(8 << 20))


def rows_of(library: Library, cores: list[int], loop: float, memory: float, cache: float) -> list[list[str]]:
    one, rows = sum(library.seconds), []
    best, worst_case = (memory * one / moved if moved else float("inf") for moved in (library.beyond(cache), float(library.values + library.weights)))
    for count in cores:
        seconds, lost = library.latency(count, loop, library.beyond(cache) / memory)
        worst = max(lost, key=lambda name: lost[name])
        streams = [f"{max(1.0, min(float(count), limit)):.1f}" for limit in (best, worst_case)]
        told = "-" if count == 1 else f"{worst} ({lost[worst] / seconds:.0%})"
        rows.append([library.name, str(count), f"{1e3 * seconds:.3f}", f"{one / seconds:.2f}", told, *streams])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", nargs="+", type=Path, metavar="MODEL.so")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--memory", type=float, help="GB/s of all cores together (default: what those of this machine read)")
    parser.add_argument("--cache", type=float, help="MB of the last cache (default: this machine's)")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--results", type=Path, default=Path(__file__).resolve().parent / "results" / "scaling.md")
    options: Any = parser.parse_args()
    here, cache = len(os.sched_getaffinity(0)), 2.0**20 * options.cache if options.cache else last_cache()
    memory = 1e9 * options.memory if options.memory else roofline.bandwidth(find_target("native").name, MEMORY, threads=here)
    with tempfile.TemporaryDirectory(prefix="qcompiler-") as folder:
        loop = pool(2, 300, Path(folder))["launch"] * 1e-9
    found = [Library(path, options.rounds) for path in options.libraries]
    rows = [row for library in found for row in rows_of(library, options.cores, loop, memory, cache)]
    head = ("library", "cores", "ms", "x 1 core", "lost most to", "streams at best", "at worst")
    moved = [[v.name, f"{v.weights / 1e6:.2f}", f"{v.values / 1e6:.2f}", str(len(v.seconds)), str(sum(t > 1 for t in v.tasks))] for v in found]
    text = "\n\n".join(
        (
            f"Memory: {memory / 1e9:.1f} GB/s{'' if options.memory else f', read by {here} cores'}; last cache {cache / 2**20:.0f} MB; "
            f"an empty parallel loop on two threads: {loop * 1e6:.2f} us",
            markdown(("library", "MB of weights", "MB of values a run", "steps", "of them parallel"), moved),
            "Simulated: latency of one session with so many threads, and how many times one stream so many streams of one thread do",
            markdown(head, rows),
            machine(),
        )
    )
    print(text)
    options.results.write_text(f"    python benchmarks/scaling.py {' '.join(p.name for p in options.libraries)}\n\n{text}\n")


if __name__ == "__main__":
    main()
