"""Samples side by side: one thread per worker, results in the order of the samples, so that sums over them come out the same whatever the threads do."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

Item = TypeVar("Item")
Worker = TypeVar("Worker")
Result = TypeVar("Result")
_MOST = 16
MEMORY = 512 << 20  # bytes that workers may take together, beyond the first


def cores() -> int:
    """Of this process, as far as samples are to be spread over them."""
    return min(len(os.sched_getaffinity(0)), _MOST)


def worker_count(size: int, most: int | None = None) -> int:
    """As many workers of `size` bytes each as there are cores and memory for; one at least."""
    return max(1, min(cores() if most is None else most, MEMORY // max(size, 1)))


def in_order(function: Callable[[Worker, Item], Result], workers: Sequence[Worker], items: Iterable[Item]) -> Iterator[Result]:
    """function(worker, item) of each item, in order; a worker has one item at a time. Items are read by the calling thread, a few ahead of their results.
    What `function` raises is raised here, in its turn."""
    if len(workers) == 1:
        yield from (function(workers[0], item) for item in items)
        return
    free: SimpleQueue[Worker] = SimpleQueue()
    for worker in workers:
        free.put(worker)

    def work(item: Item) -> Result:
        worker = free.get()
        try:
            return function(worker, item)
        finally:
            free.put(worker)

    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(len(workers)) as pool:
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) > 2 * len(workers):
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def side_by_side(function: Callable[[Item], Result], items: Sequence[Item], lane: Callable[[Item], Hashable]) -> list[Result]:
    """function(item) of each item, in order; those of one lane one after the other, lanes at the same time."""
    lanes: dict[Hashable, list[int]] = {}
    for index, item in enumerate(items):
        lanes.setdefault(lane(item), []).append(index)
    if len(lanes) <= 1:
        return [function(item) for item in items]

    def work(indices: list[int]) -> list[tuple[int, Result]]:
        return [(i, function(items[i])) for i in indices]

    with ThreadPoolExecutor(len(lanes)) as pool:
        found = dict(itertools.chain.from_iterable(pool.map(work, lanes.values())))
    return [found[i] for i in range(len(items))]
