"""Samples side by side: one thread per worker, results in the order of the samples, so that sums over them come out the same whatever the threads do."""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue
from typing import TypeVar

Item = TypeVar("Item")
Worker = TypeVar("Worker")
Result = TypeVar("Result")
_MOST = 16
MEMORY = 512 << 20  # bytes that workers may take together, beyond the first


class _OneBlasThread(contextlib.ContextDecorator):
    """numpy's matrix products stay on the thread that calls them: those of one layer are too small to be shared, and OpenBLAS's threads wait for each other
    by spinning, which on a busy machine takes 50 times as long. Where numpy has another library, nothing happens. May be nested, and entered by any thread."""

    _lock, _inside, _before = threading.Lock(), 0, list[int]()

    def __enter__(self) -> None:
        with self._lock:
            if not _OneBlasThread._inside:
                _OneBlasThread._before = [get() for get, _ in _blas()]
                for _, put in _blas():
                    put(1)
            _OneBlasThread._inside += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            _OneBlasThread._inside -= 1
            if not _OneBlasThread._inside:
                for (_, put), threads in zip(_blas(), _OneBlasThread._before, strict=True):
                    put(threads)


one_blas_thread = _OneBlasThread()


@functools.cache
def _blas() -> list[tuple[Callable[[], int], Callable[[int], object]]]:
    """How the OpenBLAS libraries of this process are asked for their number of threads, and told one."""
    try:
        mapped = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    found = []
    for path in sorted({line.split(maxsplit=5)[5] for line in mapped if "openblas" in line.rpartition("/")[2].lower()}):
        with contextlib.suppress(OSError):
            library = ctypes.CDLL(path)
            for prefix, suffix in (("scipy_", "64_"), ("scipy_", ""), ("", "64_"), ("", "")):
                if hasattr(library, f"{prefix}openblas_set_num_threads{suffix}"):
                    found.append(tuple(library[f"{prefix}openblas_{verb}_num_threads{suffix}"] for verb in ("get", "set")))
                    break
    return [(get, put) for get, put in found]


def cores() -> int:
    """Of this process, as far as samples are to be spread over them."""
    return min(len(os.sched_getaffinity(0)), _MOST)


def worker_count(size: int, most: int | None = None) -> int:
    """As many workers of `size` bytes each as there are cores and memory for; one at least."""
    return max(1, min(cores() if most is None else most, MEMORY // max(size, 1)))


@contextlib.contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """So many threads, for nobody else meanwhile, which are idle in the end. They are kept for the next who needs as many: starting them takes longer than
    many a piece of work."""
    idle = _IDLE.setdefault(count, [])
    pool = idle.pop() if idle else ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        idle.append(pool)


_IDLE: dict[int, list[ThreadPoolExecutor]] = {}
os.register_at_fork(after_in_child=_IDLE.clear)  # a child process has none of the threads


def in_order(
    function: Callable[[Worker, Item], Result], workers: Sequence[Worker], items: Iterable[Item], stop: Callable[[], None] = lambda: None
) -> Generator[Result, None, None]:
    """function(worker, item) of each item, in order; a worker has one item at a time. Items are read by the calling thread, a few ahead of their results.
    What `function` raises is raised here, in its turn. stop: called where not all results are taken, before what is under way is waited for."""
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
    with _threads(len(workers)) as pool:
        try:
            for item in items:
                pending.append(pool.submit(contextvars.copy_context().run, work, item))  # numpy's settings are those of the caller
                if len(pending) > 2 * len(workers):
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BaseException:
            for future in pending:
                future.cancel()
            stop()
            wait(pending)
            raise


def side_by_side(function: Callable[[Item], Result], items: Sequence[Item], lane: Callable[[Item], Hashable]) -> list[Result]:
    """function(item) of each item, in order; those of one lane one after the other, lanes at the same time."""
    lanes: dict[Hashable, list[int]] = {}
    for index, item in enumerate(items):
        lanes.setdefault(lane(item), []).append(index)
    if len(lanes) <= 1:
        return [function(item) for item in items]

    def work(indices: list[int]) -> list[tuple[int, Result]]:
        return [(i, function(items[i])) for i in indices]

    with _threads(len(lanes)) as pool:
        futures = [pool.submit(work, indices) for indices in lanes.values()]
        wait(futures)
        found = dict(itertools.chain.from_iterable(f.result() for f in futures))
    return [found[i] for i in range(len(items))]
